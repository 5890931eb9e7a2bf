# ruff: noqa: E501  (one fault a line: a table)
"""Planted faults that only show, or are only told apart, where the inside of a step is recorded: module outputs, gradients of micro-batches.

Of a fault in every layer the first layer's record is the finding: the others got their input from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from tests.bench.accuracy.arms import Arm
from tests.bench.accuracy.fault import BASE, EAGER, EVERY, FACTORS, LIBRARY, NO_CAUSE, SETTING, B, Fault, M, T, pair

TI: Final = replace(T, inside=True)
MI: Final = replace(M, inside=True)
EMBEDDING: Final = "model.embed_tokens"
V1: Final = "model.layers.1.self_attn.v_proj"
# Queries and keys are turned between their projections and the output's, which is the first to differ.
TURNED: Final = "model.layers.{}.self_attn.o_proj.base_layer"


def inside_faults() -> list[Fault]:
    """All of them."""
    return [*scale_faults(), *position_faults(), *function_faults(), *accumulation_faults()]


def _forward(op: str, module: str, by: Any, *, steps: tuple[int, int] | None = None, **more: Any) -> dict[str, Any]:
    return {"forward": [{"op": op, "module": module, "by": by, **({"steps": steps} if steps else {}), **more}]}


def scale_faults() -> list[Fault]:
    """A module's output is scaled."""
    wide = {"model.name": "tiny-gemma3-96", "train.steps": 2}
    gemma = Arm("torch", wide, inside=True)
    mlp, delta = "model.layers.*.mlp", ".lora_delta"
    at = {step: (step, "forward") for step in (1, 2, 3, 4)}
    return [
        pair("forward.scale: embedding x1.01", at[1], (EMBEDDING,), a=TI, **_forward("scale", EMBEDDING, 1.01)),
        pair("forward.scale: embedding x1.0005 at step 4, mlx", at[4], (EMBEDDING,), a=MI, **_forward("scale", EMBEDDING, 1.0005, steps=(4, 4))),
        pair("forward.scale: one mlp x1.1 at step 2, across", at[2], (mlp.replace("*", "1"),), a=TI, b=MI, **_forward("scale", mlp.replace("*", "1"), 1.1, steps=(2, 2))),
        pair("forward.scale: every mlp x1.02 from step 3", at[3], (mlp.replace("*", "0"),), a=TI, **_forward("scale", mlp, 1.02, steps=(3, 5))),
        pair("forward.scale: every mlp x0.9, mlx", at[1], (mlp.replace("*", "0"),), a=MI, **_forward("scale", mlp, 0.9)),
        pair("forward.scale: one adapter x1.5 from step 2", at[2], (V1 + delta,), a=TI, **_forward("adapter", V1, 1.5, steps=(2, 5))),
        pair("forward.scale: every adapter of v x1.2 at step 4, mlx", at[4], (V1.replace("1", "0") + delta,), a=MI, **_forward("adapter", V1.replace("1", "*"), 1.2, steps=(4, 4))),
        pair("forward.scale: Gemma's root of the width in bf16, across", at[1], (EMBEDDING,), a=gemma, b=Arm("mlx", {**wide, "train.compile": False}, source=gemma, inside=True), how=LIBRARY),
    ]  # fmt: skip


def position_faults() -> list[Fault]:
    """Positions are counted otherwise, or turn by another angle."""
    every, one = "model.layers.*.self_attn", "model.layers.2.self_attn"
    first, third = (TURNED.format(0),), (TURNED.format(2),)
    at = {step: (step, "forward") for step in (1, 2, 3, 4)}
    return [
        pair("forward.position: 3 further from 6 on", at[1], first, a=TI, **_forward("positions", every, 3, at=6)),
        pair("forward.position: 1 further from 5 on in one layer at step 4", at[4], third, a=TI, **_forward("positions", one, 1, at=5, steps=(4, 4))),
        pair("forward.position: 2 further from 9 on at step 3, mlx", at[3], first, a=MI, **_forward("positions", every, 2, at=9, steps=(3, 3))),
        pair("forward.position: from 0 again at 8, one layer, across", at[2], third, a=TI, b=MI, **_forward("positions", one, -8, at=8, steps=(2, 2))),
    ]  # fmt: skip


