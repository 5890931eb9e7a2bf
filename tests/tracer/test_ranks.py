"""The traces of a run's ranks as one: what is put together, what must agree, what is said when a rank is missing or drifts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ.engine import diff
from differ.result import Kind, Verdict
from tests.tracer.ranks import STEPS, WEIGHT, WORLD, change, run, sharded, tensor, tokens, whole, write
from tests.tracer.test_cli import trace
from tracer.children import SEARCH_PATH, TASK, children_recorded
from tracer.dtypes import bf16_to_float32, float32_to_bf16
from tracer.errors import BadUsage, MissingRank, NotATrace, NotFound
from tracer.place import Place, place, split_rank
from tracer.ranks import LazyRows, Order, RankTrace
from tracer.reader import RowView, open_trace
from tracer.schema import POSITIONS, WHOLE_STEP, Phase, Record, Row, State
from tracer.shards import Piece, piece_of, with_piece, without_piece
from tracer.shrink import shrink_in_place


def row(opened: object, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> RowView:
    assert isinstance(opened, RankTrace)
    view = opened.row(phase, step, micro_batch)
    assert view is not None
    return view


# Which files.


@pytest.mark.parametrize("how", ["run.h5", "run.rank*.h5", "."])
def test_a_name_a_pattern_and_a_folder_open_all_ranks_as_one_trace(tmp_path: Path, how: str) -> None:
    run(tmp_path / "run.h5")
    with open_trace(tmp_path / how) as opened:
        assert isinstance(opened, RankTrace)
        assert opened.world_size == WORLD
        assert opened.path == tmp_path / "run.h5"
        assert opened.steps == tuple(range(STEPS + 1))
        assert opened.finished


def test_one_rank_is_opened_by_the_name_of_its_file(tmp_path: Path) -> None:
    run(tmp_path / "run.h5")
    with open_trace(tmp_path / "run.rank1.h5") as opened:
        assert not isinstance(opened, RankTrace)
        assert opened.env["rank"] == 1


def test_a_file_of_the_runs_own_name_wins_over_its_ranks(tmp_path: Path) -> None:
    run(tmp_path / "run.h5")
    write(tmp_path / "run.h5", -1)
    with open_trace(tmp_path / "run.h5") as opened:
        assert not isinstance(opened, RankTrace)


def test_a_folder_with_several_runs_names_them_and_one_without_says_so(tmp_path: Path) -> None:
    run(tmp_path / "a.h5")
    run(tmp_path / "b.h5")
    with pytest.raises(BadUsage, match=r"several runs: a\.h5, b\.h5"):
        open_trace(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="folder without traces of ranks"):
        open_trace(tmp_path / "empty")


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    run(tmp_path / "run.h5")
    (tmp_path / "run.rank0.h5").unlink()
    with pytest.raises(MissingRank, match=r"rank 0 of 2 is missing \(run\.rank0\.h5\)"):
        open_trace(tmp_path / "run.h5")
    answer = trace("diff", tmp_path / "run.h5", tmp_path / "run.h5")
    assert answer.returncode == 2
    assert "[missing-rank]" in answer.stderr


KILLED = """
import os, signal
from pathlib import Path
from tracer.writer import TraceWriter
env = {"rank": 1, "world_size": 2, "launch": "x"}
writer = TraceWriter(Path("run.rank1.h5"), env=env, declared={}, overwrite=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("command", ["check", "show", "diff"])
def test_a_rank_that_was_killed_before_its_first_step_is_named(tmp_path: Path, command: str) -> None:
    write(tmp_path / "run.h5", 0)
    if command == "check":
        subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False)
        assert (tmp_path / "run.rank1.h5").exists()
    else:  # before the first byte, too
        (tmp_path / "run.rank1.h5").write_bytes(b"")
    files = [write(tmp_path / "one.h5", -1), tmp_path / "run.h5"] if command == "diff" else ["run.rank*.h5"]
    answer = trace(command, *files, cwd=tmp_path)
    assert answer.returncode == 2
    assert "run.h5: rank 1 of 2 has no complete step (run.rank1.h5), killed before the first one" in answer.stderr
    assert "there is rank 0 up to step 3; record the run again, or look at one rank by itself: " in answer.stderr
    assert answer.stderr.endswith("run.rank0.h5 [missing-rank]\n")


