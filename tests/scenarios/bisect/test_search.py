"""ddmin and the search over oracles that are functions of the chosen set: their properties, with no run made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios.bisect.ddmin import Outcome, ddmin, split
from scenarios.bisect.search import Compared, Keys, Search

SIZE = 12
ITEMS = tuple(f"k{i:02d}" for i in range(SIZE))
subsets = st.frozensets(st.sampled_from(ITEMS), min_size=1, max_size=4)


def fails_with(hidden: Sequence[Keys], unresolved: Sequence[Keys] = ()) -> Callable[[tuple[str, ...]], Outcome]:
    """Diverges with any hidden set in it; no answer where a set of `unresolved` is cut in two."""

    def test(keys: tuple[str, ...]) -> Outcome:
        chosen = set(keys)
        if any(chosen & pair and not pair <= chosen for pair in unresolved):
            return Outcome.UNRESOLVED
        return Outcome.DIVERGED if any(one <= chosen for one in hidden) else Outcome.SAME

    return test


@given(st.lists(subsets, min_size=1, max_size=3), st.lists(subsets, max_size=2), st.integers(0, SIZE))
def test_what_ddmin_returns_fails_and_is_1_minimal(hidden: list[Keys], unresolved: list[Keys], suspects: int) -> None:
    test = fails_with(hidden, unresolved)
    found = ddmin(ITEMS, test, suspects=suspects)
    assert test(found) is Outcome.DIVERGED
    for item in found:
        assert test(tuple(key for key in found if key != item)) is not Outcome.DIVERGED or len(found) == 1
    assert list(found) == sorted(found)


@given(subsets)
def test_one_hidden_set_is_found_exactly(hidden: Keys) -> None:
    assert set(ddmin(ITEMS, fails_with([hidden]))) == hidden


@given(st.sampled_from(ITEMS))
def test_one_hidden_item_takes_no_more_than_two_tests_a_halving(hidden: str) -> None:
    tests: list[tuple[str, ...]] = []

    def test(keys: tuple[str, ...]) -> Outcome:
        tests.append(keys)
        return fails_with([frozenset({hidden})])(keys)

    ddmin(ITEMS, test)
    assert len(tests) <= 8


@given(st.lists(subsets, min_size=1, max_size=3))
def test_every_reduction_is_told_and_gets_smaller(hidden: list[Keys]) -> None:
    told: list[tuple[str, ...]] = []
    found = ddmin(ITEMS, fails_with(hidden), reduced=told.append)
    assert [len(one) for one in told] == sorted({len(one) for one in told}, reverse=True)
    assert (told[-1] if told else ITEMS) == found


def test_suspects_are_tried_first_and_save_tests() -> None:
    tests: list[tuple[str, ...]] = []

    def test(keys: tuple[str, ...]) -> Outcome:
        tests.append(keys)
        return fails_with([frozenset({"k01"})])(keys)

    assert ddmin(ITEMS, test, suspects=2) == ("k01",)
    assert tests == [("k00", "k01"), ("k00",), ("k01",)]


@given(st.integers(1, 40), st.integers(1, 40))
def test_pieces_are_even_in_order_and_never_empty(items: int, parts: int) -> None:
    parts = min(parts, items)
    pieces = split(range(items), parts)
    assert list(itertools.chain(*pieces)) == list(range(items))
    assert len(pieces) == parts
    assert min(map(len, pieces)) >= 1
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


class World:
    """What a run does is the set of effects whose changes are all chosen; `blocks` switch an effect off again."""

    def __init__(self, effects: Sequence[Keys], blocks: Sequence[tuple[str, int]] = ()) -> None:
        self.effects, self.blocks = effects, blocks
        self.asked: list[tuple[Keys, Keys]] = []

    def behaviour(self, chosen: Keys) -> frozenset[int]:
        off = {at for key, at in self.blocks if key in chosen}
        return frozenset(i for i, effect in enumerate(self.effects) if effect <= chosen and i not in off)

    def compare(self, base: Keys, chosen: Keys) -> Compared[None]:
        self.asked.append((base, chosen))
        same = self.behaviour(base) == self.behaviour(chosen)
        return Compared(Outcome.SAME if same else Outcome.DIVERGED, None)


@given(st.lists(subsets, max_size=4), st.lists(st.tuples(st.sampled_from(ITEMS), st.integers(0, 3)), max_size=2))
@settings(max_examples=200)
def test_with_what_the_search_finds_a_is_the_same_as_b(effects: list[Keys], blocks: list[tuple[str, int]]) -> None:
    world = World(effects, blocks)
    search: Search[None] = Search(ITEMS, world.compare)
    search.run()
    assert search.complete
    assert world.behaviour(search.base) == world.behaviour(frozenset(ITEMS))
    for found in search.found:
        before = world.behaviour(found.base)
        assert world.behaviour(found.base | set(found.keys)) != before
        for key in found.keys:
            assert len(found.keys) == 1 or world.behaviour(found.base | set(found.keys) - {key}) == before
    assert set(search.rest) | search.base == set(ITEMS)


@given(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=4, unique=True))
def test_independent_changes_are_all_named_one_by_one_and_nothing_else(keys: list[str]) -> None:
    search: Search[None] = Search(ITEMS, World([frozenset({key}) for key in keys]).compare)
    search.run()
    assert sorted(found.keys for found in search.found) == sorted((key,) for key in keys)


def test_a_change_that_matters_only_with_another_is_found_on_top_of_it() -> None:
    """As clip.value does nothing unless clip.mode clips."""
    search: Search[None] = Search(ITEMS, World([frozenset({"k03"}), frozenset({"k03", "k08"})]).compare)
    search.run()
    assert [(found.keys, found.base) for found in search.found] == [
        (("k03",), frozenset()),
        (("k08",), frozenset({"k03"})),
    ]


def test_nothing_is_searched_where_b_is_the_same() -> None:
    world = World([])
    search: Search[None] = Search(ITEMS, world.compare)
    search.run()
    assert search.complete
    assert (search.found, len(world.asked)) == ([], 1)


@given(st.integers(0, 12))
def test_a_search_that_is_stopped_says_what_it_knows(budget: int) -> None:
    world = World([frozenset({"k02"}), frozenset({"k05", "k09"})])

    def compare(base: Keys, chosen: Keys) -> Compared[None]:
        if len(world.asked) >= budget:
            raise KeyboardInterrupt
        return world.compare(base, chosen)

    search: Search[None] = Search(ITEMS, compare)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert not search.complete
    assert set(search.rest) == set(ITEMS) - search.base
    if search.candidates:
        assert world.behaviour(search.base | set(search.candidates)) != world.behaviour(search.base)


def test_a_run_without_an_answer_ends_the_search_unfinished() -> None:
    search: Search[None] = Search(ITEMS, lambda *_: Compared(Outcome.UNRESOLVED, None))
    search.run()
    assert not search.complete
    assert search.found == []
