"""Build small traces that hang together: a model that computes, gradients that are its own, an optimizer that runs.

`make_trace(path)` trains LoRA factors of a residual linear model in numpy float32 and writes what the recorder would: every
phase follows from the one before, so that replays hold.  `make_trace(path, fault="lr")` plants one fault by name; the
names and what each does are the keys of `FAULTS`.

    h0 = E[ids]    h(l+1) = h(l) + (W + s B A) h(l) / 4    loss = mean over supervised positions of |h(L) - T[label]|^2 / 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tracer.dtypes import float32_to_bf16
from tracer.schema import WHOLE_STEP, Phase, Record, Row, State
from tracer.writer import TraceWriter

IGNORED = -100
F32 = np.float32
HIDDEN, RANK, WORDS, LENGTH = 8, 2, 16, 6


@dataclass(frozen=True)
class Run:
    """Settings of one synthetic run; a fault changes some of them, or what is written at step `at`."""

    steps: int = 3
    layers: tuple[int, ...] = (0, 1, 2)
    depth: int = 3
    micro_batches: int = 2
    rows: int = 2
    lr: float = 1e-2
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    declared_decay: float | None = None
    decay: str = "decoupled"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_place: str = "outside"
    bias_correction: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    clip: str = "none"
    clip_value: float = 1.0
    scale: float = 2.0
    seed: int = 0
    init_seed: int = 1
    noise: float = 0.0
    noise_seed: int = 0
    base_dtype: str = "float32"
    loss_factor: float = 1.0
    grad_factor: float = 1.0
    names: Callable[[str], str] | None = None
    reverse: bool = False
    groups: bool = False
    what: frozenset[Phase] | None = None
    only_steps: frozenset[int] | None = None
    finished: bool = True
    unknown_optimizer: bool = False
    reset_at: int = 0
    reset_names: str = ""
    reset_counter: bool = False
    stuck: str = ""
    # Parameters that the optimizer was not given, and whose gradients it does not clear.
    unheld: str = ""
    at: int = 2
    declared: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Row], Row | None] | None = None
    tamper: Callable[[int, dict[str, np.ndarray]], None] | None = None


_GRADS = (Phase.GRAD, Phase.CLIPPED_GRAD)


def _edit(
    phase: Phase | tuple[Phase, ...],
    change: Callable[[Record], Record | None],
    *,
    name: str = "",
    micro_batch: int | None = None,
) -> Callable[[Run], Run]:
    """A fault that changes the records of a phase whose name contains `name` at step `at` (init: step 0)."""
    phases = phase if isinstance(phase, tuple) else (phase,)

    def fault(run: Run) -> Run:
        def edit(row: Row) -> Row | None:
            at = 0 if phase is Phase.INIT else run.at
            elsewhere = micro_batch is not None and row.micro_batch != micro_batch
            if row.phase not in phases or row.step != at or elsewhere:
                return row
            changed = (change(record) if name in record.name else record for record in row.records)
            records = tuple(record for record in changed if record is not None)
            return replace(row, records=records) if records else None

        return replace(run, edit=edit)

    return fault


def _tamper(change: Callable[[np.ndarray], None]) -> Callable[[Run], Run]:
    """A fault in the backward pass: one gradient is changed at step `at`, and everything after follows from it."""

    def fault(run: Run) -> Run:
        def tamper(step: int, grads: dict[str, np.ndarray]) -> None:
            for name, gradient in grads.items():
                if step == run.at and _B1 in name:
                    change(gradient.reshape(-1))

        return replace(run, tamper=tamper)

    return fault


def _set(flat: int, value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[flat] = value

    return change


def _with(record: Record, data: np.ndarray) -> Record:
    return replace(record, data=data, shape=data.shape, alias_of="", stored=True)


def _without(record: Record, state: State) -> Record:
    return replace(record, data=None, state=state, alias_of="", stored=False)


def _poke(record: Record, value: float, flat: int = 3) -> Record:
    assert record.data is not None
    data = record.data.copy()
    data.reshape(-1)[flat] = value
    return _with(record, data)


def _add(record: Record, value: float, flat: int = 3) -> Record:
    assert record.data is not None
    return _poke(record, float(record.data.reshape(-1)[flat]) + value, flat)


_B1 = "layers.1.self_attn.q_proj.lora_B"
_A1 = "layers.1.self_attn.q_proj.lora_A"

# Name of a fault -> what it does to a run.  `at` is the step of those that happen at one step.
FAULTS: dict[str, Callable[[Run], Run]] = {
    "lr": lambda run: replace(run, lr=run.lr * 1.01),
    "weight_decay": lambda run: replace(run, weight_decay=0.2),
    "bias_correction": lambda run: replace(run, bias_correction=not run.bias_correction),
    "no_decay": lambda run: replace(run, declared_decay=run.weight_decay, weight_decay=0.0),
    "coupled_decay": lambda run: replace(run, decay="coupled"),
    "eps_inside": lambda run: replace(run, eps_place="inside"),
    "eps_before": lambda run: replace(run, eps_place="before"),
    "nesterov": lambda run: replace(run, nesterov=True),
    "clip_value": lambda run: replace(run, clip="value", clip_value=0.01),
    "clip_norm": lambda run: replace(run, clip="norm", clip_value=0.02),
    "clip_tensor": lambda run: replace(run, clip="tensor", clip_value=0.02),
    "clip_unknown": lambda run: replace(run, clip="sign"),
    "init_draw": lambda run: replace(run, init_seed=99),
    "init_ulp": _edit(Phase.INIT, lambda r: _with(r, np.nextafter(r.data, F32(9))), name=_A1),
    "init_names": lambda run: replace(run, layers=run.layers[1:]),
    "init_frozen": _edit(
        Phase.INIT, lambda r: replace(r, data=r.data * F32(1.5)), name="layers.1.self_attn.q_proj.weight"
    ),
    "init_cast": lambda run: replace(run, base_dtype="bfloat16"),
    "lora_scale": lambda run: replace(run, scale=run.scale * 2),
    "batch_order": lambda run: replace(run, seed=run.seed + 7),
    "label_masked": _edit(Phase.BATCH, lambda r: _poke(r, IGNORED, 4), name="labels", micro_batch=1),
    "batch_wider": _edit(Phase.BATCH, lambda r: _with(r, np.pad(r.data, ((0, 0), (0, 1)))), name="input_ids"),
    "micro_batches": lambda run: replace(run, micro_batches=run.micro_batches + 1),
    "loss_factor": lambda run: replace(run, loss_factor=2.0),
    "grad_factor": lambda run: replace(run, grad_factor=1.001),
    "grad_none": _edit(_GRADS, lambda r: _without(r, State.NONE), name=_B1),
    "grad_unrecorded": _edit(_GRADS, lambda r: _without(r, State.UNRECORDED), name=_B1),
    "grad_zero": _tamper(lambda values: values.fill(0)),
    "grad_element": _tamper(_set(3, 0.25)),
    "grad_nan": _tamper(_set(3, math.nan)),
    "grad_inf": _tamper(_set(3, math.inf)),
    "grad_shape": _edit(Phase.GRAD, lambda r: _with(r, r.data.T.copy()), name=_B1),
    "grad_missing": _edit(_GRADS, lambda r: None, name=_B1),
    "grad_row": _edit(_GRADS, lambda r: None),
    "moment": _edit(Phase.OPT_STATE, lambda r: _add(r, 1e-3), name=_B1 + ".weight/exp_avg"),
    "counter": _edit(Phase.OPT_STATE, lambda r: _with(r, r.data + 5), name="step"),
    "param_element": _edit(Phase.PARAM, lambda r: _add(r, 1e-3), name=_B1),
    "param_stuck": lambda run: replace(run, stuck=_B1),
    "eval": _edit(Phase.EVAL, lambda r: _with(r, r.data * F32(1.01))),
    "step_missing": lambda run: replace(run, only_steps=frozenset({0, *range(1, run.steps + 1)} - {run.at})),
    "steps_fewer": lambda run: replace(run, steps=run.steps - 1),
    "unfinished": lambda run: replace(run, steps=run.steps - 1, finished=False),
}


def make_trace(path: Path, *, fault: str | None = None, **settings: Any) -> Path:
    """Write a synthetic trace and return its path.  `settings` are fields of `Run`."""
    run = Run(**settings)
    if fault is not None:
        run = FAULTS[fault](run)
    declared = {"lora.rank": RANK, "optimizer.lr": run.lr, **run.declared}
    writer = TraceWriter(path, env={"python": "3"}, declared=declared, overwrite=True)
    observed = {"framework": "numpy", "model.dtype": run.base_dtype, **run.observed}
    if run.groups:
        observed["optimizer.groups"] = _members(run)
    for step, rows in enumerate(Trainer(run).rows()):
        if run.only_steps is not None and step not in run.only_steps:
            continue
        kept = [changed for row in rows if (changed := _apply(run, row)) is not None]
        writer.write_step(step, kept, observed if step <= 1 else None)
    writer.finish(finished=run.finished, reason="" if run.finished else "killed")
    return path


def _apply(run: Run, row: Row) -> Row | None:
    if run.what is not None and row.phase not in run.what:
        return None
    changed = row if run.edit is None else run.edit(row)
    if changed is None:
        return None
    records = tuple(_rename(run, record) for record in changed.records)
    return replace(changed, records=records[::-1] if run.reverse else records)


def _rename(run: Run, record: Record) -> Record:
    if run.names is None:
        return record
    label, slash, target = record.alias_of.partition("/")
    return replace(record, name=run.names(record.name), alias_of=label + slash + (run.names(target) if target else ""))


def _members(run: Run) -> dict[str, list[str]]:
    names = [_factor(layer, kind) for layer in run.layers for kind in "AB"]
    return {"group0": names[::2], "group1": names[1::2]}


def _module(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj"


def _factor(layer: int, kind: str) -> str:
    return f"{_module(layer)}.lora_{kind}.weight"


class Trainer:
    """The synthetic run itself."""

    def __init__(self, run: Run) -> None:
        self.run = run
        frozen = np.random.default_rng(1234)
        self.embed = frozen.normal(size=(WORDS, HIDDEN)).astype(F32)
        self.targets = frozen.normal(size=(WORDS, HIDDEN)).astype(F32)
        self.weights = [frozen.normal(size=(HIDDEN, HIDDEN)).astype(F32) * F32(0.3) for _ in range(run.depth)]
        draw = np.random.default_rng(run.init_seed)
        self.params: dict[str, np.ndarray] = {}
        for layer in range(run.depth):
            a = draw.uniform(-0.35, 0.35, size=(RANK, HIDDEN)).astype(F32)
            if layer in run.layers:
                self.params[_factor(layer, "A")] = a
                self.params[_factor(layer, "B")] = np.zeros((HIDDEN, RANK), F32)
        self.state: dict[str, np.ndarray] = {}
        self.piled: dict[str, np.ndarray] = {}
        self.jitter = np.random.default_rng(run.noise_seed)
        self.data = np.random.default_rng(run.seed)

    def rows(self) -> Iterable[list[Row]]:
        """Rows of step 0, 1, …"""
        yield [Row(Phase.INIT, 0, WHOLE_STEP, tuple(self._init()))]
        for step in range(1, self.run.steps + 1):
            yield self._step(step)

    def _init(self) -> Iterable[Record]:
        for name, value in self.params.items():
            yield record(name, value.copy())
        for layer in self.run.layers:
            yield record(f"{_module(layer)}.lora_scale", np.float64(self.run.scale))
        for name, value in self._frozen():
            bits = float32_to_bf16(value) if self.run.base_dtype == "bfloat16" else value
            yield replace(record(name, bits, dtype=self.run.base_dtype), stored=False)
        yield Record("lm_head.weight", None, self.run.base_dtype, self.embed.shape,
                     alias_of="init/model.embed_tokens.weight", stored=False)  # fmt: skip
        yield record("rng.numpy", np.array([self.run.seed, self.run.init_seed], np.int64))

    def _frozen(self) -> Iterable[tuple[str, np.ndarray]]:
        yield "model.embed_tokens.weight", self.embed
        for layer, weight in enumerate(self.weights):
            yield f"{_module(layer)}.weight", weight

    def _step(self, step: int) -> list[Row]:
        rows = [Row(Phase.HPARAMS, step, WHOLE_STEP, tuple(self._hparams()))]
        grads = {name: np.zeros_like(value) for name, value in self.params.items()}
        for micro in range(self.run.micro_batches):
            ids, labels = self._batch()
            with np.errstate(invalid="ignore", over="ignore"):
                loss = self._backward(ids, labels, grads)
            batch = (
                record("input_ids", ids),
                record("labels", labels),
                record("tokens", np.int64((labels >= 0).sum())),
            )
            rows += [Row(Phase.BATCH, step, micro, batch), Row(Phase.LOSS, step, micro, (record("loss", loss),))]
        grads = {name: self._noisy(g * F32(self.run.grad_factor / self.run.micro_batches)) for name, g in grads.items()}
        for name in grads:
            if not self._holds(name):
                self.piled[name] = grads[name] = grads[name] + self.piled.get(name, F32(0))
        if self.run.tamper is not None:
            self.run.tamper(step, grads)
        held = {name: g for name, g in grads.items() if self._holds(name)}
        clipped = self._clip(held)
        rows.append(Row(Phase.GRAD, step, WHOLE_STEP, tuple(record(name, g.copy()) for name, g in grads.items())))
        rows.append(Row(Phase.CLIPPED_GRAD, step, WHOLE_STEP, tuple(_clipped_records(held, clipped))))
        with np.errstate(invalid="ignore", over="ignore"):
            self._forget(step)
            self._update(step, clipped)
        state = [record(name, value.copy()) for name, value in self.state.items()]
        if self.run.optimizer == "adamw":
            state.append(record("step", np.int64(self._counter(step))))
        if state:
            rows.append(Row(Phase.OPT_STATE, step, WHOLE_STEP, tuple(state)))
        rows.append(Row(Phase.PARAM, step, WHOLE_STEP, tuple(record(n, v.copy()) for n, v in self.params.items())))
        rows.append(Row(Phase.EVAL, step, WHOLE_STEP, (record("score", F32(loss)),)))
        return rows

    def _holds(self, name: str) -> bool:
        return not self.run.unheld or self.run.unheld not in name

    def _hparams(self) -> Iterable[Record]:
        run = self.run
        decay = run.weight_decay if run.declared_decay is None else run.declared_decay
        values = {"lr": run.lr, "weight_decay": decay}
        if run.optimizer == "adamw":
            values |= {"beta1": run.beta1, "beta2": run.beta2, "eps": run.eps}
        else:
            values["momentum"] = run.momentum
        for group in ("group0", "group1") if run.groups else ("group0",):
            for key, value in values.items():
                yield record(f"{group}.{key}", np.float64(value))
            if run.optimizer == "adamw":
                yield record(f"{group}.bias_correction", np.bool_(run.bias_correction))

    def _batch(self) -> tuple[np.ndarray, np.ndarray]:
        ids = self.data.integers(0, WORDS, size=(self.run.rows, LENGTH))
        labels = ids.copy()
        labels[:, 0] = IGNORED
        return ids, labels

    def _backward(self, ids: np.ndarray, labels: np.ndarray, grads: dict[str, np.ndarray]) -> np.ndarray:
        """Add this micro-batch's gradients; returns its loss.

        Computed in float64 and rounded, so that the numbers do not depend on the order in which a BLAS adds.
        """
        hidden = [self.embed[ids].reshape(-1, HIDDEN).astype(np.float64)]
        for layer in range(self.run.depth):
            hidden.append(hidden[-1] + hidden[-1] @ self._effective(layer).T / 4)
        keep = labels.reshape(-1) >= 0
        error = np.where(keep[:, None], hidden[-1] - self.targets[np.maximum(labels.reshape(-1), 0)], 0.0)
        back = error * (self.run.loss_factor / keep.sum())
        for layer in reversed(range(self.run.depth)):
            if layer in self.run.layers:
                a, b = self.params[_factor(layer, "A")], self.params[_factor(layer, "B")]
                scale = self.run.scale / 4
                grads[_factor(layer, "B")] += (scale * back.T @ (hidden[layer] @ a.T)).astype(F32)
                grads[_factor(layer, "A")] += (scale * (back @ b).T @ hidden[layer]).astype(F32)
            back = back + back @ self._effective(layer) / 4
        return self._noisy(np.asarray((error * error).sum() * self.run.loss_factor / keep.sum() / 2, F32))

    def _effective(self, layer: int) -> np.ndarray:
        weight = self.weights[layer].astype(np.float64)
        if layer not in self.run.layers:
            return weight
        a, b = self.params[_factor(layer, "A")].astype(np.float64), self.params[_factor(layer, "B")]
        return weight + self.run.scale * (b @ a)

    def _noisy(self, values: np.ndarray) -> np.ndarray:
        if not self.run.noise:
            return values.astype(F32)
        size = float(np.sqrt(np.mean(np.square(values))))
        return (values + self.run.noise * size * self.jitter.normal(size=values.shape)).astype(F32)

    def _clip(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        limit = F32(self.run.clip_value)
        if self.run.clip == "value":
            return {name: np.clip(g, -limit, limit) for name, g in grads.items()}
        if self.run.clip == "norm":
            factor = limit / (F32(math.sqrt(sum(float((g * g).sum()) for g in grads.values()))) + F32(1e-6))
            return {name: g * min(F32(1), factor) for name, g in grads.items()}
        if self.run.clip == "tensor":
            return {n: g * min(F32(1), limit / (F32(np.linalg.norm(g)) + F32(1e-6))) for n, g in grads.items()}
        if self.run.clip == "sign":
            return {name: (np.sign(g) * np.sqrt(np.abs(g))).astype(F32) for name, g in grads.items()}
        return grads

    def _forget(self, step: int) -> None:
        """Lose the optimizer's state before this step, that of some parameters or of all."""
        if step == self.run.reset_at:
            self.state = {name: value for name, value in self.state.items() if self.run.reset_names not in name}

    def _counter(self, step: int) -> int:
        again = self.run.reset_counter and 0 < self.run.reset_at <= step
        return step - self.run.reset_at + 1 if again else step

    def _update(self, step: int, grads: dict[str, np.ndarray]) -> None:
        for name, g in grads.items():
            w = self.params[name]
            if self.run.decay == "coupled" or self.run.optimizer == "sgd":
                g = g + F32(self.run.weight_decay) * w
            sgd = self.run.optimizer == "sgd"
            self.params[name] = self._sgd(name, w, g) if sgd else self._adam(name, w, g, self._counter(step))
            if self.run.stuck and self.run.stuck in name and step == self.run.at:
                self.params[name] = w
            if self.run.unknown_optimizer:
                self.params[name] = (w - F32(self.run.lr) * np.sign(g) * np.abs(g) ** F32(0.5)).astype(F32)

    def _adam(self, name: str, w: np.ndarray, g: np.ndarray, step: int) -> np.ndarray:
        run = self.run
        m = self.state.get(f"{name}/exp_avg", np.zeros_like(w)) * F32(run.beta1) + F32(1 - run.beta1) * g
        v = self.state.get(f"{name}/exp_avg_sq", np.zeros_like(w)) * F32(run.beta2) + F32(1 - run.beta2) * g * g
        self.state[f"{name}/exp_avg"], self.state[f"{name}/exp_avg_sq"] = m, v
        c1, c2 = (1 - run.beta1**step, 1 - run.beta2**step) if run.bias_correction else (1.0, 1.0)
        if run.eps_place == "inside":
            denominator = np.sqrt(v / F32(c2) + F32(run.eps))
        elif run.eps_place == "before":
            denominator = (np.sqrt(v) + F32(run.eps)) / F32(math.sqrt(c2))
        else:
            denominator = np.sqrt(v) / F32(math.sqrt(c2)) + F32(run.eps)
        if run.decay == "decoupled":
            w = w * F32(1 - run.lr * run.weight_decay)
        return (w - F32(run.lr / c1) * m / denominator).astype(F32)

    def _sgd(self, name: str, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        run = self.run
        if not run.momentum:
            return w - F32(run.lr) * g
        key = f"{name}/momentum_buffer"
        buffer = F32(run.momentum) * self.state[key] + g if key in self.state else g
        self.state[key] = buffer
        return w - F32(run.lr) * (g + F32(run.momentum) * buffer if run.nesterov else buffer)


def _clipped_records(grads: dict[str, np.ndarray], clipped: dict[str, np.ndarray]) -> Sequence[Record]:
    if all(clipped[name] is g for name, g in grads.items()):
        return [replace(record(name, g), data=None, stored=False, alias_of=f"grad/{name}") for name, g in grads.items()]
    return [record(name, value.copy()) for name, value in clipped.items()]


def record(name: str, value: Any, *, dtype: str | None = None) -> Record:
    """A stored record of a numpy value; `dtype` where the bits are bfloat16's."""
    data = np.asarray(value)
    return Record(name, data, dtype or str(data.dtype), data.shape, original=name)
