"""A repository of somebody who uses the gate and the pytest plugin: is it green, and does each of five faults turn it red?

    python -m tests.acceptance.repository [FAULT …]      prints a table; exit code 1 if anything is not as it should be

A script makes it in a temporary folder: a git repository with a small PyTorch trainer, a gate, a test, and baselines that
the tools wrote themselves.  A fault is an edit of the trainer's source.  Every run is a process of its own, as in CI.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

Done = subprocess.CompletedProcess[str]
ROOT: Final = Path(__file__).parents[2]

TRAINER: Final = '''"""Teach a small language model to count."""

import torch

WORDS, STEPS, MICRO_BATCHES = 13, 3, 2


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 8)
        self.inner = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, WORDS)

    def forward(self, input_ids, labels):
        logits = self.head(torch.tanh(self.inner(self.embed(input_ids))))
        total = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return total / (labels[:, 1:] != -100).sum()


def batches(step):
    for micro_batch in range(MICRO_BATCHES):
        start = torch.arange(2)[:, None] + 3 * step + micro_batch
        input_ids = (start + torch.arange(6)) % WORDS
        labels = input_ids.clone()
        labels[:, 0] = -100
        labels[0, 5 - micro_batch :] = -100
        yield input_ids, labels


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        for input_ids, labels in batches(step):
            (model(input_ids, labels) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
'''
TEST: Final = """import train


def test_training(trace_regression):
    trace_regression.check(train.main)
"""
PROJECT: Final = """[tool.trace.gate.count]
command = ["python", "train.py"]
baseline = "traces/count.h5"

[tool.pytest.ini_options]
pythonpath = ["."]
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """An edit of the trainer, and the address that every report must give first.

    An address without a name stands for any name: removing a clip scales all gradients by one factor, and which of them is
    furthest off is a matter of rounding.
    """

    old: str
    new: str
    address: str


FAULTS: Final[Mapping[str, Fault]] = {
    "lr 1 % higher": Fault("lr=1e-2", "lr=1.01e-2", "step 1, hparams, group0.lr"),
    "weight decay added": Fault("weight_decay=0.0", "weight_decay=0.01", "step 1, hparams, group0.weight_decay"),
    "clip removed": Fault(
        "        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n", "", "step 1, clipped_grad"
    ),
    "a label masked at step 2": Fault(
        "        yield input_ids, labels",
        "        if step == 1 and micro_batch == 1:\n            labels[1, 2] = -100\n        yield input_ids, labels",
        "step 2, batch, micro-batch 1, labels",
    ),
    "mean over padding too": Fault(
        "(labels[:, 1:] != -100).sum()", "labels[:, 1:].numel()", "step 1, loss, micro-batch 0, loss"
    ),
}


@dataclass(frozen=True, slots=True)
class Told:
    """What a run of the gate and of pytest said: exit codes, and where each report says that it went wrong."""

    gate: int
    pytest: int
    where: Mapping[str, str]

    def wrong(self, fault: Fault | None) -> list[str]:
        """What is not as it should be, for a fault or for the clean repository."""
        code = 0 if fault is None else 1
        wrong = [
            f"{name} ended with {got}" for name, got in (("gate", self.gate), ("pytest", self.pytest)) if got != code
        ]
        wrong += [f"{kind} says {where!r}" for kind, where in self.where.items() if not _is_at(where, fault)]
        if len(set(self.where.values())) > 1:
            wrong.append("the reports differ")
        return wrong


def _is_at(where: str, fault: Fault | None) -> bool:
    if fault is None:
        return not where
    return where == fault.address or where.startswith(f"{fault.address}, ")


