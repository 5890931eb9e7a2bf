"""The recorder: what reaches the file, and that nothing of it reaches the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tracer
from tracer.environment import scrub
from tracer.errors import BadUsage, NothingRecorded
from tracer.names import NameMap, parse_rules
from tracer.reader import Trace, open_trace
from tracer.recorder import Recorder, RecordOptions, make_record
from tracer.schema import Phase, Record, State


def values(name: str, size: int = 3) -> Record:
    return make_record(NameMap(), name, np.arange(1.0, size + 1, dtype=np.float32), "float32")


def record_steps(path: Path, count: int = 3, **options: object) -> Recorder:
    recorder = Recorder(path, RecordOptions(**options))  # type: ignore[arg-type]
    recorder.add(Phase.INIT, [values("w")])
    recorder.end_step()
    for _ in range(count):
        recorder.add(Phase.GRAD, [values("w"), values("v")])
        recorder.add(Phase.CLIPPED_GRAD, [reference("w"), reference("v")])
        recorder.end_step()
    return recorder


def reference(name: str) -> Record:
    data = np.arange(1.0, 4, dtype=np.float32)
    return Record(name, data, "float32", (3,), alias_of=f"grad/{name}", stored=False)


def names(trace: Trace, phase: Phase, step: int) -> list[str]:
    row = trace.row(phase, step)
    return [entry.name for entry in row.layout.entries] if row else []


def test_steps_arrive_in_order_with_step_zero_first(tmp_path: Path) -> None:
    record_steps(tmp_path / "a.h5").close()
    with open_trace(tmp_path / "a.h5") as trace:
        assert trace.steps == (0, 1, 2, 3)
        assert trace.finished


def test_only_the_wanted_phases_steps_and_names_are_kept(tmp_path: Path) -> None:
    record_steps(tmp_path / "a.h5", steps=(2, 2), only=("w",)).close()
    with open_trace(tmp_path / "a.h5") as trace:
        assert trace.steps == (0, 2)
        assert names(trace, Phase.GRAD, 2) == ["w"]
    record_steps(tmp_path / "b.h5", omit=("w",)).close()
    with open_trace(tmp_path / "b.h5") as trace:
        assert names(trace, Phase.GRAD, 1) == ["v"]


def test_a_reference_to_what_is_not_recorded_stands_for_itself(tmp_path: Path) -> None:
    record_steps(tmp_path / "a.h5", what=frozenset({Phase.INIT, Phase.CLIPPED_GRAD})).close()
    with open_trace(tmp_path / "a.h5") as trace:
        row = trace.row(Phase.CLIPPED_GRAD, 1)
        assert row is not None
        assert row.read(0).tolist() == [1, 2, 3]


def test_a_reference_without_data_to_what_is_not_recorded_is_unrecorded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.h5")
    recorder.end_step()
    recorder.add(Phase.CLIPPED_GRAD, [Record("w", None, "float32", (3,), alias_of="grad/w", stored=False)])
    recorder.end_step()
    recorder.close()
    with open_trace(tmp_path / "a.h5") as trace:
        row = trace.row(Phase.CLIPPED_GRAD, 1)
        assert row is not None
        assert row.state(0) is State.UNRECORDED


def test_an_error_in_a_hook_stops_the_recording_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = record_steps(tmp_path / "a.h5", count=2)
    with recorder.guard():
        raise RuntimeError("hook went wrong")
    assert not recorder.active
    recorder.end_step()
    recorder.close()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "recording stopped at step 3: RuntimeError: hook went wrong; the run goes on" in message
    with open_trace(tmp_path / "a.h5") as trace:
        assert trace.steps == (0, 1, 2)
        assert not trace.finished
        assert trace.end["reason"] == "RuntimeError: hook went wrong"


def test_a_run_without_an_optimizer_step_says_so(tmp_path: Path) -> None:
    recorder = record_steps(tmp_path / "a.h5", count=0)
    with pytest.raises(NothingRecorded, match="without an optimizer step"):
        recorder.close()


def test_logged_values_belong_to_the_last_complete_step(tmp_path: Path) -> None:
    recorder = record_steps(tmp_path / "a.h5", count=2)
    recorder.log("accuracy", 0.25)
    recorder.log("accuracy", 0.5)
    recorder.log("ids", [3, 4])
    recorder.close()
    with open_trace(tmp_path / "a.h5") as trace:
        assert trace.steps == (0, 1, 2)
        row = trace.row(Phase.EVAL, 2)
        assert row is not None
        assert {entry.name: row.read(i).tolist() for i, entry in enumerate(row.layout.entries)} == {
            "accuracy": 0.5,
            "ids": [3, 4],
        }


def test_logging_text_is_refused_and_recording_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = record_steps(tmp_path / "a.h5", count=1)
    recorder.log("text", "hello")
    assert "'text' is not recorded" in capsys.readouterr().err
    recorder.close()
    assert not recorder.failure


def test_logging_what_cannot_become_an_array_is_refused_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class OnDevice:
        def __array__(self, *_: object) -> None:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    recorder = record_steps(tmp_path / "a.h5", count=1)
    recorder.log("score", OnDevice())
    recorder.log("ragged", [[1.0], [1.0, 2.0]])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "trace: 'score' is not recorded: numbers are, OnDevice is not",
        "trace: 'ragged' is not recorded: numbers are, list is not",
    ]
    recorder.close()
    assert not recorder.failure


def test_calls_are_nothing_when_nothing_records() -> None:
    tracer.log("loss", 1.0)
    tracer.declare(alpha=16)


def test_two_recordings_at_once_are_refused(tmp_path: Path) -> None:
    outer = tracer.record(tmp_path / "a.h5")
    outer.__enter__()
    with pytest.raises(BadUsage, match="being recorded already"), tracer.record(tmp_path / "b.h5"):
        raise AssertionError("not reached")
    with pytest.raises(NothingRecorded):
        outer.__exit__(None, None, None)


def test_declared_settings_and_the_environment_are_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.h5")
    recorder.declare({"lora.alpha": 16})
    recorder.end_step()
    recorder.observe("compiled", True)
    recorder.observe("compiled", False)
    recorder.add(Phase.GRAD, [values("w")])
    recorder.end_step()
    recorder.close()
    with open_trace(tmp_path / "a.h5") as trace:
        assert trace.declared == {"lora.alpha": 16}
        assert trace.observed == {"compiled": True}
        assert {"python", "versions", "argv"} <= set(trace.env)


def test_no_secret_and_no_home_folder_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    arguments = ["/home/someone/train.py", "--token", "abc", "--api-key=def", "--lr", "1e-3", "hf_abcdefghijkl"]
    clean = scrub(arguments)
    assert clean == ["~/train.py", "--token", "***", "--api-key=***", "--lr", "1e-3", "***"]
    assert "someone" not in json.dumps(clean)


@pytest.mark.parametrize(
    ("original", "name", "transform"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
         "model.layers.3.self_attn.q_proj.lora_A.weight", ""),
        ("model.layers.3.self_attn.q_proj.lora_a", "model.layers.3.self_attn.q_proj.lora_A.weight", "T"),
        ("model.layers.3.mlp.down_proj.lora_b", "model.layers.3.mlp.down_proj.lora_B.weight", "T"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight", ""),
        ("model.layers.0.mlp.up_proj.linear.weight", "model.layers.0.mlp.up_proj.weight", ""),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight", ""),
        ("model.embed_tokens.embedding.weight", "model.embed_tokens.weight", ""),
    ],
)  # fmt: skip
def test_names_of_both_frameworks_meet_in_the_checkpoint_name(original: str, name: str, transform: str) -> None:
    canonical = NameMap()(original)
    assert (canonical.name, canonical.transform) == (name, transform)
    assert NameMap()(name) == NameMap()(canonical.name)
    assert NameMap()(name).name == name


def test_a_canonical_name_is_its_own_also_after_those_of_adapters() -> None:
    names = NameMap()
    factor = names("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight").name
    assert names(factor).name == factor


def test_the_second_adapters_copy_of_a_trained_module_has_a_name_of_its_own() -> None:
    names = NameMap()
    copies = [names(f"base_model.model.lm_head.modules_to_save.{adapter}.weight").name for adapter in ("a", "b", "a")]
    assert copies == ["lm_head.weight", "lm_head.weight#b", "lm_head.weight"]


def test_a_user_rule_comes_first_and_may_transpose() -> None:
    rules = parse_rules({r"^net\.": {"to": "model.", "transpose": True}, "^old$": "new"})
    assert NameMap(rules)("net.w").name == "model.w"
    record = make_record(NameMap(rules), "net.w", np.zeros((2, 5), np.float32), "float32")
    assert (record.shape, record.transform, record.original) == ((5, 2), "T", "net.w")
    with pytest.raises(ValueError, match="not a regular expression"):
        parse_rules({"(": "x"})
    with pytest.raises(ValueError, match="needs a replacement"):
        parse_rules({"x": 3})


def test_a_frozen_weight_is_read_before_the_run_can_change_it(tmp_path: Path) -> None:
    weight = np.ones(2_000_000, np.float32)
    frozen = make_record(NameMap(), "frozen", weight, "float32", stored=False)
    recorder = Recorder(tmp_path / "a.h5", RecordOptions())
    recorder.add(Phase.INIT, [values("w"), frozen])
    recorder.end_step()
    weight += 1.0  # unfrozen and trained, as soon as the run goes on
    recorder.add(Phase.GRAD, [values("w")])
    recorder.end_step()
    recorder.close()
    with open_trace(tmp_path / "a.h5") as trace:
        row = trace.row(Phase.INIT, 0)
        assert row is not None
        assert row.stats[row.layout.positions["frozen"], 2] == 1.0
