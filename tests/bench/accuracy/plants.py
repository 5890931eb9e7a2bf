"""Faults that no setting makes, planted inside the running loop of the paths `torch` and `mlx`.

`planted(path, plan)` changes what the loop calls while it is open and puts everything back.  A plan is JSON:

    grad       [{"op", "steps": [first, last], "names": glob, "by", "seed", "flat"}]   in the backward pass, canonical layout
    loss       {"factor"} | {"denominator": "rows" | "all"} | {"dtype"}, "from"       the loss that is differentiated
    loss       {"shift"}, "from"                                                       its targets, so many on; PyTorch
    forward    [{"op", "module": glob, "by", "at", "steps"}]                           in the forward pass, see `plants_forward`
    adapters   [{"op", "names": glob, "by"}]                                            what `--init-from` gives
    batch      [{"op", "steps", "by", "micro"}]                                         micro-batches, or one of each step
    base       {"name": canonical name, "factor"}                                      one frozen weight
    schedule   {"times", "plus", "after"}                                              the learning rate's step, times · t + plus
    clip       {"mode": "tensor" | "norm" | "value" | "none", "value", "from"}         how gradients are clipped
    optimizer  {"eps", "eps_place", "beta1", "beta2", "decay", "corrected", "from",    AdamW that is not what it records
                "reset_at", "element_at", "unwritten", "unheld": [first, every],
                "groups": [first, every]}
    mode       {"from"}                                                                the model in evaluation mode; PyTorch
    positions  {"form": "counted" | "offset" | "restart", "by", "at", "from"}          positions given to the model; PyTorch

    library    {"torch": [class, options], "mlx": [class, options]}                    another optimizer of the library: no fault

Invariant: a plan's step numbers are 1-based optimizer steps (`from`: the first with the fault; `after`: the last without it), and
an empty plan changes nothing.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from scenarios.data import IGNORED, MicroBatch
from scenarios.feed import Feed
from tests.bench.accuracy import plants_mlx, plants_torch
from tracer.dtypes import bf16_to_float32, float32_to_bf16

Array = npt.NDArray[Any]
Plan = Mapping[str, Any]


@contextlib.contextmanager
def planted(path: str, plan: Plan) -> Iterator[None]:
    """Plant the faults of a plan in a path while the block runs."""
    with contextlib.ExitStack() as stack:

        def patch(target: str, wrap: Callable[[Any], Any]) -> None:
            module, _, name = target.rpartition(".")
            original = getattr(importlib.import_module(module), name)
            stack.enter_context(mock.patch(target, wrap(original)))

        if "adapters" in plan:
            patch("scenarios.feed.read_adapters", lambda read: lambda file: adapters(read(file), plan["adapters"]))
        if "batch" in plan:
            patch("scenarios.run.make_feed", lambda make: lambda *a, **k: batches(make(*a, **k), plan["batch"]))
        if "schedule" in plan:
            where = "torch_loop" if path == "torch" else "_mlx"
            warp = plan["schedule"]
            patch(f"scenarios.paths.{where}.schedule_of", lambda of: lambda config: Warped(of(config), **warp))
        if {"grad", "loss", "base", "clip", "forward", "optimizer", "library", "positions", "mode"} & set(plan):
            framework = plants_torch if path == "torch" else plants_mlx
            framework.plant(plan, patch, tampering(plan.get("grad", ())))
        yield


@dataclass(frozen=True)
class Warped:
    """A schedule whose step t is taken for `times` · t + `plus`."""

    schedule: Any
    times: float = 1.0
    plus: float = 0.0
    after: int = 0

    @property
    def constant(self) -> bool:
        return bool(self.schedule.constant)

    def factor(self, done: int) -> float:
        warped = done * self.times + self.plus if done >= self.after else done
        return float(self.schedule.factor(warped))

    def in_graph(self, peak: float, mx: Any) -> Callable[[Any], Any]:
        inner = self.schedule.in_graph(peak, mx)
        return lambda step: inner(mx.where(step >= self.after, step * self.times + self.plus, step))


# Gradients.


def tampering(faults: Sequence[Plan]) -> Callable[[int, str, Array], Array | None]:
    """(step, canonical name, gradient) -> what it becomes; None where the framework is to have none."""
    before: dict[str, Array] = {}

    def tamper(step: int, name: str, gradient: Array) -> Array | None:
        result: Array | None = gradient
        for fault in faults:
            first, last = fault.get("steps", (1, 1 << 30))
            if result is not None and first <= step <= last and fnmatchcase(name, fault.get("names", "*")):
                result = _changed(fault, name, result, before.get(name, np.zeros_like(gradient)))
        before[name] = gradient.copy()
        return result

    return tamper


def _changed(fault: Plan, name: str, gradient: Array, before: Array) -> Array | None:
    op, result = fault["op"], gradient.copy()
    if op == "none":
        return None
    if op == "scale":
        return (gradient * np.float32(fault["by"])).astype(np.float32)
    if op == "zero":
        return np.zeros_like(gradient)
    if op == "element":  # moved by a share of the tensor's root mean square
        result.flat[fault["flat"]] += fault["by"] * np.sqrt(np.mean(np.square(gradient, dtype=np.float64)))
    elif op == "set":
        result.flat[fault["flat"]] = float(fault["by"])
    elif op == "redraw":  # other values of the same spread
        result = np.random.default_rng(sum(name.encode())).uniform(gradient.min(), gradient.max(), gradient.shape)
        result = result.astype(gradient.dtype)
    elif op == "transpose":  # read in the other order of its axes
        result = np.ascontiguousarray(gradient.T).reshape(gradient.shape)
    elif op == "roll":
        result = np.roll(gradient, fault["by"], axis=0)
    elif op == "reverse":
        result = gradient[::-1].copy()
    elif op == "stale":
        result = gradient + before
    elif op == "again":
        result = before
    elif op == "round":
        result = rounded(gradient, fault["by"])
    elif op == "drop":
        seed = [fault.get("seed", 0), sum(name.encode())]
        kept = np.random.default_rng(seed).random(gradient.shape) >= fault["by"]
        result = (gradient * kept / (1 - fault["by"])).astype(np.float32)
    else:
        raise ValueError(f"no such change of a gradient: {op}")
    return result


def rounded(values: Array, dtype: str) -> Array:
    """float32 values that `bfloat16` or `float16` can hold."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    return bf16_to_float32(float32_to_bf16(np.ascontiguousarray(values, np.float32)))


