"""Files that are not what they should be: one line, exit 2, never a traceback, never a wrong answer."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.tracer.rows import gradients, loss, one_of_each, references
from tracer.cli.check import check_trace
from tracer.errors import Damaged, NewerFormat, NoPermission, NotATrace, NotFound, TraceError
from tracer.reader import open_trace
from tracer.schema import Phase
from tracer.writer import TraceWriter


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "a.h5"
    writer = TraceWriter(path, env={"x": 1}, declared={"y": 2})
    writer.write_step(0, [one_of_each()])
    for step in range(1, 9):
        writer.write_step(step, [gradients(step), loss(step), references(step)], {"z": 3})
    writer.finish()
    return path


def read_everything(path: Path) -> int:
    """Every byte that a diff could look at; the number of records that were read."""
    with open_trace(path) as trace:
        result = check_trace(trace)
        if result.problems:
            raise Damaged(result.problems[0])
        return result.records


def test_a_missing_path_a_folder_and_an_unreadable_file(tmp_path: Path, sample: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        open_trace(tmp_path / "no.h5")
    with pytest.raises(NotFound, match="folder"):
        open_trace(tmp_path)
    shutil.copy(sample, tmp_path / "b.h5")
    (tmp_path / "b.h5").chmod(0)
    if os.access(tmp_path / "b.h5", os.R_OK):
        # The superuser reads everything: ask as somebody else.
        code = "import os; from tracer.reader import open_trace; os.setgid(65534); os.setuid(65534); "
        code += f"open_trace({str(tmp_path / 'b.h5')!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "tracer.errors.NoPermission" in done.stderr
    else:
        with pytest.raises(NoPermission):
            open_trace(tmp_path / "b.h5")


def test_names_that_no_file_can_have_and_folders_that_may_not_be_searched(tmp_path: Path, sample: Path) -> None:
    for name in ("x" * 300 + ".h5", "a**b.h5", "[.h5"):
        with pytest.raises(NotFound):
            open_trace(tmp_path / name)
    (tmp_path / "closed").mkdir()
    shutil.copy(sample, tmp_path / "closed" / "b.h5")
    for mode, opened in ((0o600, "closed/b.h5"), (0o100, "closed"), (0o400, "closed")):
        # In a process of its own, as somebody whom the folder is closed to.
        code = "import os; from tracer.reader import open_trace; os.getuid() or os.setuid(65534); "
        code += f"open_trace({opened!r})"
        tmp_path.chmod(0o755)
        (tmp_path / "closed").chmod(mode | mode >> 6)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert "\ntracer.errors." in done.stderr, done.stderr
    (tmp_path / "closed").chmod(0o700)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("hello\n" * 100)
    with pytest.raises(NotATrace, match="not an HDF5 file"):
        open_trace(tmp_path / "text.h5")
    (tmp_path / "empty.h5").write_bytes(b"")
    with pytest.raises(NotATrace):
        open_trace(tmp_path / "empty.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(NotATrace, match="not a trace"):
        open_trace(tmp_path / "other.h5")


def test_check_of_a_file_that_cannot_be_opened_does_not_advise_itself(tmp_path: Path, sample: Path) -> None:
    path = tmp_path / "cut.h5"
    path.write_bytes(sample.read_bytes()[:20_000])
    done = subprocess.run([sys.executable, "-m", "tracer", "check", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nothing can be read of it; record it again [damaged]" in done.stderr
    with pytest.raises(Damaged) as caught:
        open_trace(path)
    assert "trace check" in caught.value.hint


def test_a_newer_format_is_refused_with_the_version_to_install(tmp_path: Path, sample: Path) -> None:
    path = tmp_path / "new.h5"
    shutil.copy(sample, path)
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = 99
        file.attrs["tool"] = "steptrace 9.1.0"
    with pytest.raises(NewerFormat) as caught:
        open_trace(path)
    assert "steptrace>=9.1.0" in caught.value.hint


def test_no_truncation_passes_for_a_whole_file(tmp_path: Path, sample: Path) -> None:
    whole = sample.read_bytes()
    path = tmp_path / "cut.h5"
    rng = random.Random(1)
    for offset in [rng.randrange(len(whole)) for _ in range(200)]:
        path.write_bytes(whole[:offset])
        with pytest.raises(TraceError):
            read_everything(path)


def test_a_flipped_byte_is_found_or_harmless(tmp_path: Path, sample: Path) -> None:
    whole = sample.read_bytes()
    expected = _contents(sample)
    path = tmp_path / "flip.h5"
    rng = random.Random(2)
    found = 0
    for offset in [rng.randrange(len(whole)) for _ in range(200)]:
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read_everything(path)
        except TraceError:
            found += 1
            continue
        # It read as whole, so it must be: the byte was in room that holds nothing.
        assert _contents(path) == expected, f"byte {offset}"
    assert found > 20


def test_every_flipped_byte_of_tensor_data_is_found(tmp_path: Path, sample: Path) -> None:
    with h5py.File(sample) as file:
        places = [file["grad/0/float32"].id.get_chunk_info_by_coord((row, 0)) for row in range(8)]
    whole = sample.read_bytes()
    path = tmp_path / "flip.h5"
    rng = random.Random(3)
    for place in places:
        damaged = bytearray(whole)
        damaged[place.byte_offset + rng.randrange(place.size)] ^= 0x10
        path.write_bytes(damaged)
        with open_trace(path) as trace:
            result = check_trace(trace)
        assert len(result.problems) == 1
        assert "does not match its digest" in result.problems[0]


def _contents(path: Path) -> dict[tuple[str, int, int, str], bytes]:
    contents = {}
    with open_trace(path) as trace:
        for row in trace.rows():
            for i, entry in enumerate(row.layout.entries):
                key = (row.phase.label, row.step, row.micro_batch, entry.name)
                contents[key] = row.digests[i].tobytes() + bytes([row.states[i]])
        contents["end", trace.last_step, int(trace.finished), ""] = b""
    return contents


KILLED = """
import sys
from tests.tracer.rows import gradients, loss, one_of_each, references
from tracer.writer import TraceWriter
writer = TraceWriter(sys.argv[1], env={}, declared={}, overwrite=True)
writer.write_step(0, [one_of_each()])
for step in range(1, 100000):
    writer.write_step(step, [gradients(step), loss(step), references(step)], {})
    print(step, flush=True)
