"""What a reference engine says of a trace: does each recorded loss and gradient follow from the trace's own inputs?

The engine itself is `python -m scenarios.reference`, which needs torch: it is run in a process of its own and answers with a
JSON file, so that nothing here imports a framework.  What it measures (`Measured`) knows no tolerance; `judge` holds it
against a policy.

    error of a loss        |recorded / w - mean| / max(|recorded / w|, |mean|, 1); w: weight of the reduction that the run follows
    error of a gradient    |recorded - reference| / max(|recorded|, |reference|, 1e-6 * norm of all gradients)
    tolerance              `base` of the policy, for gradients divided by min(1, loss), as across two sides with equal inputs

Invariant: an answer of the engine survives `to_json` and `from_json` to the bit.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from differ.policy import Policy
from tracer.errors import TraceError
from tracer.schema import Phase

FOLLOWS: Final = "follows"
DOES_NOT: Final = "does not follow"
LOSS: Final = "loss"
# A loss below this is all rounding noise; the gradient's tolerance is not divided by less.
SMALLEST_LOSS: Final = 1e-6
# Weights of the micro-batches that differ by less than this are the same reduction.
SAME_WEIGHT: Final = 1e-6
# A common factor nearer to 1 than this is no more than the error says.
SMALLEST_FACTOR: Final = 1e-3
_MODULE: Final = "scenarios.reference"


class NoReference(TraceError):
    """A trace whose losses and gradients cannot be recomputed."""

    slug = "no-reference"


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step recomputed.

    `loss` is the reference's mean over all supervised tokens; `losses` the errors by micro-batch (empty: not recorded),
    `grads` by name, `grad` that of all gradients together.  `loss_rule` and `grad_rule` name the reductions that fit best,
    `weights` what each micro-batch's token mean counts in the accumulated gradient.  `loss_factor` and `grad_factor`:
    the one factor that takes the reference to the recorded numbers, None where one factor does not.
    """

    step: int
    loss: float
    losses: Mapping[int, float]
    grads: Mapping[str, float]
    grad: float
    loss_rule: str
    grad_rule: str
    weights: tuple[float, ...]
    loss_factor: float | None = None
    grad_factor: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One trace recomputed: by which engine, in which dtype, from which base; `run_dtype` is the coarsest of the run.

    `frozen`: how many weights of the base were checked by their digests.
    """

    trace: str
    label: str
    engine: str
    dtype: str
    base: str
    run_dtype: str
    steps: tuple[MeasuredStep, ...]
    notes: tuple[str, ...] = ()
    frozen: int = 0

    def at(self, step: int) -> MeasuredStep | None:
        """One step, or None if it was not recomputed."""
        return next((one for one in self.steps if one.step == step), None)

    def to_json(self) -> dict[str, Any]:
        """As JSON types; numbers that JSON does not know are strings."""
        body = asdict(self)
        for step in body["steps"]:
            for key in ("loss", "grad", "loss_factor", "grad_factor"):
                step[key] = _plain(step[key])
            step["losses"] = {str(m): _plain(error) for m, error in step["losses"].items()}
            step["grads"] = {name: _plain(error) for name, error in step["grads"].items()}
            step["weights"] = [_plain(weight) for weight in step["weights"]]
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Measured:
        """Inverse of `to_json`."""
        fields = {**body, "notes": tuple(body["notes"]), "steps": tuple(_step(one) for one in body["steps"])}
        return cls(**fields)


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _step(body: Mapping[str, Any]) -> MeasuredStep:
    return MeasuredStep(
        step=int(body["step"]),
        loss=float(body["loss"]),
        losses={int(m): float(error) for m, error in body["losses"].items()},
        grads={name: float(error) for name, error in body["grads"].items()},
        grad=float(body["grad"]),
        loss_rule=body["loss_rule"],
        grad_rule=body["grad_rule"],
        weights=tuple(float(weight) for weight in body["weights"]),
        loss_factor=_number(body["loss_factor"]),
        grad_factor=_number(body["grad_factor"]),
    )


# Held against a policy.


@dataclass(frozen=True, slots=True)
class Departure:
    """One record that does not follow from its inputs; `detail` is one sentence more, or empty."""

    step: int
    phase: str
    micro_batch: int | None
    name: str
    error: float
    tolerance: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """One line of the table: largest error of a loss, error of all gradients, worst tensor and its tolerance."""

    step: int
    loss: float | None
    grad: float
    worst: float
    name: str
    tolerance: float
    follows: bool


@dataclass(frozen=True, slots=True)
class ReferenceSide:
    """What the reference says of one trace.  `departures` counts the records that do not follow, `first` is the first one.

    `loss_rule` and `grad_rule` name the reductions that the trace follows; `frozen` weights of `base` were checked.
    """

    verdict: str
    engine: str
    dtype: str
    base: str
    first: Departure | None
    departures: int
    records: int
    loss_rule: str
    grad_rule: str
    steps: tuple[ReferenceStep, ...]
    notes: tuple[str, ...] = ()
    frozen: int = 0

    @property
    def follows(self) -> bool:
        """Whether everything that was recomputed follows."""
        return self.verdict == FOLLOWS

    @property
    def worst(self) -> ReferenceStep:
        """The step whose worst tensor is nearest to its tolerance, or furthest beyond."""
        return max(self.steps, key=lambda step: step.worst / step.tolerance if step.tolerance > 0.0 else math.inf)


@dataclass(frozen=True, slots=True)
class ReferencePair:
    """What the reference says of both sides of a comparison."""

    a: ReferenceSide
    b: ReferenceSide


@dataclass(frozen=True, slots=True)
class References:
    """Both sides recomputed, for the judges."""

    a: Measured
    b: Measured

    def judged(self, policy: Policy) -> ReferencePair:
        """Both sides held against a policy."""
        return ReferencePair(judge(self.a, policy), judge(self.b, policy))


def error_of(step: MeasuredStep, phase: Phase, micro_batch: int, name: str) -> float | None:
    """Error of a record, or None if the reference says nothing about it."""
    if phase is Phase.LOSS:
        return step.losses.get(micro_batch) if name == LOSS else None
    return step.grads.get(name) if phase is Phase.GRAD and micro_batch < 0 else None


def allowed(policy: Policy, measured: Measured, step: MeasuredStep, phase: Phase, name: str) -> float:
    """What a record may miss the reference by."""
    base = policy.tolerance(phase, measured.run_dtype, name).base
    usable = math.isfinite(step.loss) and phase is Phase.GRAD
    return base / min(1.0, max(SMALLEST_LOSS, abs(step.loss))) if usable else base


def losses_follow(policy: Policy, measured: Measured, step: MeasuredStep) -> bool:
    """Whether all losses of a step follow."""
    limit = allowed(policy, measured, step, Phase.LOSS, LOSS)
    return all(error <= limit for error in step.losses.values())


def same_reduction(a: MeasuredStep, b: MeasuredStep) -> bool:
    """Whether two sides accumulate a step's gradients in the same way: one rule, or rules that weigh alike there."""
    if a.grad_rule == b.grad_rule:
        return True
    pairs = zip(a.weights, b.weights, strict=False)
    return len(a.weights) == len(b.weights) and all(abs(x - y) <= SAME_WEIGHT * max(abs(x), abs(y)) for x, y in pairs)


