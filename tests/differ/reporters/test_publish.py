"""`--report` and `--format github` on the command line: whole files or none, the answer in any case, exit codes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from differ import publish
from differ.command import diff
from differ.publish import write_whole
from tests.builders import make_trace
from tracer.errors import BadUsage, NoPermission, NotFound


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return str(make_trace(tmp_path / "a.h5")), str(make_trace(tmp_path / "b.h5", fault="clip_value"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(diff, list(arguments))


def test_every_kind_of_report_is_written_beside_the_answer(pair: tuple[str, str], tmp_path: Path) -> None:
    beginnings = {"html": "<!doctype", "markdown": "## ", "junit": "<?xml", "json": "{", "text": "DIVERGED"}
    if not _has_jinja2():
        del beginnings["html"]
    options = [word for kind in beginnings for word in ("--report", f"{kind}={tmp_path / kind}")]

    result = run(*pair, *options)

    assert result.exit_code == 1
    assert result.stdout.startswith("DIVERGED at step 1, clipped_grad")
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["wrote"] * len(beginnings)
    for kind, beginning in beginnings.items():
        assert (tmp_path / kind).read_text(encoding="utf-8").startswith(beginning)


def _has_jinja2() -> bool:
    try:
        import jinja2  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_report_replaces_an_older_one_and_leaves_nothing_else(pair: tuple[str, str], tmp_path: Path) -> None:
    target = tmp_path / "out.md"
    target.write_text("old" * 100_000)
    before = set(os.listdir(tmp_path))

    assert run(*pair, "--report", f"markdown={target}", "-q").output == ""

    assert target.read_text().startswith("## ")
    assert set(os.listdir(tmp_path)) == before


def test_a_reporter_that_fails_leaves_no_half_file_and_the_older_one(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.md"
    target.write_text("old")
    before = set(os.listdir(tmp_path))

    def fail(name: str, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "os", SimpleNamespace(**{**vars(os), "replace": fail}))
    result = run(*pair, "--report", f"markdown={target}")

    assert isinstance(result.exception, NotFound)
    assert "No space left" in str(result.exception)
    assert result.stdout.startswith("DIVERGED")
    assert target.read_text() == "old"
    assert set(os.listdir(tmp_path)) == before


def test_a_report_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)

    write_whole(link, b"new")

    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"report")
    assert os.read(reader, 100) == b"report"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_new_report_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "report", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "report").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("where", ["a.h5", "b.h5", "other.h5"])
def test_a_trace_is_never_overwritten(where: str, pair: tuple[str, str], tmp_path: Path) -> None:
    make_trace(tmp_path / "other.h5")
    before = (tmp_path / where).read_bytes()

    assert isinstance(run(*pair, "--report", f"json={tmp_path / where}").exception, BadUsage)

    assert (tmp_path / where).read_bytes() == before


def test_what_cannot_be_written_is_refused_before_the_comparison(pair: tuple[str, str], tmp_path: Path) -> None:
    assert isinstance(run(*pair, "--report", f"json={tmp_path}").exception, BadUsage)
    assert isinstance(run(*pair, "--report", f"json={tmp_path / 'no' / 'x.json'}").exception, NotFound)
    twice = ["--report", f"json={tmp_path / 'x'}", "--report", f"markdown={tmp_path / 'x'}"]
    assert isinstance(run(*pair, *twice).exception, BadUsage)
    for text in ("out.html", "pdf=out.pdf", "html=", "=x"):
        assert run(*pair, "--report", text).exit_code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(pair: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert isinstance(run(*pair, "--report", f"json={folder / 'x'}").exception, NoPermission)


def test_github_prints_annotations_on_stderr_and_the_report_on_stdout(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))

    result = run(*pair, "--format", "github")

    assert result.exit_code == 1
    assert result.stdout.startswith("DIVERGED at step 1")
    assert result.stderr.startswith("::error title=DIVERGED")
    assert (tmp_path / "summary").read_text().startswith("## ❌ DIVERGED")
    assert "diverged" in (tmp_path / "output").read_text()


def test_a_summary_that_cannot_be_written_is_an_error_of_the_tool(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "none" / "summary"))
    assert isinstance(run(*pair, "--format", "github").exception, NotFound)


def test_completion_offers_kinds_of_reports() -> None:
    kind = publish.DestinationType()
    parameter = next(option for option in diff.params if option.name == "reports")
    import click

    items = kind.shell_complete(click.Context(diff), parameter, "j")
    assert [item.value for item in items] == ["junit=", "json="]


def test_every_kind_of_report_is_documented() -> None:
    from differ.reporters import FILES, FORMATS, REPORTERS

    text = (Path(__file__).parents[3] / "docs" / "reports.md").read_text(encoding="utf-8")
    table = {
        line.split("|")[1].strip(" `"): line.split("|")[2:4] for line in text.splitlines() if line.startswith("| `")
    }

    assert set(table) == set(REPORTERS)
    for kind, (printed, written) in table.items():
        assert printed.strip().startswith("yes") == (kind in FORMATS)
        assert written.strip().startswith("yes") == (kind in FILES)


def test_pictures_of_the_documentation_are_small() -> None:
    images = list((Path(__file__).parents[3] / "docs" / "images").glob("*.png"))
    assert images
    assert all(image.stat().st_size < 150_000 for image in images)
