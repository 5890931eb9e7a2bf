"""Recompute every recorded step of a trace, and measure how far the recorded losses and gradients are from that.

Each step starts from its own recorded parameters and batch, so no error is carried from one step to the next.  Two sums over
the micro-batches of a step give every reduction:

    sum of grad S_m          (weights 1, 1/N)
    sum of grad S_m / n_m    (weights 1, 1/K)

Invariant: nothing is judged here.  What is measured goes to `differ.reference`, which has the tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from differ.align import Tensor
from differ.compare import Distance, distance
from differ.floors import NOISE_SHARE
from differ.reference import Measured, MeasuredStep, NoReference
from differ.runs import label, model_dtype
from scenarios.reference import rules
from scenarios.reference.model import Reference, rebuilt
from scenarios.reference.recorded import Recorded
from tracer.reader import Trace
from tracer.schema import Phase

Arrays = dict[str, npt.NDArray[Any]]
# Masks that were redrawn as the run drew them leave a loss as near as this; another draw does not.
_SAME_MASKS: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Options:
    """What to recompute: dtype of the arithmetic, another base than the trace names, an inclusive range of steps."""

    dtype: str = "float32"
    model: str | None = None
    steps: tuple[int, int] | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass(slots=True)
class _Fit:
    """One step's gradients against one reduction: error by name, of all together, and the factor that fits."""

    errors: dict[str, float]
    whole: float
    factor: float | None


@dataclass(slots=True)
class _Step:
    """One step recomputed: token means and counts of its micro-batches in order, and a fit for each reduction.

    `losses` are the recorded ones: number of the micro-batch -> its place in that order and its loss.
    """

    step: int
    means: list[float]
    tokens: list[int]
    losses: dict[int, tuple[int, float]]
    fits: dict[str, _Fit] = field(default_factory=dict)


def measure(trace: Trace, options: Options | None = None) -> Measured:
    """Recompute a trace.  Raises NoReference for one that cannot be, PackageMissing without torch."""
    options = options or Options()
    recorded = Recorded(trace)
    low, high = options.steps or (1, trace.last_step)
    wanted = [step for step in trace.steps if max(low, 1) <= step <= high]
    steps, left_out = recorded.usable(wanted)
    _refuse_dropout(recorded, recorded.dropout, steps[0], options.dtype)
    with rebuilt(recorded, options.dtype, options.model) as model:
        _refuse_dropout(recorded, model.dropout, steps[0], options.dtype)
        done = []
        for number, step in enumerate(steps):
            _tell(options, number, len(steps))
            done.append(_recompute(recorded, model, step))
            if number == 0 and model.dropout > 0.0:
                _check_masks(done[0])
        _tell(options, len(steps), len(steps))
        return Measured(
            trace=str(trace.path),
            label=label(trace),
            engine=model.engine,
            dtype=options.dtype,
            base=_base(recorded, model, options),
            run_dtype=model_dtype(trace),
            steps=_measured(done),
            notes=tuple(_notes(recorded, model, left_out, done)),
            frozen=len(recorded.frozen),
        )


def _tell(options: Options, done: int, total: int) -> None:
    if options.progress is not None:
        options.progress(done, total)


def _base(recorded: Recorded, model: Reference, options: Options) -> str:
    name = options.model or recorded.trace.declared.get("model.name") or model.source
    return str(name).rstrip("/").rpartition("/")[2] if str(name).startswith(("/", ".", "~")) else str(name)


# Dropout.


def _refuse_dropout(recorded: Recorded, dropout: float, first: int, dtype: str) -> None:
    """Masks can be drawn again only by the generator that drew them, from its recorded state, in the dtype of the run."""
    if dropout <= 0.0:
        return
    what = f"{recorded.trace.path} was trained with dropout {dropout:g}"
    if recorded.framework != "torch":
        raise NoReference(
            f"{what} under {recorded.framework or 'an unknown framework'}: its masks cannot be drawn again in torch, so this "
            "cannot be answered",
            "record the same run with lora.dropout = 0",
        )
    if dtype != "float32" or model_dtype(recorded.trace) != "float32":
        raise NoReference(f"{what}: its masks can be drawn again in float32 only", "leave out --reference-dtype")
    if recorded.generator(first) is None:
        raise NoReference(
            f"{what}, and the state of torch's generator (rng.torch) at step {first} is not in the trace",
            "record it again with --what including hparams, or with lora.dropout = 0",
        )


def _check_masks(step: _Step) -> None:
    errors = [_loss_errors(step, rule) for rule in rules.LOSS_RULES]
    if step.losses and min(max(each.values()) for each in errors) > _SAME_MASKS:
        raise NoReference(
            f"the dropout masks of step {step.step} were drawn again from rng.torch, and the loss is another: whether the masks "
            "or the loss differ cannot be told",
            "record the same run with lora.dropout = 0",
        )


# One step.


def _recompute(recorded: Recorded, model: Reference, step: int) -> _Step:
    model.load(recorded.parameters(step))
    generator = recorded.generator(step) if model.dropout > 0.0 else None
    if generator is not None:
        model.restore(generator)
    total: Arrays = {}
    averaged: Arrays = {}
    means, tokens = [], []
    for batch in recorded.batches(step):
        loss, grads = model.sums(batch)
        n = batch.tokens
        tokens.append(n)
        means.append(loss / n if n else math.nan)
        for name, grad in grads.items():
            _add(total, name, grad)
            _add(averaged, name, grad / grad.dtype.type(n if n else math.nan))
    places = {number: i for i, number in enumerate(recorded.trace.micro_batches(Phase.BATCH, step))}
    losses = {m: (places[m], loss) for m, loss in recorded.losses(step).items() if m in places}
    found = _Step(step, means, tokens, losses)
    gradients = {name: (value, dtype) for name, value, dtype in recorded.gradients(step)}
    fits: dict[tuple[float, ...], _Fit] = {}
    for rule in rules.GRAD_RULES:
        weights = tuple(rules.grad_weights(rule, tokens)) if all(tokens) else (math.nan, float(len(fits)))
        if weights not in fits:
            fits[weights] = _fit(gradients, *_reduced(rule, total, averaged, tokens))
        found.fits[rule] = fits[weights]
    return found


