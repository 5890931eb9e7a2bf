"""A bisection between two environments: real virtual environments, a real training program, one package that matters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scenarios.bisect.environments import Environments, NoEnvironment, split_command
from scenarios.bisect.space import ABSENT, Side, Space, read_pins
from scenarios.bisect.store import Store
from tests.scenarios.bisect.driven import ROOT, trace
from tests.scenarios.conftest import needs_mlx
from tracer.errors import BadConfig, BadUsage

MAKE = ROOT / "tests" / "scenarios" / "bisect" / "make_environment.py"
PROGRAM = ROOT / "tests" / "programs" / "pinned_loop.py"
CLIP = "import mlx.core as mx\nfrom mlx.utils import tree_map\n\n\ndef clip(tree):\n    return {}\n"
SOURCES = {
    "tidy": {"1.0": CLIP.format("tree"), "2.0": CLIP.format("tree_map(lambda g: mx.clip(g, -0.01, 0.01), tree)")},
    "padding": {v: f"def pad(ids):\n    return ids  # {v}\n" for v in ("3.1", "3.2")},
    "report_line": {
        v: f"def line(name, step, loss):\n    return f'{v} {{name}} {{step}} {{loss}}'\n" for v in ("0.9", "1.0")
    },
    "names_of": {v: f"def run():\n    return 'run of {v}'\n" for v in ("5", "6")},
}
PINS = {
    "a": "tidy==1.0\npadding==3.1\nreport_line==0.9\nnames_of==5\n",
    "b": "tidy==2.0\npadding==3.2\nreport_line==1.0\nnames_of==6\n",
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of the four packages in two versions; padding 3.2 needs report_line 1.0."""
    folder = tmp_path / "store"
    for name, versions in SOURCES.items():
        for version, text in versions.items():
            (folder / f"{name}-{version}").mkdir(parents=True)
            (folder / f"{name}-{version}" / f"{name}.py").write_text(text)
    (folder / "padding-3.2" / "needs").write_text("report_line==1.0")
    for side, text in PINS.items():
        (tmp_path / f"{side}.txt").write_text(text)
    monkeypatch.setenv("STORE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@needs_mlx
def test_the_package_pin_that_matters_is_named(store: Path) -> None:
    make = f"{sys.executable} {MAKE} {{pins}} {{venv}}"
    command = ["bisect", "--pins", "a.txt", "b.txt", "--make", make, "--format", "json", "--", "python", PROGRAM]
    done = trace(*command)
    assert done.code == 1, done.stderr
    assert "a and b differ in 4 pins" in done.stderr
    report = json.loads(done.stdout)
    assert [[item["key"] for item in found["items"]] for found in report["found"]] == [["tidy"]]
    assert report["found"][0]["items"][0] == {"key": "tidy", "kind": "pin", "a": "tidy==1.0", "b": "tidy==2.0"}
    assert report["found"][0]["first"]["phase"] == "clipped_grad"
    assert report["found"][0]["causes"][0]["id"] == "clip.value"
    assert sorted(report["harmless"]) == ["names-of", "padding", "report-line"]
    assert [one["keys"] for one in report["unresolved"]] == [["names-of", "padding"]]
    assert "padding 3.2 needs report_line 1.0" in report["unresolved"][0]["error"]
    assert report["runs"]["recorded"] <= 8
    # The same again is answered by the cache, from which it would go on too; only what failed is tried again.
    again = json.loads(trace(*command).stdout)
    assert again["found"] == report["found"]
    assert (again["runs"]["recorded"], again["runs"]["environments"]) == (0, 1)


def test_pins_that_do_not_go_together_are_no_environment_and_are_tried_once_in_a_bisection(
    store: Path, tmp_path: Path
) -> None:
    environments = Environments(Store(tmp_path / "cache"))
    make = f"{sys.executable} {MAKE} {{pins}} {{venv}}"
    for _ in range(2):
        with pytest.raises(NoEnvironment, match=r"padding 3\.2 needs report_line 1\.0, not 0\.9"):
            environments.interpreter(["padding==3.2", "report_line==0.9"], make)
    assert environments.made == 1


def test_an_environment_that_could_not_be_made_is_tried_again_in_the_next_bisection(
    store: Path, tmp_path: Path
) -> None:
    make = f"{sys.executable} {MAKE} {{pins}} {{venv}}"
    (store / "tidy-1.0").rename(store / "away")
    with pytest.raises(NoEnvironment):
        Environments(Store(tmp_path / "cache")).interpreter(["tidy==1.0"], make)
    (store / "away").rename(store / "tidy-1.0")
    for made in (1, 0):
        environments = Environments(Store(tmp_path / "cache"))
        assert Path(environments.interpreter(["tidy==1.0"], make)).exists()
        assert environments.made == made


def test_a_command_that_makes_nothing_or_is_not_there_is_said(store: Path, tmp_path: Path) -> None:
    environments = Environments(Store(tmp_path / "cache"))
    with pytest.raises(NoEnvironment, match="made no"):
        environments.interpreter(["tidy==1.0"], f"{sys.executable} -c pass {{pins}} {{venv}}")
    with pytest.raises(BadUsage, match="cannot be run"):
        environments.interpreter(["tidy==1.0"], "no-such-command {pins} {venv}")
    with pytest.raises(BadUsage, match=r"has no \{venv\}"):
        split_command("make {pins}")
    with pytest.raises(BadUsage, match="cannot be read"):
        split_command("make '{pins} {venv}")


def test_lists_of_pins_are_read_as_pip_writes_them() -> None:
    text = "# made by pip\nTidy_Up==1.0  # pinned\n\nother @ file:///folder\nextra[cpu]>=2\n"
    assert read_pins(text, "a.txt") == {
        "tidy-up": "Tidy_Up==1.0",
        "other": "other @ file:///folder",
        "extra": "extra[cpu]>=2",
    }
    with pytest.raises(BadConfig, match="line 2: --index-url x names no package"):
        read_pins("a==1\n--index-url x\n", "a.txt")
    with pytest.raises(BadConfig, match="a-b is there twice"):
        read_pins("a.b==1\nA_b==2\n", "a.txt")


def test_a_package_on_one_side_only_is_a_change_like_another() -> None:
    space = Space(Side(pins={"x": "x==1", "y": "y==1"}), Side(pins={"x": "x==1", "z": "z==2"}), ("train.py",), "make")
    assert [(item.key, item.a, item.b) for item in space.items()] == [("y", "y==1", ABSENT), ("z", ABSENT, "z==2")]
    assert space.job((), 2).pins == ("x==1", "y==1")
    assert space.job(("z",), 2).pins == ("x==1", "y==1", "z==2")
    assert space.job(("y", "z"), 2).pins == ("x==1", "z==2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--", "train.py"), "a program has no settings"),
        (("--pins", "a.txt", "b.txt"), "--pins and --make belong together"),
        (("--pins", "a.txt", "c.txt", "--make", "m {pins} {venv}"), "c.txt cannot be read"),
        (("--pins", "a.txt", "b.txt", "--make", "m {pins} {venv}", "--path", "mlx", "--", "x.py"), "its own settings"),
        (("a.toml", "b.toml"), "no path was given"),
        (("--path", "mlx", "--set-b", "lora.rang=3"), "lora.rang is not a setting"),
        (("--path", "nowhere", "--set-b", "lora.rank=3"), "there is no path called nowhere"),
        (("--path", "mlx"), "nothing to change"),
        (("a", "b", "c", "--path", "mlx"), "3 configurations were given"),
    ],
)
def test_what_cannot_be_bisected_is_refused(arguments: tuple[str, ...], said: str, store: Path) -> None:
    done = trace("bisect", *arguments)
    assert done.code == 2
    assert done.stdout == ""
    assert said in done.stderr
