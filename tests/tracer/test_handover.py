"""Steps on their way to the file: bounded in bytes, none lost."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tracer import handover
from tracer.errors import RecordingStopped
from tracer.handover import bytes_held
from tracer.reader import open_trace
from tracer.recorder import Recorder, RecordOptions
from tracer.schema import WHOLE_STEP, Phase, Record, Row
from tracer.writer import TraceWriter

ELEMENTS = 10_000
BYTES = 4 * ELEMENTS


class Memory:
    """Arrays that were handed over, and how many bytes of them are still there."""

    def __init__(self) -> None:
        self._arrays: list[weakref.ref[np.ndarray]] = []
        self.most = 0

    def record(self, value: float, elements: int = ELEMENTS) -> Record:
        data = np.full(elements, value, np.float32)
        self._arrays.append(weakref.ref(data))
        return Record("w", data, "float32", data.shape)

    def look(self) -> None:
        """Note how much is there now."""
        self.most = max(self.most, sum(data.nbytes for ref in self._arrays if (data := ref()) is not None))


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.005) -> None:
    """A disk that takes its time."""
    write_step = TraceWriter.write_step

    def writing(writer: TraceWriter, step: int, rows: Sequence[Row], observed: Mapping[str, Any] | None = None) -> None:
        time.sleep(seconds)
        write_step(writer, step, rows, observed)

    monkeypatch.setattr(TraceWriter, "write_step", writing)


def record_steps(path: Path, memory: Memory, sizes: Sequence[int]) -> Recorder:
    recorder = Recorder(path, RecordOptions())
    recorder.end_step()
    for step, elements in enumerate(sizes, 1):
        recorder.add(Phase.GRAD, [memory.record(step, elements)])
        recorder.end_step()
        memory.look()
    recorder.close()
    return recorder


def values(path: Path) -> list[float]:
    """What each step holds; all of its elements are the same."""
    found = []
    with open_trace(path) as trace:
        assert trace.finished
        for step in trace.steps[1:]:
            row = trace.row(Phase.GRAD, step)
            assert row is not None
            data = row.read(0)
            assert np.all(data == data[0])
            found.append(float(data[0]))
    return found


@pytest.mark.parametrize("steps", [1, 3])
def test_a_slow_disk_makes_the_run_wait_and_the_memory_stays_within_its_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int
) -> None:
    slow(monkeypatch)
    monkeypatch.setattr(handover, "HANDED_BYTES", steps * BYTES)
    memory = Memory()
    record_steps(tmp_path / "a.h5", memory, [ELEMENTS] * 20)
    assert values(tmp_path / "a.h5") == list(range(1, 21))
    assert memory.most == steps * BYTES


def test_without_a_bound_in_bytes_the_same_run_holds_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow(monkeypatch)
    monkeypatch.setattr(handover, "HANDED_BYTES", 2**40)
    memory = Memory()
    record_steps(tmp_path / "a.h5", memory, [ELEMENTS] * 20)
    assert memory.most == handover.HANDED_STEPS * BYTES


def test_a_step_larger_than_the_bound_goes_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow(monkeypatch)
    monkeypatch.setattr(handover, "HANDED_BYTES", 2 * BYTES)
    memory = Memory()
    record_steps(tmp_path / "a.h5", memory, [ELEMENTS, ELEMENTS, 5 * ELEMENTS, ELEMENTS, 5 * ELEMENTS])
    assert values(tmp_path / "a.h5") == [1, 2, 3, 4, 5]
    assert memory.most == 5 * BYTES


def test_a_disk_that_fails_makes_nobody_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_step = TraceWriter.write_step

    def failing(writer: TraceWriter, step: int, rows: Sequence[Row], observed: Mapping[str, Any] | None = None) -> None:
        if step == 2:
            raise RecordingStopped("no space left")
        write_step(writer, step, rows, observed)

    monkeypatch.setattr(TraceWriter, "write_step", failing)
    monkeypatch.setattr(handover, "HANDED_BYTES", BYTES)
    recording = threading.Thread(target=record_steps, args=(tmp_path / "a.h5", Memory(), [ELEMENTS] * 20), daemon=True)
    recording.start()
    recording.join(20)
    assert not recording.is_alive()
    assert "no space left" in capsys.readouterr().err
    with open_trace(tmp_path / "a.h5") as trace:
        assert trace.steps == (0, 1)


def test_memory_that_records_share_is_counted_once_and_whole() -> None:
    flat = np.zeros(100, np.float32)
    views = [Record(str(i), flat[10 * i : 10 * i + 10], "float32", (10,)) for i in range(3)]
    own = Record("own", np.zeros(5), "float64", (5,))
    absent = Record("absent", None, "float32", (10,), alias_of="grad/0", stored=False)
    rows = [Row(Phase.GRAD, 1, WHOLE_STEP, (*views, own)), Row(Phase.CLIPPED_GRAD, 1, WHOLE_STEP, (absent,))]
    assert bytes_held(rows) == flat.nbytes + 40


@pytest.mark.parametrize("options", [{"only": ("w*",)}, {"omit": ("v*",)}])
def test_a_record_that_is_kept_does_not_keep_those_beside_it_in_memory(
    tmp_path: Path, options: dict[str, tuple[str, ...]]
) -> None:
    flat = np.arange(100, dtype=np.float32)
    gone = weakref.ref(flat)
    recorder = Recorder(tmp_path / "a.h5", RecordOptions(**options))  # type: ignore[arg-type]
    recorder.end_step()
    kept = Record("w", flat[:10], "float32", (10,))
    recorder.add(Phase.GRAD, [kept, Record("v", flat[10:], "float32", (90,))])
    del flat, kept
    assert gone() is None
    recorder.end_step()
    recorder.close()
    with open_trace(tmp_path / "a.h5") as trace:
        row = trace.row(Phase.GRAD, 1)
        assert row is not None
        assert row.layout.records == 1
        np.testing.assert_array_equal(row.read(0), np.arange(10))