class Repository:
    """The repository in a folder.  Making it writes the baselines and commits them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._git("init", "--quiet")
        self._write("train.py", TRAINER)
        self._write("test_train.py", TEST)
        self._write("pyproject.toml", PROJECT)
        self._write(".gitignore", "out/\n__pycache__/\n.pytest_cache/\n")
        made = self._gate_and_pytest(["--update"], ["--trace-update"])
        if [done.returncode for done in made] != [1, 1]:
            raise RuntimeError("\n".join(done.stdout + done.stderr for done in made))
        self._git("add", ".")
        self._git(
            "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "Trainer and baselines"
        )

    def tell(self, fault: Fault | None = None) -> Told:
        """Run the gate and the tests on the trainer, with a fault planted or without."""
        if fault is not None and TRAINER.count(fault.old) != 1:
            raise ValueError(f"{fault.old!r} is not in the trainer once")
        self._write("train.py", TRAINER if fault is None else TRAINER.replace(fault.old, fault.new))
        out = Path("out", "clean" if fault is None else re.sub(r"\W+", "-", fault.address))
        gate, tests = self._gate_and_pytest(["--artifacts", str(out)], [])
        where = {"terminal": _terminal(gate.stdout), "pytest": _terminal(tests.stdout)}
        kept = self.folder / out
        if fault is not None:
            where["JUnit"] = _junit(kept / "count.junit.xml")
            where["markdown"] = _markdown((kept / "count.md").read_text())
            where["HTML"] = _html((kept / "count.html").read_text())
        elif kept.exists():
            where["artifacts"] = "kept of a run that is as its baseline"
        return Told(gate.returncode, tests.returncode, where)

    def changed(self) -> str:
        """What git sees: nothing, as long as only the tools wrote."""
        self._write("train.py", TRAINER)
        return self._git("status", "--porcelain").stdout

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def _gate_and_pytest(self, gate: list[str], tests: list[str]) -> tuple[Done, Done]:
        """Both at the same time."""
        installed = any(entry.name == "steptrace" for entry in entry_points(group="pytest11"))
        plugin = [] if installed else ["-p", "differ.pytest_plugin"]
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(self._python, "-m", "tracer", "gate", *gate)
            second = pool.submit(
                self._python, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *plugin, *tests
            )
            return first.result(), second.result()

    def _python(self, *arguments: str) -> Done:
        # Nothing of the run that makes the repository may reach it: not pytest's options, not a runner's files.
        keep = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "GITHUB_", "GIT_"))
        }
        environment = {**keep, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def _git(self, *arguments: str) -> Done:
        bare = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment = {**bare, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        return subprocess.run(
            ["git", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=True
        )


def _terminal(text: str) -> str:
    """The address in a text report; it is the report's first line, and nothing of ours stands before it."""
    found = re.search(r"^(?:E +)?DIVERGED at (.+?)(?:   .*)?$", text, re.MULTILINE)
    return found[1] if found else ""


def _junit(path: Path) -> str:
    """The address of the first test case that failed."""
    failures = [case.find("failure") for case in ElementTree.parse(path).iter("testcase")]
    messages = [failure.get("message", "") for failure in failures if failure is not None]
    return messages[0].partition(": ")[0] if messages else ""


def _markdown(text: str) -> str:
    """The address in the heading, without markup."""
    found = re.match(r"## ❌ DIVERGED at (.+)", text)
    return re.sub(r"[`\\]", "", found[1]) if found else ""


def _html(text: str) -> str:
    """The address in the page's heading and the line below it, without markup."""
    found = re.search(r"<h1>(.*?)</h1>\s*(?:<p class=\"where\">(.*?)</p>)?", text, re.DOTALL)
    parts = (
        [" ".join(html.unescape(re.sub(r"<[^>]*>", "", part)).split()) for part in found.groups("")] if found else []
    )
    return ", ".join(part for part in parts if part).partition("DIVERGED at ")[2]


def main(chosen: Sequence[str]) -> int:
    """Print a table of what each report says; 1 if a run was not as it should be."""
    faults: dict[str, Fault | None] = {"none": None, **{name: FAULTS[name] for name in chosen or FAULTS}}
    print("| planted fault | gate | pytest | first line of every report | as it should be |\n|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory(prefix="trace-repository-") as folder:
        repository = Repository(Path(folder))
        for name, fault in faults.items():
            told = repository.tell(fault)
            wrong = told.wrong(fault)
            addresses = " / ".join(dict.fromkeys(told.where.values())) or "SAME"
            print(f"| {name} | {told.gate} | {told.pytest} | {addresses} | {'; '.join(wrong) or 'yes'} |", flush=True)
            failed = failed or bool(wrong)
        changed = repository.changed()
    if changed:
        print(f"\nthe tools changed files of the repository:\n{changed}")
    return int(failed or bool(changed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", choices=[*FAULTS, []], help="default: all")
    sys.exit(main(parser.parse_args().faults))