"""


def test_no_committed_step_is_lost_to_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "killed.h5"
    rng = random.Random(4)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(rng.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().split("\n")
        process.stdout.close()
        process.wait()
        acknowledged = max(int(line) for line in lines if line.strip())
        with open_trace(path) as trace:
            assert not trace.finished
            assert trace.last_step in (acknowledged, acknowledged + 1)
            assert trace.steps == tuple(range(trace.last_step + 1))
            assert check_trace(trace).problems == ()
            row = trace.row(Phase.GRAD, acknowledged)
            assert row is not None
            np.testing.assert_array_equal(row.read(0), gradients(acknowledged).records[0].data)  # type: ignore[arg-type]


FULL = """
import resource, sys
from tests.tracer.rows import gradients, one_of_each
from tracer.errors import RecordingStopped
from tracer.writer import TraceWriter
writer = TraceWriter(sys.argv[1], env={}, declared={})
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    for step in range(100000):
        writer.write_step(step, [gradients(step, shape=(64, 64))])
except RecordingStopped as error:
    print(step, error)
writer.finish(finished=False, reason="no room")
"""


@pytest.mark.parametrize("limit", [4_500_000, 5_000_000, 6_200_001, 9_999_999])
def test_a_full_disk_leaves_a_whole_file(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "full.h5"
    done = subprocess.run([sys.executable, "-c", FULL, str(path), str(limit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stopped_at, _, message = done.stdout.partition(" ")
    assert "File too large" in message
    with open_trace(path) as trace:
        assert trace.last_step == int(stopped_at) - 1
        assert trace.end["reason"] == "no room"
        assert check_trace(trace).problems == ()
