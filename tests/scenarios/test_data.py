"""Rows, batches and labels."""

from __future__ import annotations

import numpy as np
import pytest

from scenarios.config import DataConfig, TrainConfig
from scenarios.data import (
    IGNORED,
    MicroBatch,
    Tokens,
    collate,
    load_tokens,
    make_rows,
    make_texts,
    plain_batches,
    with_mask_label,
)
from scenarios.paths._mlx_loss import supervised_stretch
from tracer.errors import BadConfig

pytest.importorskip("tokenizers", reason="needs the extra `torch` or `mlx`")


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return load_tokens("tiny-llama")


def test_rows_vary_in_length_and_end_with_the_end_token_where_they_are_not_cut(tokens: Tokens) -> None:
    rows = make_rows(DataConfig(row_length=12), tokens)
    assert len(rows) == 32
    assert len({len(row) for row in rows}) > 2
    assert max(len(row) for row in rows) == 12
    assert all(row[-1] == tokens.end for row in rows if len(row) < 12)


def test_rows_of_equal_length_are_full(tokens: Tokens) -> None:
    assert {len(row) for row in make_rows(DataConfig(row_length=40, variable=False), tokens)} == {40}


def test_another_seed_gives_other_rows_and_the_same_seed_the_same(tokens: Tokens) -> None:
    assert make_rows(DataConfig(seed=1), tokens) == make_rows(DataConfig(seed=1), tokens)
    assert make_rows(DataConfig(seed=1), tokens) != make_rows(DataConfig(seed=2), tokens)


def test_shuffling_keeps_the_rows_and_changes_their_order(tokens: Tokens) -> None:
    plain, shuffled = make_rows(DataConfig(), tokens), make_rows(DataConfig(order="shuffled"), tokens)
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)
    assert shuffled != make_rows(DataConfig(order="shuffled", order_seed=1), tokens)


def test_rows_sorted_by_length_are_the_same_rows(tokens: Tokens) -> None:
    plain, by_length = make_rows(DataConfig(), tokens), make_rows(DataConfig(order="length"), tokens)
    assert sorted(plain) == sorted(by_length)
    assert [len(row) for row in by_length] == sorted(len(row) for row in plain)


def test_the_tokens_at_both_ends_stand_there_as_often_as_asked(tokens: Tokens) -> None:
    plain = make_rows(DataConfig(row_length=100), tokens)
    begun = make_rows(DataConfig(row_length=100, bos=2), tokens)
    ended = make_rows(DataConfig(row_length=100, eos=2), tokens)
    bare = make_rows(DataConfig(row_length=100, eos=0), tokens)
    assert begun == tuple((tokens.begin, tokens.begin, *row) for row in plain)
    assert ended == tuple((*row, tokens.end) for row in plain)
    assert bare == tuple(row[:-1] for row in plain)


def test_a_token_that_the_model_does_not_have_cannot_be_asked_for(tokens: Tokens) -> None:
    with pytest.raises(BadConfig, match=r"data\.bos = 1"):
        make_rows(DataConfig(bos=1), Tokens(tokens.tokenizer, 0, None))


def test_the_texts_are_those_of_the_rows_and_missing_where_rows_are_not_texts(tokens: Tokens) -> None:
    data = DataConfig(order="shuffled")
    texts = make_texts(data, tokens)
    assert texts is not None
    assert [tuple(tokens.row(text)[: data.row_length]) for text in texts] == list(make_rows(data, tokens))
    assert make_texts(DataConfig(variable=False), tokens) is None
    assert make_texts(DataConfig(bos=2), tokens) is None


@pytest.mark.parametrize(
    ("supervise", "labels"),
    [
        ("tokens", [[IGNORED, 6, 7, IGNORED], [IGNORED, 9, IGNORED, IGNORED]]),
        ("tokens-and-pad", [[IGNORED, 6, 7, 0], [IGNORED, 9, 0, IGNORED]]),
        ("all-but-last", [[IGNORED, 6, IGNORED, IGNORED], [IGNORED, IGNORED, IGNORED, IGNORED]]),
    ],
)
def test_which_tokens_are_targets_and_how_wide_a_batch_is_can_be_chosen(
    supervise: str, labels: list[list[int]]
) -> None:
    batch = collate([(5, 6, 7), (8, 9)], pad=0, extra=1, supervise=supervise)
    assert batch.labels.tolist() == labels
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


def test_making_data_draws_nothing_from_the_global_generator(tokens: Tokens) -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    plain_batches(make_rows(DataConfig(order="shuffled"), tokens), DataConfig(), TrainConfig(), tokens.pad)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index, arg-type]


def test_padding_and_the_first_column_are_not_supervised() -> None:
    batch = collate([(5, 6, 7), (8, 9)], pad=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_batches_take_the_rows_in_turn_and_start_again_after_the_last() -> None:
    rows = tuple((i, i) for i in range(1, 6))
    steps = plain_batches(rows, DataConfig(), TrainConfig(steps=2, batch=2, accumulation=2), pad=0)
    assert [[m.input_ids[:, 0].tolist() for m in step] for step in steps] == [[[1, 2], [3, 4]], [[5, 1], [2, 3]]]


def test_one_label_is_masked_and_nothing_else() -> None:
    plain = (collate([(5, 6, 7), (8, 9)], pad=0),)
    steps = with_mask_label((plain, plain), DataConfig(mask_label=(0, 2), mask_step=2))
    assert steps[0] is plain
    assert (steps[1][0].labels != plain[0].labels).nonzero() == (np.array([0]), np.array([2]))
    assert np.array_equal(steps[1][0].input_ids, plain[0].input_ids)


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 1), (0, 9)])
def test_a_label_that_is_not_supervised_cannot_be_masked(place: tuple[int, int]) -> None:
    plain = (collate([(5, 6, 7), (8, 9)], pad=0),)
    with pytest.raises(BadConfig, match="not a supervised position"):
        with_mask_label((plain,), DataConfig(mask_label=place))


def test_stretches_say_what_mlx_lms_loss_counts() -> None:
    stretch = supervised_stretch(collate([(5, 6, 7), (8, 9)], pad=0))
    assert stretch is not None
    assert stretch.tolist() == [[1, 2], [1, 1]]


def test_a_row_without_targets_has_an_empty_stretch() -> None:
    ids = np.array([[5, 6, 7]])
    stretch = supervised_stretch(MicroBatch(ids, np.full_like(ids, IGNORED)))
    assert stretch is not None
    assert stretch.tolist() == [[1, 0]]


@pytest.mark.parametrize("labels", [[IGNORED, 6, IGNORED, 8], [IGNORED, 6, 9, 8]])
def test_a_hole_or_a_label_that_is_not_the_token_has_no_stretch(labels: list[int]) -> None:
    assert supervised_stretch(MicroBatch(np.array([[5, 6, 7, 8]]), np.array([labels]))) is None