def test_all_ranks_that_have_no_step_are_named(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"run.rank{rank}.h5").write_bytes(b"")
    with pytest.raises(MissingRank, match=r"ranks 0, 1, 2 have no complete step \(run\.rank0\.h5, run\.rank1\.h5, run"):
        open_trace(tmp_path)
    write(tmp_path / "run.h5", 0)
    with pytest.raises(MissingRank, match=r"run\.rank2\.h5 are not of the run of run\.rank0\.h5, which has 2 ranks"):
        open_trace(tmp_path)


def test_a_rank_whose_file_is_no_trace_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run.h5", 0)
    (tmp_path / "run.rank1.h5").write_bytes(b"something else")
    with pytest.raises(NotATrace, match=r"rank 1 of .*run\.h5: .*run\.rank1\.h5 is not an HDF5 file"):
        open_trace(tmp_path)


def test_a_rank_that_was_killed_in_its_first_step_leaves_the_state_before_training(tmp_path: Path) -> None:
    write(tmp_path / "run.h5", 0)
    write(tmp_path / "run.h5", 1, steps=0, finished=False)
    with open_trace(tmp_path) as opened:
        assert (opened.steps, opened.finished) == ((0,), False)
    answer = trace("check", tmp_path)
    assert "rank 1 ends after step 0: killed" in answer.stdout


def test_ranks_of_different_runs_are_not_put_together(tmp_path: Path) -> None:
    run(tmp_path / "run.h5")
    write(tmp_path / "run.h5", 1, launch="y")
    with pytest.raises(MissingRank, match="not of one run"):
        open_trace(tmp_path / "run.h5")
    write(tmp_path / "run.h5", 1, world=4)
    with pytest.raises(MissingRank, match="ranks of 2 and of 4"):
        open_trace(tmp_path / "run.h5")
    shutil.copy(tmp_path / "run.rank0.h5", tmp_path / "run.rank1.h5")
    with pytest.raises(MissingRank, match="was not recorded as rank 1"):
        open_trace(tmp_path / "run.h5")


# Replicas and shards.


@pytest.mark.parametrize("edit", [None, sharded], ids=["replicated", "sharded"])
def test_ranks_are_the_same_as_one_process_that_accumulates_their_batches(tmp_path: Path, edit: object) -> None:
    run(tmp_path / "run.h5", edit)  # type: ignore[arg-type]
    result = diff(write(tmp_path / "one.h5", -1), tmp_path / "run.h5")
    assert result.verdict is Verdict.SAME, result.findings
    # Of a sharded frozen weight there are statistics only, and a generator's state is never judged.
    assert result.counts.within == (edit is not None)
    assert [note.id for note in result.notes] == ["ranks"]


def test_a_sharded_tensor_is_put_together_with_its_digest_and_statistics(tmp_path: Path) -> None:
    run(tmp_path / "run.h5", sharded)
    write(tmp_path / "one.h5", -1)
    with open_trace(tmp_path / "run.h5") as ranks, open_trace(tmp_path / "one.h5") as one:
        together, expected = row(ranks, Phase.PARAM, 2), one.row(Phase.PARAM, 2)
        assert expected is not None
        assert np.array_equal(together.read(0), whole(2, "w", Phase.PARAM))
        assert together.layout.entries[0].shape == WEIGHT
        assert together.digests[0] == expected.digests[0]
        assert np.allclose(together.stats, expected.stats, rtol=1e-12)
        assert together.state(0) is State.VALUE


def test_a_tied_weight_of_a_sharded_model_is_what_its_first_name_is(tmp_path: Path) -> None:
    def tied(row: Row, rank: int) -> Row:
        made = sharded(row, rank)
        if row.phase is not Phase.INIT:
            return made
        first = next(record for record in made.records if record.name == "w")
        return replace(made, records=(*made.records, replace(first, name="head", alias_of="init/w", stored=False)))

    run(tmp_path / "run.h5", tied)
    with open_trace(tmp_path / "run.h5") as ranks:
        start = row(ranks, Phase.INIT, 0)
        w, head = (start.layout.positions[name] for name in ("w", "head"))
        assert start.digests[head] == start.digests[w]
        assert np.array_equal(start.stats[head], start.stats[w])


