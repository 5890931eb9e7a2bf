"""`trace diff` on the command line: exit codes, options, manners."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from differ.command import diff
from tests.builders import make_trace
from tracer.errors import BadConfig, BadUsage, NotFound


@pytest.fixture
def traces(tmp_path: Path) -> dict[str, str]:
    return {
        "a": str(make_trace(tmp_path / "a.h5")),
        "same": str(make_trace(tmp_path / "same.h5")),
        "lr": str(make_trace(tmp_path / "lr.h5", fault="lr")),
        "late": str(make_trace(tmp_path / "late.h5", fault="grad_element")),
        "renamed": str(
            make_trace(tmp_path / "renamed.h5", names=lambda name: name.replace("model.layers", "net.blocks"))
        ),
    }


def run(*arguments: str) -> Result:
    return CliRunner().invoke(diff, list(arguments))


def test_the_exit_code_is_the_verdict(traces: dict[str, str]) -> None:
    assert run(traces["a"], traces["same"]).exit_code == 0
    assert run(traces["a"], traces["lr"]).exit_code == 1
    assert run(traces["a"], traces["lr"], "--only", "nothing").exit_code == 2


def test_exit_zero_turns_a_divergence_into_success_and_nothing_else(traces: dict[str, str]) -> None:
    assert run(traces["a"], traces["lr"], "--exit-zero").exit_code == 0
    assert run(traces["a"], traces["lr"], "--exit-zero", "--only", "nothing").exit_code == 2


def test_the_first_line_is_the_verdict(traces: dict[str, str]) -> None:
    assert run(traces["a"], traces["same"]).output.startswith("SAME  3 steps")
    assert run(traces["a"], traces["lr"]).output.startswith("DIVERGED at step 1, hparams, group0.lr")
    assert run(traces["a"], traces["lr"], "--only", "nothing").output.startswith("INCOMPARABLE")


def test_quiet_prints_nothing(traces: dict[str, str]) -> None:
    result = run(traces["a"], traces["lr"], "-q")
    assert (result.exit_code, result.output) == (1, "")


def test_json_is_the_result_and_nothing_else(traces: dict[str, str]) -> None:
    document = json.loads(run(traces["a"], traces["lr"], "--format", "json").output)
    assert document["verdict"] == "diverged"
    assert document["first"]["name"] == "group0.lr"


def test_steps_narrow_the_comparison(traces: dict[str, str]) -> None:
    assert run(traces["a"], traces["late"], "--steps", ":1").exit_code == 0
    assert run(traces["a"], traces["late"], "--steps", "2").exit_code == 1
    assert run(traces["a"], traces["late"], "--steps", "2:").exit_code == 1
    assert run(traces["a"], traces["late"], "--steps", "7:9").exit_code == 2


def test_phases_narrow_the_report(traces: dict[str, str]) -> None:
    assert run(traces["a"], traces["lr"], "--phases", "init,batch").exit_code == 0
    assert run(traces["a"], traces["lr"], "--phases", "hparams").exit_code == 1
    # Where the divergence starts is left out, what comes of it is not.
    assert run(traces["a"], traces["lr"], "--phases", "grad,param").exit_code == 1


def test_names_narrow_the_comparison(traces: dict[str, str]) -> None:
    assert run(traces["a"], traces["lr"], "--omit", "group0.lr").exit_code == 0
    assert run(traces["a"], traces["lr"], "--only", "group0.*").exit_code == 1
    assert run(traces["a"], traces["lr"], "--only", "*.lora_B.*").exit_code == 0


def test_a_map_lines_up_names(traces: dict[str, str], tmp_path: Path) -> None:
    rules = tmp_path / "map.toml"
    rules.write_text('[names]\n"^net\\\\.blocks\\\\." = "model.layers."\n')

    assert run(traces["a"], traces["renamed"]).exit_code == 1
    assert run(traces["a"], traces["renamed"], "--map", str(rules)).exit_code == 0


def test_a_map_can_transpose(tmp_path: Path) -> None:
    import numpy as np

    from tracer.schema import Row

    def transpose(row: Row) -> Row:
        from dataclasses import replace

        records = []
        for record in row.records:
            factor = ".lora_A.weight" in record.name
            name = record.name.replace(".lora_A.weight", ".lora_A.T")
            alias = record.alias_of.replace(".lora_A.weight", ".lora_A.T")
            if factor and record.data is not None:
                data = np.ascontiguousarray(record.data.T)
                record = replace(record, data=data, shape=data.shape)
            elif factor:
                record = replace(record, shape=record.shape[::-1])
            records.append(replace(record, name=name, alias_of=alias))
        return replace(row, records=tuple(records))

    rules = tmp_path / "map.toml"
    rules.write_text('[names]\n"lora_A\\\\.T$" = { to = "lora_A.weight", transpose = true }\n')
    a = make_trace(tmp_path / "a.h5")
    b = make_trace(tmp_path / "b.h5", noise=3e-7, edit=transpose)

    result = run(str(a), str(b), "--map", str(rules))

    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("text", ["x", "5:1", "-3", "1:2:3"])
def test_a_range_that_means_nothing_is_refused(text: str, traces: dict[str, str]) -> None:
    assert isinstance(run(traces["a"], traces["a"], "--steps", text).exception, BadUsage)


def test_an_unknown_phase_is_refused(traces: dict[str, str]) -> None:
    assert isinstance(run(traces["a"], traces["a"], "--phases", "grads").exception, BadUsage)


@pytest.mark.parametrize("text", ["[[", "[other]\n", '[names]\n"[" = "x"\n', "[names]\nx = 3\n"])
def test_a_map_that_means_nothing_is_refused(text: str, traces: dict[str, str], tmp_path: Path) -> None:
    rules = tmp_path / "map.toml"
    rules.write_text(text)
    assert isinstance(run(traces["a"], traces["a"], "--map", str(rules)).exception, BadConfig)


def test_two_names_made_one_by_a_map_are_refused(traces: dict[str, str], tmp_path: Path) -> None:
    rules = tmp_path / "map.toml"
    rules.write_text('[names]\n"layers\\\\.\\\\d+" = "layer"\n')
    assert isinstance(run(traces["a"], traces["lr"], "--map", str(rules)).exception, BadConfig)


def test_a_missing_file_is_an_error_of_the_tool(traces: dict[str, str], tmp_path: Path) -> None:
    assert isinstance(run(traces["a"], str(tmp_path / "none.h5")).exception, NotFound)


def test_every_option_is_described() -> None:
    assert all(option.help for option in diff.params if isinstance(option, click.Option))


def test_no_framework_and_no_rich_is_imported_and_no_colour_reaches_a_pipe(traces: dict[str, str]) -> None:
    program = (
        "import sys\n"
        "from differ.command import diff\n"
        f"code = diff.main([{traces['a']!r}, {traces['lr']!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'mlx', 'transformers', 'peft', 'rich'} & set(sys.modules)\n"
        "print(code, sorted(heavy), file=sys.stderr)\n"
    )
    environment = {"FORCE_COLOR": "1", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.split("\n")[0] == "1 []"
    assert "\x1b" not in done.stdout


def test_equal_traces_are_compared_without_reading_them(tmp_path: Path) -> None:
    from differ import diff as compare
    from tracer.reader import open_trace

    a, b = make_trace(tmp_path / "a.h5", steps=10), make_trace(tmp_path / "b.h5", steps=10)
    with open_trace(a) as first, open_trace(b) as second:
        result = compare(first, second)
        assert result.counts.compared == result.counts.same_bits > 400
        assert first.bytes_read + second.bytes_read < 0.02 * (a.stat().st_size + b.stat().st_size)
