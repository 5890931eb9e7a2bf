"""Everything that is measured, each answer kept by what it was asked of and by the sources that answer it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench.accuracy import judge, rivals, smallest
from tests.bench.accuracy.arms import Arm, Store
from tests.bench.accuracy.clean import Clean
from tests.bench.accuracy.fault import Fault
from tests.bench.accuracy.judge import Kept

_TOOL: Final = ("differ/**/*.py", "differ/defaults.toml", "tracer/reader.py", "tests/bench/accuracy/judge.py")
_OTHERS: Final = ("tracer/reader.py", "tests/bench/accuracy/rivals.py")
_BISECTED: Final = (*_TOOL, "tests/bench/accuracy/smallest.py", "tests/bench/accuracy/edits.py")
Say = Callable[[str], None]


@dataclass
class Measured:
    """Answers by the id of a fault or a clean pair; `h5diff` is None where the program is not installed."""

    faults: dict[str, dict[str, Any]]
    clean: dict[str, dict[str, Any]]
    noise: dict[str, dict[str, Any]]
    close: dict[str, dict[str, Any]]
    loss_threshold: float
    h5diff: dict[str, dict[str, Any]] | None
    h5diff_tolerance: float
    smallest: dict[str, dict[str, Any]]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """One benchmark: the pairs, and where traces and answers are kept."""

    faults: Sequence[Fault]
    clean: Sequence[Clean]
    folder: Path
    say: Say = print

    @property
    def store(self) -> Store:
        return Store(self.folder / "traces")

    def record(self) -> None:
        """Record what is missing."""
        arms = [arm for fault in self.faults for arm in (fault.a, fault.b)]
        arms += [arm for pair in self.clean for arm in pair.arms]
        arms += [smallest.TORCH, smallest.MLX] if len(self.faults) > 20 else []
        self.say(f"recorded {self.store.record(arms)} runs")

    def measure(self) -> Measured:
        """Compare all pairs in every way."""
        seconds: dict[str, float] = {}

        def timed(name: str, ask: Callable[[], Any]) -> Any:
            began = time.perf_counter()
            answer = ask()
            seconds[name] = time.perf_counter() - began
            self.say(f"{name}: {seconds[name]:.0f} s")
            return answer

        faults = timed("faults", self.judge_faults)
        clean = timed("clean pairs", lambda: self.judge_clean(noise=False))
        noise = timed("clean pairs with noise", lambda: self.judge_clean(noise=True))
        close = timed("closeness", self.closeness)
        threshold = self._loss_threshold(close)
        tolerance, found = timed("h5diff", self._h5diff) if rivals.has_h5diff() else (0.0, None)
        least = timed("smallest faults", self._smallest) if len(self.faults) > 20 else {}
        return Measured(faults, clean, noise, close, threshold, found, tolerance, least, seconds)

    def _pairs(self) -> list[tuple[str, Arm, Arm]]:
        return [(pair.id, pair.a, pair.b) for pair in (*self.faults, *self.clean)]

    def _ask(
        self,
        name: str,
        sources: Sequence[str],
        questions: Iterable[tuple[str, str, Callable[..., Any], tuple[Any, ...]]],
    ) -> dict[str, Any]:
        """Answers by id; questions are (id, key, function, arguments), asked in two processes where not kept."""
        kept, answers, asked = Kept(self.folder / f"{name}.json", sources), {}, []
        with ProcessPoolExecutor(2) as pool:
            for identity, key, function, arguments in questions:
                if kept.has(key):
                    answers[identity] = kept.known(key)
                else:
                    asked.append((identity, key, pool.submit(function, *arguments)))
            for identity, key, future in asked:
                answers[identity] = kept.keep(key, future.result())
        kept.save()
        return answers

    def judge_faults(self) -> dict[str, Any]:
        """What the tool says of every fault."""

        def key(fault: Fault) -> str:
            return f"{fault.a.key} {fault.b.key} {fault.step} {fault.phase} {fault.names} {fault.causes}"

        return self._ask(
            "faults", _TOOL, ((f.id, key(f), judge.judge, (f, *judge.traces(self.store, f))) for f in self.faults)
        )

    def judge_clean(self, *, noise: bool) -> dict[str, Any]:
        """What the tool says of every clean pair, with or without the twins of its sides."""

        def question(pair: Clean) -> tuple[str, str, Callable[..., Any], tuple[Any, ...]]:
            a, b, *twins = (self.store.trace(arm) for arm in pair.arms)
            used = twins if noise else []
            return pair.id, " ".join(path.stem for path in (a, b, *used)), judge.false_alarm, (a, b, used)

        return self._ask("noise" if noise else "clean", _TOOL, map(question, self.clean))

    def closeness(self) -> dict[str, Any]:
        """What per-tensor closeness and losses say of every pair."""
        questions = (
            (name, f"{a.key} {b.key}", rivals.closeness, (self.store.trace(a), self.store.trace(b)))
            for name, a, b in self._pairs()
        )
        return self._ask("closeness", _OTHERS, questions)

    def _loss_threshold(self, close: dict[str, Any]) -> float:
        apart = {name: rivals.loss_apart(found["loss"])[0] for name, found in close.items()}
        return rivals.best_threshold([apart[f.id] for f in self.faults], [apart[p.id] for p in self.clean])

    def _h5diff(self) -> tuple[float, dict[str, Any]]:
        worst = self._ask(
            "worst",
            _OTHERS,
            (
                (name, f"{a.key} {b.key}", rivals.worst_relative, (self.store.trace(a), self.store.trace(b)))
                for name, a, b in self._pairs()
            ),
        )
        tolerance = rivals.best_threshold([worst[f.id] for f in self.faults], [worst[p.id] for p in self.clean])
        with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
            questions = (
                (name, f"{a.key} {b.key} {tolerance!r}", _one_h5diff, (self.store, a, b, tolerance, Path(folder)))
                for name, a, b in self._pairs()
            )
            return tolerance, self._ask("h5diff", _OTHERS, questions)

    def _smallest(self) -> dict[str, Any]:
        torch, mlx = (self.store.trace(arm) for arm in (smallest.TORCH, smallest.MLX))
        pairs = {"same": mlx, "across": torch}
        with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
            questions = [
                (
                    f"{kind}|{how}",
                    f"{kind} {how} {a.stem} {mlx.stem}",
                    _one_smallest,
                    (kind, a, mlx, Path(folder) / f"{number}-{how}.h5"),
                )
                for number, kind in enumerate(smallest.KINDS)
                for how, a in pairs.items()
            ]
            return self._ask("smallest", _BISECTED, questions)


def _one_h5diff(store: Store, a: Arm, b: Arm, tolerance: float, folder: Path) -> dict[str, Any]:
    files = [
        rivals.plain_file(store.trace(arm), folder / f"{arm.key}-{number}-{os.getpid()}.h5")
        for number, arm in enumerate((a, b))
    ]
    answer = rivals.h5diff(files[0], files[1], tolerance)
    files[1].unlink()
    return answer


def _one_smallest(kind: str, a: Path, source: Path, scratch: Path) -> dict[str, Any]:
    return asdict(smallest.smallest(kind, a, source, scratch))