def test_a_sharded_frozen_weight_that_differs_is_found(tmp_path: Path) -> None:
    def other(record: Record) -> Record:
        data = record.data
        assert data is not None
        return replace(record, data=data + np.float32(1)) if record.name == "frozen" else record

    planted = change(Phase.INIT, 0, 1, other)
    run(tmp_path / "run.h5", lambda row, rank: planted(sharded(row, rank), rank))
    result = diff(write(tmp_path / "one.h5", -1), tmp_path / "run.h5")
    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.name) == (0, "init", "frozen")


def test_a_fingerprint_of_ranks_is_one_file_that_still_agrees(tmp_path: Path) -> None:
    shrink_in_place(run(tmp_path / "run.h5", sharded))
    with open_trace(tmp_path / "run.h5") as opened:
        assert not isinstance(opened, RankTrace)
    result = diff(write(tmp_path / "one.h5", -1), tmp_path / "run.h5")
    assert result.verdict is Verdict.SAME, result.findings


def test_fingerprints_of_single_ranks_say_nothing_of_the_whole_and_are_not_compared(tmp_path: Path) -> None:
    run(tmp_path / "run.h5", sharded)
    for rank in range(WORLD):
        shrink_in_place(tmp_path / f"run.rank{rank}.h5")
    result = diff(write(tmp_path / "one.h5", -1), tmp_path / "run.h5")
    assert result.verdict is Verdict.SAME, result.findings
    with open_trace(tmp_path / "run.h5") as opened:
        assert opened.fingerprint
        assert row(opened, Phase.PARAM, 1).state(0) is State.UNRECORDED


def test_parts_that_are_not_all_of_a_tensor_are_unrecorded(tmp_path: Path) -> None:
    run(tmp_path / "run.h5", lambda row_, rank: sharded(row_, min(rank, 0)))
    with open_trace(tmp_path / "run.h5") as opened:
        view = row(opened, Phase.PARAM, 1)
        assert view.state(0) is State.UNRECORDED
        assert not view.stored(0)


def test_a_part_that_two_ranks_hold_must_be_the_same_on_both(tmp_path: Path) -> None:
    planted = change(Phase.PARAM, 2, 1, doubled)
    run(tmp_path / "run.h5", lambda row_, rank: planted(sharded(row_, 0), rank))
    with open_trace(tmp_path / "run.h5") as opened:
        found = [(row_.step, row_.phase, drift.rank) for row_, drift in opened.drifts()]
        assert found == [(2, Phase.PARAM, 1)]


def test_a_piece_is_written_into_the_index_and_read_back() -> None:
    piece = Piece((3, 0), (5, 4))
    assert with_piece("", piece) == "shard 3/5,0/4"
    turned = with_piece("T", piece)
    assert turned == "T shard 0/4,3/5"
    assert piece_of(turned) == Piece((0, 3), (4, 5))
    assert (without_piece(turned), without_piece("T"), piece_of("T")) == ("T", "T", None)


# Micro-batches and losses.


def test_the_batches_and_losses_of_the_ranks_are_further_micro_batches(tmp_path: Path) -> None:
    run(tmp_path / "run.h5")
    with open_trace(tmp_path / "run.h5") as opened:
        assert opened.micro_batches(Phase.BATCH, 1) == (0, 1)
        for rank in range(WORLD):
            assert np.array_equal(row(opened, Phase.BATCH, 1, rank).read(0), tokens(1, rank))
            # A rank's loss is averaged into that of the run.
            assert float(row(opened, Phase.LOSS, 1, rank).read(0)) == (3.0 + rank) / WORLD
        assert opened.observed["accumulation"] == WORLD
        assert opened.observed["ranks"] == WORLD


