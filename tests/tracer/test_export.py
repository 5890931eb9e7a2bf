"""Export and notebooks: curves, tensors of a step in every dtype, a summary that escapes, a table."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tracer
from tests.builders import make_trace
from tests.tracer.rows import one_of_each
from tracer import export, notebook
from tracer.dtypes import to_numpy
from tracer.errors import BadUsage, PackageMissing
from tracer.reader import open_trace
from tracer.schema import Phase
from tracer.shrink import shrink
from tracer.writer import TraceWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A trace with every dtype and state, and settings that want to be markup."""
    writer = TraceWriter(tmp_path / "odd.h5", env={}, declared={"<b>name</b>": "<script>alert(1)</script>"})
    writer.write_step(0, [one_of_each()])
    writer.finish()
    return tmp_path / "odd.h5"


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracer", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_curves_are_losses_norms_and_settings_of_every_step(tmp_path: Path) -> None:
    path = make_trace(tmp_path / "a.h5", lr=0.25)
    with open_trace(path) as trace:
        points = list(export.scalars(trace))
        by_tag = {tag: [p.value for p in points if p.tag == tag] for tag in {p.tag for p in points}}
        assert by_tag["hparams/group0.lr"] == [0.25] * 3
        row, losses = trace.row(Phase.GRAD, 2), [trace.row(Phase.LOSS, 2, m) for m in (0, 1)]
        assert row is not None
        expected = np.sqrt(sum(float((row.read(i).astype(np.float64) ** 2).sum()) for i in range(row.layout.records)))
        assert by_tag["norm/grad"][1] == pytest.approx(expected)
        assert by_tag["loss"][1] == pytest.approx(np.mean([float(loss.read(0)) for loss in losses if loss is not None]))
        assert len(by_tag["eval/score"]) == 3
        shrink(trace, tmp_path / "fp.h5")
    with open_trace(tmp_path / "fp.h5") as fingerprint:
        assert list(export.scalars(fingerprint)) == points


def test_without_a_writer_of_tensorboards_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with open_trace(make_trace(tmp_path / "a.h5")) as trace, pytest.raises(PackageMissing) as error:
        export.to_tensorboard(trace, tmp_path / "runs")
    assert "pip install tensorboardX" in error.value.hint


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX is not installed")
def test_tensorboardx_writes_every_point(tmp_path: Path) -> None:
    with open_trace(make_trace(tmp_path / "a.h5")) as trace:
        assert export.to_tensorboard(trace, tmp_path / "runs") == len(list(export.scalars(trace)))
    assert any(path.name.startswith("events.out.tfevents") for path in (tmp_path / "runs").iterdir())


def test_the_writer_gets_tag_value_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "runs")

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            got.append((tag, value, step))

        def close(self) -> None:
            got.append(("closed", 0.0, 0))

    module = type(sys)("tensorboardX")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with open_trace(make_trace(tmp_path / "a.h5")) as trace:
        points = list(export.scalars(trace))
        assert export.to_tensorboard(trace, tmp_path / "runs") == len(points)
    assert got == [(p.tag, p.value, p.step) for p in points] + [("closed", 0.0, 0)]


def test_npz_holds_the_numbers_in_canonical_layout_and_bfloat16_as_float32(odd: Path, tmp_path: Path) -> None:
    with open_trace(odd) as trace:
        row = next(trace.rows())
        count = export.to_file(trace, tmp_path / "x.npz", phase=Phase.INIT, step=0)
        loaded = np.load(tmp_path / "x.npz")
        assert set(loaded.files) == {"turned", "half", "brain", "scalar", "nothing", "zeros", "flags"}
        assert count == len(loaded.files)
        for name in loaded.files:
            i = row.layout.positions[name]
            np.testing.assert_array_equal(loaded[name], to_numpy(row.read(i), row.layout.entries[i].dtype))
        assert loaded["turned"].shape == (3, 6)
        assert loaded["brain"].dtype == np.float32


def test_safetensors_keeps_bfloat16_to_the_bit(odd: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "x.safetensors"
    with open_trace(odd) as trace:
        row = next(trace.rows())
        export.to_file(trace, path, phase=Phase.INIT, step=0)
        read = dict(safetensors.deserialize(path.read_bytes()))
        assert read["brain"]["dtype"] == "BF16"
        for name, tensor in read.items():
            i = row.layout.positions[name]
            assert bytes(tensor["data"]) == row.read(i).tobytes()
            assert tuple(tensor["shape"]) == row.layout.entries[i].shape
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["__metadata__"]["phase"] == "init"


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    path = make_trace(tmp_path / "a.h5")
    with open_trace(path) as trace:
        for options, word in (
            ({"phase": Phase.BATCH, "step": 1}, "micro-batches"),
            ({"phase": Phase.BATCH, "step": 1, "micro_batch": 9}, "no micro-batch 9"),
            ({"phase": Phase.PARAM, "step": 9}, "no param at step 9"),
        ):
            with pytest.raises(BadUsage, match=word):
                export.to_file(trace, tmp_path / "x.npz", **options)  # type: ignore[arg-type]
        with pytest.raises(BadUsage, match="neither"):
            export.to_file(trace, tmp_path / "x.txt", phase=Phase.PARAM, step=1)
        shrink(trace, tmp_path / "fp.h5")
    with open_trace(tmp_path / "fp.h5") as trace, pytest.raises(BadUsage, match="holds no tensor"):
        export.to_file(trace, tmp_path / "x.npz", phase=Phase.PARAM, step=1)


def test_the_command_exports_a_step_and_overwrites_nothing_unasked(tmp_path: Path) -> None:
    path = make_trace(tmp_path / "a.h5")
    output = tmp_path / "x.safetensors"
    assert run(path, "--step", 2, "-o", output).returncode == 0
    assert b"lora_A" in output.read_bytes()
    assert run(path, "--step", 2, "-o", output).returncode == 2
    assert run(path, "--step", 2, "--phase", "batch", "--micro-batch", 1, "-o", tmp_path / "b.npz").returncode == 0
    for bad in (["--phase", "grad"], ["--step", 1], ["--step", 1, "--phase", "grads", "-o", tmp_path / "y.npz"]):
        done = run(path, *bad)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


def test_a_notebook_shows_a_trace_and_escapes_what_is_in_it(odd: Path, tmp_path: Path) -> None:
    with tracer.open(odd) as trace:
        text = trace._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<b>name" not in text
    assert trace._repr_html_() == "<p>a closed trace</p>"
    with tracer.open(make_trace(tmp_path / "a.h5", steps=15, finished=False)) as trace:
        text = trace._repr_html_()
        assert repr(trace) == "<Trace a.h5: steps 0 to 15, unfinished>"
    assert repr(trace) == "<Trace a.h5: closed>"
    assert "UNFINISHED: killed" in text
    assert "… 3 more steps" in text


def test_a_table_has_one_line_a_record_with_its_statistics(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    with tracer.open(make_trace(tmp_path / "a.h5")) as trace:
        table = trace.to_dataframe()
        assert len(table) == sum(row.layout.records for row in trace.rows())
        grads = table[(table.phase == "grad") & (table.step == 2)]
        row = trace.row(Phase.GRAD, 2)
        assert row is not None
        assert list(grads.l2) == [float(value) for value in row.stats[:, 0]]
        assert (table.phase <= "grad").any()
        assert set(table[table.phase == "batch"].micro_batch) == {0, 1}


def test_without_pandas_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with tracer.open(make_trace(tmp_path / "a.h5")) as trace, pytest.raises(PackageMissing, match="pandas"):
        notebook.dataframe(trace)