def _add(into: Arrays, name: str, value: npt.NDArray[Any]) -> None:
    into[name] = into[name] + value if name in into else value


def _reduced(rule: str, total: Arrays, averaged: Arrays, tokens: Sequence[int]) -> tuple[Arrays, float]:
    """The sums that a reduction is made of, and what they are multiplied by."""
    if rule == "mean of means":
        return averaged, 1.0 / len(tokens)
    if rule == "sum of means":
        return averaged, 1.0
    return total, 1.0 / max(1, sum(tokens)) if rule == "token-weighted" else 1.0


def _fit(gradients: Mapping[str, tuple[npt.NDArray[Any] | None, str]], sums: Arrays, factor: float) -> _Fit:
    """Distance of the recorded gradients from a reduction; a parameter without a gradient counts as zero on that side."""
    apart: dict[str, Distance] = {}
    inner: dict[str, float] = {}
    for name, (stored, dtype) in gradients.items():
        reference = sums.get(name)
        if stored is None and reference is None:
            continue
        shape = reference.shape if reference is not None else stored.shape if stored is not None else ()
        mine = Tensor.zeros(shape) if stored is None else Tensor(stored, dtype)
        given = np.zeros(shape) if reference is None else reference.astype(np.float64) * factor
        apart[name] = distance(mine, Tensor(given, "float64"))
        inner[name] = float(np.vdot(mine.block(0, mine.size), given.reshape(-1))) if mine.size else 0.0
    norms = [math.hypot(*(getattr(each, side) for each in apart.values())) for side in "ab"]
    floor = NOISE_SHARE * max(norms)
    errors = {name: each.rel_l2(floor) if each.nonfinite < 0 else math.inf for name, each in apart.items()}
    whole = math.hypot(*(each.diff for each in apart.values())) / max(norms) if max(norms) > 0.0 else 0.0
    odd = any(each.nonfinite >= 0 for each in apart.values())
    return _Fit(errors, math.inf if odd else whole, _common_factor(apart, inner, norms[1]))


def _common_factor(apart: Mapping[str, Distance], inner: Mapping[str, float], norm: float) -> float | None:
    """The one factor from the reference to what was recorded, from its projection on the reference; None if there is none.

    It has to leave less than a thousandth of every tensor that is not noise.
    """
    if norm <= 0.0 or not math.isfinite(norm):
        return None
    factor = sum(inner.values()) / norm**2
    if not math.isfinite(factor):
        return None
    for name, each in apart.items():
        left = each.a**2 - 2.0 * factor * inner[name] + (factor * each.b) ** 2
        if (
            max(each.a, abs(factor) * each.b) > NOISE_SHARE * norm
            and left > 1e-6 * max(each.a, abs(factor) * each.b) ** 2
        ):
            return None
    return factor


# All steps.


def _measured(done: Sequence[_Step]) -> tuple[MeasuredStep, ...]:
    loss_errors = {rule: [_loss_errors(step, rule) for step in done] for rule in rules.LOSS_RULES}
    loss_rule = rules.chosen(
        {rule: [max(each.values()) for each in errors if each] for rule, errors in loss_errors.items()}
    )
    grad_rule = rules.chosen({rule: [step.fits[rule].whole for step in done] for rule in rules.GRAD_RULES})
    return tuple(
        MeasuredStep(
            step=step.step,
            loss=_mean(step),
            losses=losses,
            grads=step.fits[grad_rule].errors,
            grad=step.fits[grad_rule].whole,
            loss_rule=loss_rule,
            grad_rule=grad_rule,
            weights=tuple(rules.grad_weights(grad_rule, step.tokens)) if all(step.tokens) else (),
            loss_factor=_loss_factor(step, loss_rule),
            grad_factor=step.fits[grad_rule].factor,
        )
        for step, losses in zip(done, loss_errors[loss_rule], strict=True)
    )


def _mean(step: _Step) -> float:
    """Mean over all supervised tokens of the step."""
    total = sum(step.tokens)
    return sum(mean * n for mean, n in zip(step.means, step.tokens, strict=True) if n) / total if total else math.nan


def _loss_errors(step: _Step, rule: str) -> dict[int, float]:
    weights = rules.loss_weights(rule, step.tokens) if all(step.tokens) else [1.0] * len(step.tokens)
    return {m: rules.loss_error(loss, step.means[i], weights[i]) for m, (i, loss) in step.losses.items()}


def _loss_factor(step: _Step, rule: str) -> float | None:
    if not step.losses or not all(step.tokens):
        return None
    weights = rules.loss_weights(rule, step.tokens)
    recorded = list(step.losses.values())
    return rules.fitted([loss for _, loss in recorded], [step.means[i] * weights[i] for i, _ in recorded])


def _notes(recorded: Recorded, model: Reference, left_out: Sequence[str], done: Sequence[_Step]) -> list[str]:
    notes = []
    if left_out:
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        notes.append(f"left out: {left_out[0]}{more}")
    if not recorded.frozen:
        notes.append("every weight is trained: the base is checked by names and shapes only")
    if not any(step.losses for step in done):
        notes.append("no losses are recorded: only gradients are compared")
    if model.dropout > 0.0:
        notes.append(f"dropout {model.dropout:g}: masks drawn again from the recorded generator")
    return notes