@pytest.mark.parametrize("turns", [False, True], ids=["rank after rank", "by turns"])
def test_one_process_with_the_whole_batch_is_compared_with_the_joined_one(tmp_path: Path, turns: bool) -> None:
    run(tmp_path / "run.h5")

    def join(row_: Row, _: int) -> Row:
        parts = [tokens(row_.step, rank) for rank in range(WORLD)]
        ids = np.stack(parts, axis=1).reshape(-1, parts[0].shape[1]) if turns else np.concatenate(parts)
        if row_.phase is Phase.BATCH:
            return replace(row_, records=(tensor(Phase.BATCH, row_.step, "input_ids", ids),))
        return replace(row_, records=(tensor(Phase.LOSS, row_.step, "loss", np.array(3.5, np.float32)),))

    def edit(row_: Row, rank: int) -> Row:
        return join(row_, rank) if row_.phase.per_micro_batch else row_

    # A trace of one rank is one process with one micro-batch.
    one = write(tmp_path / "one.h5", 0, edit=edit).rename(tmp_path / "single.h5")
    result = diff(one, tmp_path / "run.h5")
    assert result.verdict is Verdict.SAME, result.findings
    order = Order.INTERLEAVED if turns else Order.BY_RANK
    assert order.value in next(note.summary for note in result.notes if note.id == "ranks")


def test_module_outputs_are_not_joined_where_the_batches_are_not_known(tmp_path: Path) -> None:
    def inside(step: int, rank: int) -> list[Row]:
        # One position, of the second row of the batch: as --what forward without batch leaves it.
        at = tensor(Phase.FORWARD, step, POSITIONS, np.array([[1, 3]]))
        output = tensor(Phase.FORWARD, step, "model.norm", np.full((1, 4), rank, np.float32))
        return [Row(Phase.FORWARD, step, 0, (at, output))]

    run(tmp_path / "run.h5", extra=inside)
    with open_trace(tmp_path / "run.h5") as opened:
        assert isinstance(opened, RankTrace)
        view = opened.view(order=Order.INTERLEAVED, joined=True)
        whole_row = row(view, Phase.FORWARD, 1, 0)
        assert whole_row.read(0).tolist() == [[2, 3], [3, 3]]
        for member in opened.members:
            member._rows = {key: one for key, one in member._rows.items() if key[0] is not Phase.BATCH}
            member.__dict__.pop("_numbers", None)
        blind = row(opened.view(order=Order.INTERLEAVED, joined=True), Phase.FORWARD, 1, 0)
        assert [blind.state(i) for i in range(2)] == [State.UNRECORDED] * 2


def test_micro_batch_numbers_are_looked_up_and_not_searched_for(tmp_path: Path) -> None:
    with open_trace(write(tmp_path / "run.h5", -1)) as opened:
        looks = 0

        class Rows(dict[Any, RowView]):
            def __iter__(self) -> Any:
                nonlocal looks
                looks += 1
                return super().__iter__()

        opened._rows = Rows(opened._rows)
        found = [opened.micro_batches(phase, step) for step in opened.steps for phase in Phase]
        assert found.count((0, 1)) == 2 * STEPS
        assert looks == 1


def test_an_error_while_a_row_is_made_is_not_a_row_that_is_missing() -> None:
    def make() -> RowView:
        raise KeyError("inside")

    rows = LazyRows([((Phase.GRAD, 1, WHOLE_STEP), make)])
    assert (Phase.GRAD, 1, WHOLE_STEP) in rows
    assert rows.get((Phase.GRAD, 2, WHOLE_STEP)) is None
    with pytest.raises(KeyError, match="inside"):
        rows.get((Phase.GRAD, 1, WHOLE_STEP))


def test_ranks_that_pad_to_different_lengths_are_joined_at_the_longest(tmp_path: Path) -> None:
    def pad(row_: Row, rank: int) -> Row:
        if row_.phase is not Phase.BATCH or rank == 0:
            return row_
        ids = tokens(row_.step, rank)[:, :4]
        labels = np.where(ids > 25, ids, -100)
        return replace(
            row_,
            records=(tensor(Phase.BATCH, row_.step, "input_ids", ids), Record("labels", labels, "int64", ids.shape)),
        )

    def label(row_: Row, rank: int) -> Row:
        if row_.phase is Phase.BATCH and rank == 0:
            return replace(row_, records=(*row_.records, Record("labels", tokens(row_.step, 0), "int64", (2, 6))))
        return pad(row_, rank)

    run(tmp_path / "run.h5", label)
    with open_trace(tmp_path / "run.h5") as opened:
        assert isinstance(opened, RankTrace)
        joined = row(opened.view(order=Order.BY_RANK, joined=True), Phase.BATCH, 1, 0)
        ids, labels = joined.read(0), joined.read(1)
        assert ids.shape == labels.shape == (4, 6)
        assert np.array_equal(ids[:2], tokens(1, 0))
        assert np.array_equal(ids[2:, :4], tokens(1, 1)[:, :4])
        assert (ids[2:, 4:] == 0).all()
        assert (labels[2:, 4:] == -100).all()


