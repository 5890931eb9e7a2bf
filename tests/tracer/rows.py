"""Rows to write in tests of the file: every dtype, every state, several shapes."""

from __future__ import annotations

import numpy as np

from tracer.dtypes import float32_to_bf16
from tracer.schema import WHOLE_STEP, Phase, Record, Row, State


def gradients(step: int, count: int = 4, shape: tuple[int, ...] = (8, 16)) -> Row:
    """A `grad` row of float32 records p0, p1 ..., different at every step."""
    rng = np.random.default_rng(step)
    records = tuple(Record(f"p{i}", rng.normal(size=shape).astype(np.float32), "float32", shape) for i in range(count))
    return Row(Phase.GRAD, step, WHOLE_STEP, records)


def references(step: int, count: int = 4, shape: tuple[int, ...] = (8, 16)) -> Row:
    """A `clipped_grad` row that refers to `gradients` of the same step."""
    records = tuple(Record(f"p{i}", None, "float32", shape, alias_of=f"grad/p{i}", stored=False) for i in range(count))
    return Row(Phase.CLIPPED_GRAD, step, WHOLE_STEP, records)


def loss(step: int, micro_batch: int = 0) -> Row:
    """A `loss` row."""
    value = np.array(10.0 / (step + 1) + micro_batch, np.float32)
    return Row(Phase.LOSS, step, micro_batch, (Record("loss", value, "float32", ()),))


def one_of_each(step: int = 0) -> Row:
    """An `init` row with every state, odd shapes, bfloat16, a frozen weight and a tied one."""
    rng = np.random.default_rng(7)
    transposed = rng.normal(size=(6, 3)).astype(np.float32)
    frozen = np.array([1.0, np.nan, np.inf, -np.inf, 0.0], np.float32)
    records = (
        Record("turned", transposed.T, "float32", (3, 6), "turned.original", "T"),
        Record("half", rng.normal(size=5).astype(np.float16), "float16", (5,)),
        Record("brain", float32_to_bf16(rng.normal(size=(2, 2))), "bfloat16", (2, 2)),
        Record("scalar", np.array(2.5), "float64", ()),
        Record("nothing", np.zeros((0, 4), np.float32), "float32", (0, 4)),
        Record("zeros", np.zeros(3, np.float32), "float32", (3,)),
        Record("absent", None, "float32", (2,), state=State.NONE),
        Record("lost", None, "float32", (2,), stored=False, state=State.UNRECORDED),
        Record("frozen", frozen, "float32", (5,), stored=False),
        Record("tied", None, "float32", (5,), alias_of="init/frozen", stored=False),
        Record("flags", np.array([True, False]), "bool", (2,)),
    )
    return Row(Phase.INIT, step, WHOLE_STEP, records)