def judge(measured: Measured, policy: Policy) -> ReferenceSide:
    """Hold what was measured against a policy."""
    departures = [found for step in measured.steps for found in _departures(measured, step, policy)]
    rules = measured.steps[0]
    return ReferenceSide(
        verdict=DOES_NOT if departures else FOLLOWS,
        engine=measured.engine,
        dtype=measured.dtype,
        base=measured.base,
        first=departures[0] if departures else None,
        departures=len(departures),
        records=sum(len(step.losses) + len(step.grads) for step in measured.steps),
        loss_rule=rules.loss_rule,
        grad_rule=rules.grad_rule,
        steps=tuple(_line(measured, step, policy) for step in measured.steps),
        notes=measured.notes,
        frozen=measured.frozen,
    )


def _departures(measured: Measured, step: MeasuredStep, policy: Policy) -> list[Departure]:
    """Records of a step that do not follow: losses by micro-batch, then gradients, the largest excess first."""
    limit = allowed(policy, measured, step, Phase.LOSS, LOSS)
    detail = _factor("loss", step.loss_factor)
    found = [
        Departure(step.step, Phase.LOSS.label, m, LOSS, error, limit, detail)
        for m, error in sorted(step.losses.items())
        if not error <= limit
    ]
    detail = _factor("gradient", step.grad_factor)
    grads = []
    for name, error in step.grads.items():
        limit = allowed(policy, measured, step, Phase.GRAD, name)
        if not error <= limit:
            grads.append(Departure(step.step, Phase.GRAD.label, None, name, error, limit, detail))
    return found + sorted(grads, key=lambda one: -one.error / one.tolerance if one.tolerance > 0.0 else -math.inf)


def _factor(what: str, factor: float | None) -> str:
    telling = factor is not None and abs(factor - 1.0) > SMALLEST_FACTOR
    return "" if not telling else f"every {what} of the step is {factor:.6g} times the reference's"


def _line(measured: Measured, step: MeasuredStep, policy: Policy) -> ReferenceStep:
    limits = {name: allowed(policy, measured, step, Phase.GRAD, name) for name in step.grads}
    margins = {name: error / limits[name] if limits[name] > 0.0 else error for name, error in step.grads.items()}
    name = max(margins, key=lambda each: margins[each], default="")
    follows = losses_follow(policy, measured, step) and all(step.grads[each] <= limits[each] for each in limits)
    return ReferenceStep(
        step=step.step,
        loss=max(step.losses.values(), default=None),
        grad=step.grad,
        worst=step.grads.get(name, 0.0),
        name=name,
        tolerance=limits.get(name, 0.0),
        follows=follows,
    )


# The engine's process.


def recompute(
    traces: Sequence[Path], *, dtype: str = "float32", model: str | None = None, steps: tuple[int, int] | None = None
) -> list[Measured]:
    """Recompute traces in a process of its own, one after another.

    `model` replaces the base that the traces name; `steps` is an inclusive range.  Raises NoReference with the reason.
    """
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        output = Path(folder, "measured.json")
        command = [
            sys.executable,
            "-m",
            _MODULE,
            *map(str, traces),
            "--output",
            str(output),
            "--reference-dtype",
            dtype,
        ]
        command += ["--model", model] if model is not None else []
        command += ["--steps", f"{steps[0]}:{steps[1]}"] if steps is not None else []
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        try:
            answer = json.loads(output.read_text("utf-8"))
        except (OSError, json.JSONDecodeError):
            said = " | ".join(done.stderr.split("\n")[-4:]).strip(" |")
            raise NoReference(f"the reference ended with exit code {done.returncode}: {said}") from None
    if "error" in answer:
        raise NoReference(answer["error"], answer["hint"])
    return [Measured.from_json(body) for body in answer["measured"]]