def test_ranks_that_are_fed_the_same_batches_count_once_and_that_is_said(tmp_path: Path) -> None:
    def same(row_: Row, _: int) -> Row:
        records = (tensor(Phase.BATCH, row_.step, "input_ids", tokens(row_.step, 0)),)
        if row_.phase is Phase.LOSS:
            records = (tensor(Phase.LOSS, row_.step, "loss", np.array(3.0, np.float32)),)
        return replace(row_, records=records) if row_.phase.per_micro_batch else row_

    run(tmp_path / "run.h5", same)
    one = write(tmp_path / "one.h5", 0, edit=same).rename(tmp_path / "single.h5")
    result = diff(one, tmp_path / "run.h5")
    assert result.verdict is Verdict.SAME, result.findings
    assert "all given the same batches" in next(note.summary for note in result.notes if note.id == "ranks")


# Gradients that the program averages itself.


def local(step: int, rank: int) -> np.ndarray[Any, Any]:
    """A rank's gradient before the exchange; the mean over the ranks is `whole`."""
    shift = np.random.default_rng([step, 5]).normal(size=WEIGHT) * (1 - 2 * rank)
    return (whole(step, "w", Phase.GRAD) + shift).astype(np.float32)


def write_local(path: Path, given: Callable[[int, int], np.ndarray[Any, Any]]) -> Path:
    """Ranks with local gradients whose optimizers get `given(step, rank)`."""

    def edit(row_: Row, rank: int) -> Row:
        if row_.phase is not Phase.GRAD:
            return row_
        return replace(row_, records=(tensor(Phase.GRAD, row_.step, "w", local(row_.step, rank)),))

    def extra(step: int, rank: int) -> list[Row]:
        record = tensor(Phase.CLIPPED_GRAD, step, "w", given(step, rank).astype(np.float32))
        return [Row(Phase.CLIPPED_GRAD, step, WHOLE_STEP, (record,))]

    return run(path, edit, extra=extra)


def mean(step: int, _: int) -> np.ndarray[Any, Any]:
    return (local(step, 0).astype(np.float64) + local(step, 1)) / 2


@pytest.mark.parametrize("factor", [1.0, 0.25], ids=["as it is", "clipped"])
def test_local_gradients_whose_mean_the_optimizer_got_are_that_mean(tmp_path: Path, factor: float) -> None:
    with open_trace(write_local(tmp_path / "run.h5", lambda step, rank: factor * mean(step, rank))) as opened:
        grad = row(opened, Phase.GRAD, 1)
        assert grad.drifts == ()
        assert np.array_equal(grad.read(0), mean(1, 0).astype(np.float32))
        assert not list(opened.drifts())


def test_local_gradients_may_have_another_dtype_than_what_the_optimizer_got(tmp_path: Path) -> None:
    def half(step: int, rank: int) -> np.ndarray[Any, Any]:
        return float32_to_bf16(local(step, rank))

    def edit(row_: Row, rank: int) -> Row:
        record = Record("w", half(row_.step, rank), "bfloat16", WEIGHT)
        return replace(row_, records=(record,)) if row_.phase is Phase.GRAD else row_

    def extra(step: int, _: int) -> list[Row]:
        exact = sum(bf16_to_float32(half(step, rank)) for rank in range(WORLD)) / np.float32(WORLD)
        return [Row(Phase.CLIPPED_GRAD, step, WHOLE_STEP, (tensor(Phase.CLIPPED_GRAD, step, "w", exact),))]

    with open_trace(run(tmp_path / "run.h5", edit, extra=extra)) as opened:
        assert row(opened, Phase.GRAD, 1).drifts == ()