# Adapters that a run starts from.


def adapters(given: Mapping[str, Array], faults: Sequence[Plan]) -> dict[str, Array]:
    """Adapters by canonical name, changed."""
    result = {name: np.array(values) for name, values in given.items()}
    for fault in faults:
        names = [name for name in result if fnmatchcase(name, fault["names"])]
        if fault["op"] == "swap":
            first, second = names
            result[first], result[second] = result[second], result[first]
            continue
        for name in names:
            result[name] = _changed(fault, name, result[name].astype(np.float32), result[name])  # type: ignore[assignment]
    return result


# Batches.


def batches(feed: Feed, faults: Sequence[Plan]) -> Feed:
    """A feed with its micro-batches changed."""
    assert feed.steps is not None
    steps = list(feed.steps)
    for fault in faults:
        first, last = fault.get("steps", (1, len(steps)))
        if fault["op"] == "offset":  # the loader starts some steps later, and ends at the beginning
            steps = steps[fault["by"] :] + steps[: fault["by"]]
            continue
        for at in range(first - 1, last):
            chosen = range(len(steps[at])) if "micro" not in fault else (fault["micro"],)
            steps[at] = tuple(
                _moved(micro_batch, fault, feed.pad) if number in chosen else micro_batch
                for number, micro_batch in enumerate(steps[at])
            )
    return replace(feed, steps=tuple(steps))


def _moved(batch: MicroBatch, fault: Plan, pad: int) -> MicroBatch:
    op, ids, labels, mask = fault["op"], batch.input_ids, batch.labels.copy(), batch.attention_mask
    assert mask is not None
    if op == "labels":  # labels one position off
        labels = np.roll(labels, fault["by"], axis=1)
        labels[:, : fault["by"] + 1] = IGNORED
        return replace(batch, labels=labels)
    if op == "bos":  # the first id twice
        return MicroBatch(
            _after_first(ids, ids[:, :1]), _after_first(labels, np.full((len(ids), 1), IGNORED)), _wide(mask, 1)
        )
    if op == "wider":
        more = [(0, 0), (0, fault["by"])]
        return MicroBatch(
            np.pad(ids, more, constant_values=pad),
            np.pad(labels, more, constant_values=IGNORED),
            np.pad(mask, more, constant_values=0),
        )
    if op == "prompt":  # the first positions of each row are not supervised
        labels[:, : fault["by"] + 1] = IGNORED
        return replace(batch, labels=labels)
    if op == "rows":
        return MicroBatch(ids[::-1].copy(), labels[::-1].copy(), mask[::-1].copy())
    raise ValueError(f"no such change of a batch: {op}")


def _after_first(values: Array, first: Array) -> Array:
    return np.concatenate([first, values], axis=1).astype(values.dtype)


def _wide(mask: Array, by: int) -> Array:
    return np.concatenate([np.ones((len(mask), by), mask.dtype), mask], axis=1)
