"""The file cut off at every single write: what is committed must be there, whichever write was the last."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.tracer.rows import gradients, loss, one_of_each, references
from tracer import ordered
from tracer.errors import BadUsage, TraceError
from tracer.ordered import OrderedFile
from tracer.reader import Trace, open_trace
from tracer.schema import WHOLE_STEP, Phase, Record, Row
from tracer.writer import TraceWriter


@dataclass
class Tape:
    """Stands in for the module `os` below the file, and remembers each call that changes it."""

    calls: list[tuple[str, int, bytes]] = field(default_factory=list)
    commits: list[int] = field(
        default_factory=list
    )  # for each call, the last step that had been acknowledged before it
    acknowledged: int = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        self._keep("write", offset, bytes(data))
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        self._keep("length", size, b"")
        os.ftruncate(fd, size)

    def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        self._keep("length", offset + size, b"")
        os.posix_fallocate(fd, offset, size)

    def _keep(self, kind: str, at: int, data: bytes) -> None:
        self.calls.append((kind, at, data))
        self.commits.append(self.acknowledged)

    def cuts(self) -> Iterator[tuple[int, bytearray]]:
        """After each call: the last acknowledged step, and the file."""
        file = bytearray()
        for (kind, at, data), acknowledged in zip(self.calls, self.commits, strict=True):
            if kind == "length":
                file[at:] = b""
                file.extend(bytes(at - len(file)))
            else:
                assert at + len(data) <= len(file)
                file[at : at + len(data)] = data
            yield acknowledged, file


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    tape = Tape()
    monkeypatch.setattr(ordered, "os", tape)
    return tape


def value(phase: Phase, step: int, *names: str) -> Row:
    """A row of one number a name."""
    records = tuple(Record(name, np.array(step, np.float32), "float32", ()) for name in names)
    return Row(phase, step, WHOLE_STEP, records)


def everything(step: int) -> Sequence[Row]:
    """Rows whose layouts change now and then, so that groups, indices and lists of names all grow."""
    odd = [value(Phase.HPARAMS, step, f"lr{step}")] if step % 5 == 0 else []
    micro_batches = [loss(step, i) for i in range(2 if step % 3 else 1)]
    return [gradients(step, count=2, shape=(2, 2)), references(step, count=2, shape=(2, 2)), *micro_batches, *odd]


def record(path: Path, tape: Tape, steps: int) -> None:
    writer = TraceWriter(path, env={"x": 1}, declared={"y": 2})
    writer.write_step(0, [one_of_each()])
    for step in range(1, steps):
        writer.write_step(step, everything(step), {"z": 3})
        tape.acknowledged = step
        if step % 20 == 0:
            writer.write_step(step, [value(Phase.EVAL, step, "eval_loss")])
            writer.rewrite_step(step - 1, [gradients(step - 1, count=2, shape=(2, 2))])
    writer.finish()


def failures(tape: Tape, path: Path, chosen: set[int]) -> list[str]:
    """What is wrong with the file after each of the chosen calls, by number."""
    found = []
    for number, (acknowledged, content) in enumerate(tape.cuts()):
        if acknowledged < 1 or number not in chosen:
            continue
        path.write_bytes(content)
        try:
            with open_trace(path) as trace:
                assert trace.last_step in (acknowledged, acknowledged + 1)
                assert trace.steps == tuple(range(trace.last_step + 1))
                read_some(trace)
        except (TraceError, AssertionError) as error:
            found.append(f"write {number}, after step {acknowledged}: {error}")
    return found


def read_some(trace: Trace) -> None:
    """Rows of every layout from one end to the other, and the documents; what is read is verified."""
    by_layout: dict[Any, list[Any]] = {}
    for row in trace.rows():
        by_layout.setdefault(row.layout, []).append(row)
    for rows in by_layout.values():
        for row in {rows[0], *rows[1 :: len(rows) // 6 + 1], rows[-1]}:
            row.read(0)
    assert (trace.env, trace.declared) == ({"x": 1}, {"y": 2})
    trace.document("end")


METADATA = (b"TREE", b"SNOD", b"HEAP", b"\x01\x00")


def metadata_writes(tape: Tape, first: int, last: int) -> set[int]:
    """Numbers of the calls that change what HDF5 reads, between two steps."""
    return {
        number
        for number, ((kind, _, data), acknowledged) in enumerate(zip(tape.calls, tape.commits, strict=True))
        if first <= acknowledged < last and (kind == "length" or data.startswith(METADATA))
    }


def test_no_write_leaves_a_file_without_its_committed_steps(tmp_path: Path, tape: Tape) -> None:
    record(tmp_path / "a.h5", tape, steps=44)
    kinds = {data[:4] for _, _, data in tape.calls}
    assert {b"TREE", b"SNOD", b"HEAP"} <= kinds
    chosen = metadata_writes(tape, 4, 6) | metadata_writes(tape, 19, 21) | metadata_writes(tape, 30, 44)
    chosen |= set(range(len(tape.calls) - 12, len(tape.calls)))  # how it ends
    assert failures(tape, tmp_path / "cut.h5", chosen) == []


def test_in_the_order_of_addresses_steps_would_be_lost(
    tmp_path: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrderedFile, "_stages", lambda self: [dict(self._held)])
    record(tmp_path / "a.h5", tape, steps=44)
    assert failures(tape, tmp_path / "cut.h5", metadata_writes(tape, 30, 44))


def test_an_index_of_three_levels_is_whole_at_every_write(tmp_path: Path, tape: Tape) -> None:
    writer = TraceWriter(tmp_path / "a.h5", env={"x": 1}, declared={"y": 2})
    for step in range(4200):
        writer.write_step(step, [value(Phase.LOSS, step, "loss")])
        tape.acknowledged = step
    writer.finish()
    top = [i for i, (_, _, data) in enumerate(tape.calls) if data[:4] == b"TREE" and data[5] == 2]
    assert top  # an index has grown a third level
    around = set(range(top[0] - 12, top[0] + 12)) & metadata_writes(tape, 0, 4200)
    assert len(around) > 8
    assert failures(tape, tmp_path / "cut.h5", around) == []


def test_what_is_held_back_can_be_read_and_shadows_what_it_covers(tmp_path: Path) -> None:
    path = tmp_path / "a"
    file = OrderedFile(path, os.open(path, os.O_RDWR | os.O_CREAT))
    rng, model = random.Random(3), bytearray(400)
    file.truncate(400)
    for _ in range(300):
        at = rng.randrange(0, 390)
        block = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 400 - at)))
        file.seek(at)
        assert file.write(block) == len(block)
        model[at : at + len(block)] = block
        if rng.random() < 0.2:
            file.settle()
            assert path.read_bytes() == model
        start = rng.randrange(0, 390)
        file.seek(start)
        assert file.read(400 - start) == model[start:]
    file.close()


def test_hdf5_can_work_on_it_and_read_back_what_is_not_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    file = OrderedFile(path, os.open(path, os.O_RDWR | os.O_CREAT))
    with h5py.File(file, "w") as handle:
        handle["x"] = np.arange(5)
        handle.flush()
        assert path.stat().st_size == 0
        file.settle()
        with h5py.File(path, locking=False) as other:
            assert other["x"][2] == 2
        handle["y"] = np.arange(7)
        np.testing.assert_array_equal(handle["y"][...], np.arange(7))
    file.settle()
    file.close()
    with h5py.File(path) as handle:
        assert set(handle) == {"x", "y"}


def test_a_write_that_fails_is_told_and_never_crosses_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    file = OrderedFile(path, os.open(path, os.O_RDWR | os.O_CREAT))
    os.close(file._fd)
    with pytest.raises(OSError, match="Bad file descriptor"), file.direct():
        assert file.write(b"abc") == 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.put(0, b"abc")


def test_a_file_that_is_being_written_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    first = TraceWriter(path, env={}, declared={})
    first.write_step(0, [loss(0)])
    with pytest.raises(BadUsage, match="is being written by another run"):
        TraceWriter(path, env={}, declared={}, overwrite=True)
    first.write_step(1, [loss(1)])
    first.finish()
    with open_trace(path) as trace:
        assert trace.steps == (0, 1)
    TraceWriter(path, env={}, declared={}, overwrite=True).finish()


def test_a_trace_without_an_end_says_whether_somebody_is_still_writing_it(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writer = TraceWriter(path, env={}, declared={})
    writer.write_step(0, [loss(0)])
    with open_trace(path) as trace:
        assert trace.end["reason"] == "it is still being recorded"
    killed = tmp_path / "b.h5"
    killed.write_bytes(path.read_bytes())
    with open_trace(killed) as trace:
        assert (trace.finished, trace.end["reason"]) == (False, "the run was killed")
    writer.finish()
    with open_trace(path) as trace:
        assert (trace.finished, trace.end["reason"]) == (True, "")