def test_local_gradients_that_the_program_adds_up_are_their_sum(tmp_path: Path) -> None:
    with open_trace(write_local(tmp_path / "run.h5", lambda step, rank: 2 * mean(step, rank))) as opened:
        assert np.array_equal(row(opened, Phase.GRAD, 1).read(0), (2 * mean(1, 0)).astype(np.float32))


@pytest.mark.parametrize(
    "given",
    [local, lambda step, _: whole(step, "w", Phase.PARAM)],
    ids=["each its own", "something else"],
)
def test_gradients_that_differ_and_are_not_averaged_are_drift(
    tmp_path: Path, given: Callable[[int, int], np.ndarray[Any, Any]]
) -> None:
    with open_trace(write_local(tmp_path / "run.h5", given)) as opened:
        found = [(row_.step, row_.phase, drift.name, drift.rank) for row_, drift in opened.drifts()]
        assert found[0] == (1, Phase.GRAD, "w", 1)


# Drift.


def doubled(record: Record) -> Record:
    assert record.data is not None
    return replace(record, data=record.data * np.float32(2))


def test_a_replica_that_drifts_is_a_finding_with_its_rank_and_address(tmp_path: Path) -> None:
    run(tmp_path / "run.h5", change(Phase.PARAM, 2, 1, doubled))
    result = diff(write(tmp_path / "one.h5", -1), tmp_path / "run.h5")
    assert result.first is not None
    assert result.first.kind is Kind.REPLICA
    assert (result.first.step, result.first.phase, result.first.name) == (2, "param", "w")
    assert "b: rank 1 and rank 0" in result.first.detail
    assert "holds 2 times as much" in result.first.detail
    assert len(result.findings) == 1
    mirrored = diff(tmp_path / "run.h5", tmp_path / "one.h5")
    assert mirrored.first is not None
    assert "a: rank 1 and rank 0" in mirrored.first.detail
    checked = trace("check", tmp_path / "run.h5")
    assert checked.returncode == 2
    assert "step 2, param, w: rank 1 differs from rank 0" in checked.stdout
    assert "DRIFTED" in checked.stdout


def test_the_same_drift_on_both_sides_is_a_note(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        run(tmp_path / name, change(Phase.PARAM, 2, 1, doubled))
    result = diff(tmp_path / "a.h5", tmp_path / "b.h5")
    assert result.verdict is Verdict.SAME, result.findings
    assert "ranks.drift" in {note.id for note in result.notes}


def test_ranks_that_agree_are_whole(tmp_path: Path) -> None:
    run(tmp_path / "run.h5")
    checked = trace("check", tmp_path / "run.h5")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.startswith("WHOLE")
    assert "  ranks         2\n" in trace("show", tmp_path / "run.h5").stdout


def test_of_a_rank_that_was_killed_the_steps_that_all_have_are_compared_and_it_is_said(tmp_path: Path) -> None:
    run(tmp_path / "run.h5")
    write(tmp_path / "run.h5", 1, steps=1, finished=False)
    result = diff(write(tmp_path / "one.h5", -1), tmp_path / "run.h5")
    assert result.verdict is Verdict.SAME, result.findings
    assert result.counts.steps == 1
    summary = next(note.summary for note in result.notes if note.id == "unfinished")
    assert "b is unfinished: ends after step 1 (rank 1 ends after step 1: killed)" in summary
    assert trace("check", tmp_path / "run.h5").returncode == 2


# Which process is which.


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, Place(1, 2, 1)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, Place(3, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
        ({}, None),
    ],
)
def test_the_launcher_says_which_rank_a_process_is(variables: dict[str, str], expected: Place | None) -> None:
    assert place(variables) == expected


def test_mlx_launch_says_it_in_a_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    assert place({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}) == Place(1, 2)
    assert place({"MLX_RANK": "1", "MLX_HOSTFILE": str(tmp_path / "none")}) is None


def test_a_rank_writes_beside_the_name_that_was_asked_for() -> None:
    assert Place(1, 2).file("out/run.h5") == Path("out/run.rank1.h5")
    assert Place(1, 2, 3).file("run.h5") == Path("run.restart3.rank1.h5")
    assert split_rank(Path("out/run.rank12.h5")) == (Path("out/run.h5"), 12)
    assert split_rank(Path("run.h5")) is None