def function_faults() -> list[Fault]:
    """Another rotary table, activation or target; of a table that was not recorded only its effect on the attention is seen."""
    every, one, table = "model.layers.*.self_attn", "model.layers.2.self_attn", "model.rotary_emb"
    act, gelu = (
        "model.layers.*.mlp.act_fn",
        {"model.name": "tiny-gemma3-64", "train.steps": 4, "lora.targets": ["q_proj"]},
    )
    t, g = replace(TI, modules=("*",)), Arm("torch", gelu, inside=True, modules=("*",))
    first, third = (TURNED.format(0),), (TURNED.format(2),)
    at = {step: (step, "forward") for step in (1, 2, 3, 4)}
    return [
        pair("forward.rotary: base 10,500 for 10,000", at[1], (table,), a=t, reaches=EVERY, **_forward("base", table, 10500.0)),
        pair("forward.rotary: base 500,000 for 10,000 from step 3", at[3], (table,), a=t, reaches=EVERY, **_forward("base", table, 500000.0, steps=(3, 5))),
        pair("forward.rotary: angles in bf16", at[1], (table,), a=t, reaches=EVERY, **_forward("angles", table, "bfloat16")),
        pair("forward.rotary: angles in fp16 at step 4", at[4], (table,), a=t, reaches=EVERY, **_forward("angles", table, "float16", steps=(4, 4))),
        pair("forward.rotary: 1.01 times as far, table not recorded, mlx", at[1], first, *NO_CAUSE, a=MI, **_forward("rate", every, 1.01)),
        pair("forward.rotary: 1.1 times as far in one layer at step 4, table not recorded, across", at[4], third, *NO_CAUSE, a=TI, b=MI, **_forward("rate", one, 1.1, steps=(4, 4))),
        pair("forward.rotary: angles in bf16 at step 2, table not recorded", at[2], first, *NO_CAUSE, a=TI, **_forward("angles", every, "bfloat16", steps=(2, 2))),
        pair("loss.shift: labels shifted twice", (1, "loss"), ("token_loss",), a=TI, loss={"shift": 2}),
        pair("loss.shift: labels not shifted from step 4", (4, "loss"), ("token_loss",), a=TI, loss={"shift": 0, "from": 4}),
        pair("loss.shift: labels shifted twice from step 3, across", (3, "loss"), ("token_loss",), a=MI, b=TI, loss={"shift": 2, "from": 3}),
        pair("forward.activation: GELU for SiLU", at[1], (act.replace("*", "0"),), a=t, **_forward("activation", act, "gelu")),
        pair("forward.activation: ReLU for SiLU in one layer from step 3", at[3], (act.replace("*", "2"),), a=t, **_forward("activation", act.replace("*", "2"), "relu", steps=(3, 5))),
        pair("forward.activation: exact GELU for tanh's at step 2", at[2], (act.replace("*", "0"),), a=g, **_forward("activation", act, "gelu", steps=(2, 2))),
    ]  # fmt: skip


def accumulation_faults() -> list[Fault]:
    """Two micro-batches averaged without their token counts, whose lengths are more or less apart."""
    two = {"train.accumulation": 2}
    by_tokens = {"loss.reduction": "token-mean"}

    def short(first: int) -> dict[str, Any]:
        """Most of one micro-batch's labels are not supervised, from a step on."""
        return {"batch": [{"op": "prompt", "by": 14, "micro": 1, "steps": [first, 5]}]}

    t, equal = TI.but(two), TI.but({**two, "data.variable": False}, **short(3))
    apart = t.but(**short(1))
    m = Arm("mlx", {**EAGER, **two}, source=t, inside=True)

    def trainer(source: Arm) -> Arm:
        return Arm("hf-trainer", {**BASE, **source.settings}, source=source, inside=True)

    return [
        pair("grad.mean_of_means: lengths as they are", (1, "grad"), B, a=t, b=trainer(t), how=LIBRARY),
        pair("grad.mean_of_means: one mostly prompt", (1, "grad"), B, a=apart, b=trainer(apart), how=LIBRARY),
        pair("grad.mean_of_means: equal lengths up to step 2", (3, "grad"), FACTORS, a=equal, b=trainer(equal), how=LIBRARY),
        pair("grad.mean_of_means: lengths as they are, mlx", (1, "grad"), B, a=m, how=SETTING, settings=by_tokens),
        pair("grad.mean_of_means: one mostly prompt, across", (1, "grad"), B, a=apart, b=Arm("mlx", {**EAGER, **two}, source=apart, inside=True), how=SETTING, settings=by_tokens),
    ]  # fmt: skip