# Reaching children.


def test_old_files_of_ranks_are_in_the_way_and_force_removes_all_of_them(tmp_path: Path) -> None:
    run(tmp_path / "run.h5")
    write(tmp_path / "run.h5", 7, world=8)
    with pytest.raises(BadUsage, match="exists already"), children_recorded(tmp_path / "run.h5", {}):
        pass
    before = dict(os.environ)
    with children_recorded(tmp_path / "run.h5", {"overwrite": True}):
        assert os.environ[TASK]
        assert not list(tmp_path.iterdir())
    assert dict(os.environ) == before


def test_force_removes_attempts_after_a_failure_and_no_other_run(tmp_path: Path) -> None:
    mine = ["run.restart1.rank0.h5", "run.restart12.rank1.h5"]
    others = ["run.restart-try.rank0.h5", "run.restart1.rank0.npz", "run2.rank0.h5", "run.restart1.h5"]
    for name in (*mine, *others):
        (tmp_path / name).write_bytes(b"")
    with children_recorded(tmp_path / "run.h5", {"overwrite": True}):
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(others)


LAUNCHER = """
import sys
from pathlib import Path
from tests.tracer.ranks import run
run(Path("run.h5"), finished=False)
raise KeyboardInterrupt
"""


def test_a_launcher_that_is_interrupted_leaves_the_traces_of_its_ranks(tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    done = trace("record", "-o", "run.h5", "--", "python", "launcher.py", cwd=tmp_path)
    assert "wrote run.rank0.h5, run.rank1.h5: 3 steps" in done.stderr
    assert done.returncode == 130
    with open_trace(tmp_path / "run.h5") as opened:
        assert opened.last_step == STEPS


IDLE = """
from pathlib import Path
from tests.tracer.ranks import write
write(Path("run.h5"), 0)
"""


def test_a_rank_that_makes_no_step_leaves_the_files_of_the_others_alone(tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text(
        "from pathlib import Path\nfrom tests.tracer.ranks import write\nwrite(Path('run.h5'), 0)\n"
    )
    done = trace(
        "record", "--fingerprint", "-o", "run.h5", "--", "python", "idle.py", cwd=tmp_path, RANK="1", WORLD_SIZE="2"
    )
    assert done.returncode == 2
    assert (tmp_path / "run.rank0.h5").exists()
    assert "without an optimizer step" in done.stderr


def child(code: str, *flags: str, **variables: str) -> str:
    """What a Python prints that is started under the task."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    )
    return done.stdout + done.stderr


LOOK = f"""
import os, sys
print({TASK!r} in os.environ, os.environ.get({SEARCH_PATH!r}, ''), [p for p in sys.path if 'injected' in p])
"""


def test_a_rank_sees_nothing_of_us_in_its_environment_and_neither_do_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SEARCH_PATH, str(tmp_path))
    with children_recorded(tmp_path / "run.h5", {}):
        assert child(LOOK, RANK="0", WORLD_SIZE="2").split() == ["False", str(tmp_path), "[]"]
        # One without a rank keeps the task for the ranks that it may start.
        assert child(LOOK).split()[0] == "True"
        assert child(LOOK).split()[-1] == "[]"
        assert child("print('ran')", "-I", RANK="0", WORLD_SIZE="2") == "ran\n"
    assert not list(tmp_path.glob("*.h5"))


def test_a_sitecustomize_that_is_there_already_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    monkeypatch.setenv(SEARCH_PATH, str(tmp_path))
    with children_recorded(tmp_path / "run.h5", {}):
        for variables in ({}, {"RANK": "1", "WORLD_SIZE": "2"}):
            shown = child("import sitecustomize; print(sitecustomize.__file__)", **variables).split()
            assert shown == ["theirs", str(tmp_path / "sitecustomize.py")]


def test_a_task_that_cannot_be_read_leaves_the_run_alone(tmp_path: Path) -> None:
    with children_recorded(tmp_path / "run.h5", {}):
        shown = child("print('ran')", RANK="0", WORLD_SIZE="2", **{TASK: "nonsense"})
    assert "ran\n" in shown
    assert "this rank is not recorded" in shown
