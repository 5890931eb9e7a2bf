# ruff: noqa: E501  (one fault a line: a table)
"""The planted faults: each a pair of arms, where the first finding must be, and which cause must come first.

What is expected follows from the fault alone, see `fault`.  At step 1 lora_B is 0, so the gradients of lora_A are 0 and a
fault in "all gradients" is one of all lora_B.
"""

from __future__ import annotations

from typing import Any, Final

from tests.bench.accuracy.arms import Arm
from tests.bench.accuracy.fault import (
    ALL,
    BASE,
    D2A,
    D2B,
    EAGER,
    EDIT,
    EVERY,
    FACTORS,
    LIBRARY,
    NO_CAUSE,
    ONE,
    Q1B,
    SETTING,
    SEVERAL,
    A,
    B,
    Fault,
    M,
    T,
    pair,
)
from tests.bench.accuracy.faults_inside import inside_faults


def _grad(op: str, *, steps: tuple[int, int] | None = None, names: str = "*", **more: Any) -> dict[str, Any]:
    return {"grad": [{"op": op, "names": names, **({"steps": steps} if steps else {}), **more}]}


def gradient_faults() -> list[Fault]:
    """Faults in the backward pass."""
    at = {2: (2, "grad"), 3: (3, "grad"), 4: (4, "grad")}
    return [
        pair("grad.scale: all x2 from step 1", (1, "grad"), B, **_grad("scale", by=2.0)),
        pair("grad.scale: all x1.2 at step 4", at[4], ALL, **_grad("scale", by=1.2, steps=(4, 4))),
        pair("grad.scale: one x1.2 at step 2, mlx", at[2], (Q1B,), a=M, **_grad("scale", by=1.2, steps=(2, 2), names=Q1B)),
        pair("grad.scale: all x1.01 from step 1, across", (1, "grad"), B, b=M, **_grad("scale", by=1.01)),
        pair("grad.scale: lora_A x0.5 from step 3, mlx", at[3], A, a=M, **_grad("scale", by=0.5, steps=(3, 5), names=A[0])),
        pair("grad.scale: one x1.02 at step 4, across", at[4], (D2A,), b=M, **_grad("scale", by=1.02, steps=(4, 4), names=D2A)),
        pair("grad.zero: one at step 2", at[2], (Q1B,), **_grad("zero", steps=(2, 2), names=Q1B)),
        pair("grad.zero: a layer at step 4, mlx", at[4], ("*.layers.3.*",), a=M, **_grad("zero", steps=(4, 4), names="*.layers.3.*")),
        pair("grad.zero: one at step 4, across", at[4], (D2A,), b=M, **_grad("zero", steps=(4, 4), names=D2A)),
        pair("grad.zero: all at step 3", at[3], ALL, **_grad("zero", steps=(3, 3))),
        pair("grad.missing: every lora_A at step 3", at[3], A, **_grad("none", steps=(3, 3), names=A[0])),
        pair("grad.missing: one at step 2", at[2], (Q1B,), **_grad("none", steps=(2, 2), names=Q1B)),
        pair("grad.missing: v_proj at step 4", at[4], ("*.v_proj.*",), **_grad("none", steps=(4, 4), names="*.v_proj.*")),
        pair("grad.stale: not cleared at step 3", at[3], ALL, **_grad("stale", steps=(3, 3))),
        pair("grad.stale: one not cleared at step 4, mlx", at[4], (Q1B,), a=M, **_grad("stale", steps=(4, 4), names=Q1B)),
        pair("grad.stale: used again at step 2", at[2], B, **_grad("again", steps=(2, 2), names=B[0])),
        pair("grad.stale: not cleared at step 3, across", at[3], ALL, b=M, **_grad("stale", steps=(3, 3))),
        pair("sign: one at step 2, mlx", at[2], (Q1B,), a=M, **_grad("scale", by=-1.0, steps=(2, 2), names=Q1B)),
        pair("sign: all at step 4", at[4], ALL, **_grad("scale", by=-1.0, steps=(4, 4))),
        pair("sign: one at step 4, across", at[4], (D2A,), b=M, **_grad("scale", by=-1.0, steps=(4, 4), names=D2A)),
        pair("layout.permutation: rows by 1, one at step 2", at[2], (D2B,), **_grad("roll", by=1, steps=(2, 2), names=D2B)),
        pair("layout.permutation: reversed, lora_B at step 4, mlx", at[4], B, a=M, **_grad("reverse", steps=(4, 4), names=B[0])),
        *square_faults(),
        pair("precision.rounding: all to bf16 from step 1", (1, "grad"), B, **_grad("round", by="bfloat16")),
        pair("precision.rounding: one to fp16 at step 4, mlx", at[4], (D2A,), a=M, **_grad("round", by="float16", steps=(4, 4), names=D2A)),
        pair("precision.rounding: all to bf16 at step 3, across", at[3], ALL, b=M, **_grad("round", by="bfloat16", steps=(3, 3))),
        pair("precision.overflow: inf in one at step 2", at[2], (Q1B,), **_grad("set", by="inf", flat=5, steps=(2, 2), names=Q1B)),
        pair("precision.overflow: nan in one at step 4, mlx", at[4], (D2A,), a=M, **_grad("set", by="nan", flat=5, steps=(4, 4), names=D2A)),
        pair("precision.overflow: inf in all at step 3", at[3], ALL, **_grad("set", by="inf", flat=5, steps=(3, 3))),
        pair("rng.dropout: 10 % of all at step 2", at[2], B, **_grad("drop", by=0.1, steps=(2, 2), names=B[0])),
        pair("rng.dropout: half of one at step 4, mlx", at[4], (D2A,), a=M, **_grad("drop", by=0.5, steps=(4, 4), names=D2A)),
        pair("rng.dropout: another 10 % at step 3", at[3], B, a=T.but(**_grad("drop", by=0.1, steps=(3, 3), names=B[0])),
              b=T, **_grad("drop", by=0.1, steps=(3, 3), names=B[0], seed=1)),
        pair("corrupt.elements: one gradient element by 10 rms at step 2", at[2], (D2B,), **_grad("element", by=10, flat=7, steps=(2, 2), names=D2B)),
        pair("corrupt.elements: one gradient element by 0.1 rms at step 4, mlx", at[4], (D2A,), a=M, **_grad("element", by=0.1, flat=7, steps=(4, 4), names=D2A)),
    ]  # fmt: skip


def square_faults() -> list[Fault]:
    """Transposed gradients; rank 64 makes lora_A of a 64 wide model square."""
    wide = {"lora.rank": 64, "lora.targets": ["q_proj"]}
    t, name = T.but(wide), "model.layers.1.self_attn.q_proj.lora_A.weight"
    m = Arm("mlx", {**EAGER, **wide}, source=t)
    return [
        pair("layout.transpose: one at step 2", (2, "grad"), (name,), a=t, **_grad("transpose", steps=(2, 2), names=name)),
        pair("layout.transpose: lora_A at step 4, mlx", (4, "grad"), A, a=m, **_grad("transpose", steps=(4, 4), names=A[0])),
    ]  # fmt: skip


def start_faults() -> list[Fault]:
    """Faults in what a run starts from."""
    init, q = (0, "init"), "model.layers.{}.self_attn.q_proj.lora_A.weight"
    fed = Arm("torch", BASE, source=T)
    one = q.format(1)
    swap = {"adapters": [{"op": "swap", "names": "model.layers.[01].self_attn.q_proj.lora_A.weight"}]}
    return [
        pair("init.names: 3 of 4 layers", init, ("*.layers.0.*.weight",), b=fed, how=SETTING, settings={"lora.layers": 3}),
        pair("init.names: q and v only, mlx", init, ("*.k_proj.*.weight", "*.o_proj.*.weight", "*.mlp.*.weight"), a=M, how=SETTING, settings={"lora.targets": ["q_proj", "v_proj"]}),
        pair("init.names: 3 of 4 layers, across", init, ("*.layers.0.*.weight",), b=M, how=SETTING, settings={"lora.layers": 3}),
        pair("init.draw: seed", init, A, how=SETTING, settings={"train.seed": 1}),
        pair("init.draw: one drawn again, mlx", init, (one,), a=M, adapters=[{"op": "redraw", "names": one}]),
        pair("init.draw: own draw, across", init, A, b=Arm("mlx", EAGER), how=SETTING),
        pair("init.scale: all x1.732, mlx", init, A, a=M, adapters=[{"op": "scale", "names": A[0], "by": 1.7320508}]),
        pair("init.scale: one x1.01", init, (one,), b=fed, adapters=[{"op": "scale", "names": one, "by": 1.01}]),
        pair("init.swapped: two tensors", init, (q.format(0), one), b=fed, **swap),
        pair("init.swapped: two tensors, mlx", init, (q.format(0), one), a=M, **swap),
        pair("init.swapped: gate and up of one layer", init, ("model.layers.2.mlp.gate_proj.lora_A.weight", "model.layers.2.mlp.up_proj.lora_A.weight"), b=fed, adapters=[{"op": "swap", "names": "model.layers.2.mlp.[gu]*_proj.lora_A.weight"}]),
        pair("init.frozen: one weight x1.5", init, ("model.layers.1.self_attn.q_proj.weight",), base={"name": "model.layers.1.self_attn.q_proj.weight", "factor": 1.5}),
        pair("init.frozen: one norm x1.001, mlx", init, ("model.norm.weight",), a=M, base={"name": "model.norm.weight", "factor": 1.001}),
        pair("init.frozen: base in bf16, mlx", init, ("model.*norm.weight", "model.*proj.weight", "model.embed_tokens.weight"), a=M, how=SETTING, settings={"model.dtype": "bfloat16"}),
        pair("precision.rounding: adapters to bf16", init, A, b=fed, adapters=[{"op": "round", "names": A[0], "by": "bfloat16"}]),
        pair("precision.rounding: one adapter to fp16, mlx", init, (one,), a=M, adapters=[{"op": "round", "names": one, "by": "float16"}]),
        pair("layout.permutation: rows of one adapter reversed, mlx", init, (one,), a=M, adapters=[{"op": "reverse", "names": one}]),
        pair("lora.scale: alpha 32", init, ("*.lora_scale",), how=SETTING, settings={"lora.alpha": 32}),
        pair("lora.scale: alpha 16.1, across", init, ("*.lora_scale",), b=M, how=SETTING, settings={"lora.alpha": 16.1}),
    ]  # fmt: skip


def data_faults() -> list[Fault]:
    """Faults in batches and loss."""
    four = {"train.batch": 4}
    two = {"train.batch": 2, "train.accumulation": 2}
    scaled = (1, "loss")
    counted = T.but(positions={"form": "counted"})
    dropped = T.but({"lora.dropout": 0.1})
    return [
        pair("batch.shift: labels by 1 at step 2", (2, "batch"), ("labels", "tokens"), batch=[{"op": "labels", "by": 1, "steps": [2, 2]}]),
        pair("batch.shift: BOS twice from step 1, mlx", (1, "batch"), ALL, a=M, batch=[{"op": "bos"}]),
        pair("batch.shift: BOS twice at step 4", (4, "batch"), ALL, batch=[{"op": "bos", "steps": [4, 4]}]),
        pair("batch.order: shuffled", (1, "batch"), ALL, how=SETTING, settings={"data.order": "shuffled", "data.rows": 10}, a=T.but({"data.rows": 10})),
        pair("batch.order: rows turned round at step 3, mlx", (3, "batch"), ALL, a=M, batch=[{"op": "rows", "steps": [3, 3]}]),
        pair("batch.order: loader one step on", (1, "batch"), ALL, batch=[{"op": "offset", "by": 1}]),
        pair("batch.order: 4 rows or 2 x 2", (1, "batch"), ALL, a=T.but(four), b=T, how=SETTING, settings=two),
        pair("batch.padding: 1 wider at step 2", (2, "batch"), ALL, batch=[{"op": "wider", "by": 1, "steps": [2, 2]}]),
        pair("batch.padding: 8 wider from step 1, mlx", (1, "batch"), ALL, a=M, batch=[{"op": "wider", "by": 8}]),
        pair("batch.padding: 3 wider at step 4, mlx", (4, "batch"), ALL, a=M, batch=[{"op": "wider", "by": 3, "steps": [4, 4]}]),
        pair("batch.mask: one label at step 1, across", (1, "batch"), ("labels", "tokens"), b=M, how=SETTING, settings={"data.mask_label": [1, 4]}),
        pair("batch.mask: one label at step 4", (4, "batch"), ("labels", "tokens"), how=SETTING, settings={"data.mask_label": [0, 3], "data.mask_step": 4}),
        pair("batch.mask: prompts of 4 from step 1, mlx", (1, "batch"), ("labels", "tokens"), a=M, batch=[{"op": "prompt", "by": 4}]),
        pair("batch.order: another order, across", (1, "batch"), ("input_ids", "labels", "tokens"), a=T.but({"data.rows": 10}), b=Arm("mlx", {**EAGER, "data.rows": 10}, source=T.but({"data.rows": 10}), fed=False), how=SETTING, settings={"data.order": "shuffled"}),
        pair("batch.positions: begun again at 6", (1, "batch"), ("position_ids",), a=counted, positions={"form": "restart", "at": 6}),
        pair("batch.positions: begun again at 4 from step 3", (3, "batch"), ("position_ids",), a=counted, positions={"form": "restart", "at": 4, "from": 3}),
        pair("batch.positions: from 2 on at step 4", (4, "batch"), ("position_ids",), a=counted, positions={"form": "offset", "by": 2, "from": 4}),
        pair("config.differs: other texts", (1, "batch"), ALL, "config.differs data.seed", how=SETTING, settings={"data.seed": 1}),
        pair("config.differs: rows cut at 16, mlx", (2, "batch"), ALL, "config.differs data.row_length", a=Arm("mlx", EAGER, source=T, fed=False), how=SETTING, settings={"data.row_length": 16}),
        pair("config.differs: rows cut at 18", (3, "batch"), ALL, "config.differs data.row_length", a=T.but({"data.seed": 19}), how=SETTING, settings={"data.row_length": 18}),
        pair("loss.reduction: x2", scaled, ("loss",), loss={"factor": 2.0}),
        pair("loss.reduction: x1.3, mlx", scaled, ("loss",), a=M, loss={"factor": 1.3}),
        pair("loss.reduction: by rows", scaled, ("loss",), loss={"denominator": "rows"}),
        pair("loss.reduction: by all positions, across", scaled, ("loss",), b=M, loss={"denominator": "all"}),
        pair("loss.precision: bf16", scaled, ("loss",), loss={"dtype": "bfloat16"}),
        pair("loss.reduction: x1.1 from step 4", (4, "loss"), ("loss",), loss={"factor": 1.1, "from": 4}),
        pair("loss.precision: bf16 from step 4, mlx", (4, "loss"), ("loss",), a=M, loss={"dtype": "bfloat16", "from": 4}),
        pair("loss.precision: fp16, mlx", scaled, ("loss",), a=M, loss={"dtype": "float16"}),
        pair("model.mode: evaluation from step 1", (1, "grad"), B, a=dropped, mode={"from": 1}),
        pair("model.mode: evaluation from step 4", (4, "loss"), ("loss",), a=dropped, reaches=EVERY, mode={"from": 4}),
        pair("rng.dropout: LoRA dropout 0.1 or none", (1, "grad"), B, "rng.dropout", "config.differs lora.dropout", how=SETTING, settings={"lora.dropout": 0.1}),
        pair("rng.dropout: LoRA dropout 0.05 of another seed", (1, "grad"), B, "rng.dropout", "config.differs train.seed", a=Arm("mlx", {**EAGER, "lora.dropout": 0.05}, source=T), how=SETTING, settings={"train.seed": 1}),
    ]  # fmt: skip


# The fourth parameter in the order of the torch optimizer's group.
FOURTH: Final = "model.layers.0.self_attn.k_proj.lora_B.weight"


def optimizer_faults() -> list[Fault]:
    """Faults in schedule, clipping and optimizer."""
    hparams, clipped, param, state = (1, "hparams"), (1, "clipped_grad"), (1, "param"), (1, "opt_state")
    norm = {"clip.mode": "norm", "clip.value": 0.1}
    tensor = {"mode": "tensor", "value": 0.01}
    linear, cosine = {"optimizer.schedule": "linear"}, {"optimizer.schedule": "cosine"}
    decay = {"optimizer.weight_decay": 0.1}
    lr = ("group0.lr",)
    few = {"lora.rank": 4, "lora.targets": ["q_proj", "v_proj"]}
    small, small_mlx = Arm("torch", {**BASE, **few}, source=T.but(few)), Arm("mlx", {**EAGER, **few}, source=T.but(few))
    return [
        pair("schedule.lr: x2", hparams, lr, how=SETTING, settings={"optimizer.lr": 2e-3}),
        pair("schedule.lr: x1.01, across", hparams, lr, b=M, how=SETTING, settings={"optimizer.lr": 1.01e-3}),
        pair("schedule.lr: warm-up of 2, mlx", hparams, lr, a=M, how=SETTING, settings={"optimizer.warmup": 2}),
        pair("schedule.lr: linear, advanced twice a step", (2, "hparams"), lr, a=T.but(linear), schedule={"times": 2}),
        pair("schedule.lr: cosine, one step on, mlx", hparams, lr, a=M.but(cosine), schedule={"plus": 1}),
        pair("schedule.lr: linear, one step behind from step 4", (4, "hparams"), lr, a=T.but(linear), schedule={"plus": -1, "after": 3}),
        pair("schedule.lr: cosine, one step on from step 3, mlx", (3, "hparams"), lr, a=M.but(cosine), schedule={"plus": 1, "after": 2}),
        pair("clip.value: 0.01", clipped, B, how=SETTING, settings={"clip.mode": "value", "clip.value": 0.01}),
        pair("clip.value: 0.05, mlx", clipped, B, a=M, how=SETTING, settings={"clip.mode": "value", "clip.value": 0.05}),
        pair("clip.value: 0.01, across", clipped, B, b=M, how=SETTING, settings={"clip.mode": "value", "clip.value": 0.01}),
        pair("clip.norm: 0.1 or none, mlx", clipped, B, a=M, how=SETTING, settings=norm),
        pair("clip.norm: 0.1 or 0.11", clipped, B, a=T.but(norm), how=SETTING, settings={"clip.value": 0.11}),
        pair("clip.norm: 0.1 or none, across", clipped, B, b=M, how=SETTING, settings=norm),
        pair("clip.tensor: 0.01", clipped, B, clip=tensor),
        pair("clip.tensor: 0.01, mlx", clipped, B, a=M, clip=tensor, settings=norm),
        pair("clip.none: declared and not done", clipped, B, a=T.but(norm), clip={"mode": "none"}),
        pair("clip.none: declared and not done, mlx", clipped, B, a=M.but(norm), clip={"mode": "none"}),
        pair("clip.value: 0.005 from step 4", (4, "clipped_grad"), FACTORS, clip={"mode": "value", "value": 0.005, "from": 4}),
        pair("clip.norm: 0.05 from step 4", (4, "clipped_grad"), FACTORS, clip={"mode": "norm", "value": 0.05, "from": 4}),
        pair("clip.norm: 0.1, and 0.02 from step 3, mlx", (3, "clipped_grad"), FACTORS, a=M.but(norm), clip={"mode": "norm", "value": 0.02, "from": 3}),
        pair("clip.tensor: 0.003 from step 4", (4, "clipped_grad"), FACTORS, clip={**tensor, "value": 0.003, "from": 4}),
        pair("clip.none: declared 0.02, not done from step 4", (4, "clipped_grad"), FACTORS, a=T.but({**norm, "clip.value": 0.02}), clip={"mode": "none", "from": 4}),
        pair("clip.none: declared by value, not done from step 3, mlx", (3, "clipped_grad"), FACTORS, a=M.but({"clip.mode": "value", "clip.value": 0.005}), clip={"mode": "none", "from": 3}),
        pair("optimizer.bias_correction: none from step 3", (3, "param"), FACTORS, a=T.but(optimizer={}), b=T, optimizer={"corrected": False, "from": 3}),
        pair("optimizer.bias_correction: none", param, B, how=SETTING, settings={"optimizer.bias_correction": False}),
        pair("optimizer.bias_correction: none, mlx", param, B, a=M, how=SETTING, settings={"optimizer.bias_correction": False}),
        pair("optimizer.bias_correction: none, across", param, B, b=M, how=SETTING, settings={"optimizer.bias_correction": False}),
        pair("optimizer.weight_decay: 0.1 or 0", hparams, ("group0.weight_decay",), "optimizer.weight_decay", "config.differs optimizer.weight_decay", how=SETTING, settings=decay),
        pair("optimizer.weight_decay: 0.01 from step 4, not recorded", (4, "param"), FACTORS, a=T.but(optimizer={}), b=T, optimizer={"decay": 0.01, "from": 4}),
        pair("optimizer.eps: 1e-5 from step 3, not recorded, mlx", (3, "param"), FACTORS, a=M.but(optimizer={}), b=M, optimizer={"eps": 1e-5, "from": 3}),
        pair("optimizer.betas: beta2 0.9 from step 4, not recorded", (4, "opt_state"), FACTORS, a=T.but(optimizer={}), b=T, optimizer={"beta2": 0.9, "from": 4}),
        pair("optimizer.weight_decay: 0.05 on one parameter from step 3, not recorded", (3, "param"), ALL, a=T.but(optimizer={}), b=T, reaches=ONE, optimizer={"decay": 0.05, "decayed": [0], "from": 3}),
        pair("optimizer.weight_decay: coupled", state, A, a=T.but(decay), optimizer={"coupled": True}),
        pair("optimizer.weight_decay: recorded and not applied, mlx", param, A, a=M.but(decay), optimizer={"decay": 0.0}),
        pair("optimizer.weight_decay: applied and not recorded", param, A, optimizer={"decay": 0.1}),
        pair("optimizer.weight_decay: on one parameter only, mlx", param, A, a=M.but(decay), reaches=SEVERAL, optimizer={"decayed": [0]}),
        pair("optimizer.eps: 1e-6 or 1e-8, across", hparams, ("group0.eps",), "optimizer.eps", "config.differs optimizer.eps", b=M, how=SETTING, settings={"optimizer.eps": 1e-6}),
        pair("optimizer.eps: 1e-4, not recorded", param, B, optimizer={"eps": 1e-4}),
        pair("optimizer.eps: 1e-6, not recorded, mlx", param, B, a=M, optimizer={"eps": 1e-6}),
        pair("optimizer.eps: before the correction", param, B, a=T.but({"optimizer.eps": 1e-5}), optimizer={"eps_place": "before"}),
        pair("optimizer.eps: inside the root, mlx", param, B, a=M.but({"optimizer.eps": 1e-6}), optimizer={"eps_place": "inside"}),
        pair("optimizer.betas: beta2 0.95, recorded, across", hparams, ("group0.beta2",), "optimizer.betas", "config.differs optimizer.betas", b=M, how=SETTING, settings={"optimizer.betas": [0.9, 0.95]}),
        pair("optimizer.betas: beta2 0.95, not recorded", state, B, optimizer={"beta2": 0.95}),
        pair("optimizer.betas: beta1 0.8, not recorded, mlx", state, B, a=M, optimizer={"beta1": 0.8}),
        pair("optimizer.state_reset: all at step 3", (3, "opt_state"), ALL, optimizer={"reset_at": 3}),
        pair("optimizer.state_reset: all at step 4, mlx", (4, "opt_state"), ALL, a=M, optimizer={"reset_at": 4}),
        pair("optimizer.state_reset: one at step 2", (2, "opt_state"), (FOURTH,), a=T.but(optimizer={}), b=T, optimizer={"reset_at": 2, "numbers": [3]}),
        pair("optimizer.unheld: lora_B", clipped, B, a=T.but(optimizer={}), b=T, optimizer={"unheld": [1, 2]}),
        pair("optimizer.unheld: one", clipped, (FOURTH,), a=T.but(optimizer={}), b=T, optimizer={"unheld": [3, 10**6]}),
        pair("optimizer.groups: lora_B in a second one", hparams, ("group1.*",), a=T.but(optimizer={}), b=T, optimizer={"groups": [1, 2]}),
        pair("optimizer.groups: one parameter in a second one", hparams, ("group1.*",), a=T.but(optimizer={}), b=T, optimizer={"groups": [3, 10**6]}),
        pair("optimizer.rule: Adam or RAdam", param, B, a=small.but(library={"torch": ["Adam", {"lr": 1e-3}]}), b=small, how=LIBRARY, library={"torch": ["RAdam", {"lr": 1e-3}]}),
        pair("optimizer.rule: Adam or Adamax, mlx", state, ALL, "optimizer.rule", "config.differs optimizer.class", a=small_mlx.but(library={"mlx": ["Adam", {"learning_rate": 1e-3}]}), b=small_mlx, how=LIBRARY, library={"mlx": ["Adamax", {"learning_rate": 1e-3}]}),
        pair("param.not_updated: one at step 2", (2, "param"), (FOURTH,), a=T.but(optimizer={}), b=T, optimizer={"unwritten": True, "numbers": [3], "from": 2}),
        pair("param.not_updated: all from step 4, mlx", (4, "param"), FACTORS, a=M.but(optimizer={}), b=M, optimizer={"unwritten": True, "from": 4}),
        pair("param.not_updated: all from step 3, the decay written", (3, "param"), FACTORS, a=T.but(decay, optimizer={}), b=T.but(decay), optimizer={"unwritten": True, "from": 3}),
        pair("optimizer.lr: 1 % more than recorded", param, B, *NO_CAUSE, optimizer={"lr": 1.01}),
        pair("corrupt.elements: one weight at step 2", (2, "param"), ALL, a=T.but(optimizer={}), b=T, optimizer={"element_at": 2, "element": 3, "flat": 9, "by": 1e-2}),
        pair("corrupt.elements: one weight by 1e-4 at step 4, mlx", (4, "param"), ALL, a=M.but(optimizer={}), b=M, optimizer={"element_at": 4, "element": 3, "flat": 9, "by": 1e-4}),
    ]  # fmt: skip


def edited_faults() -> list[Fault]:
    """Records that are damaged in the file itself: the run did not use what the file says."""

    def edited(name: str, source: Arm, step: int, phase: str, record: str, by: float) -> Fault:
        edit = {"step": step, "phase": phase, "name": record, "flat": 11, "by": by}
        other = Arm(source.path, source.settings, source=source, edit=edit)
        return Fault(name, EDIT, source, other, step, phase, (record, record.partition("/")[0]), ("corrupt.elements",))

    return [
        edited("corrupt.elements: one gradient in the file, step 2", T, 2, "grad", Q1B, 1e-3),
        edited("corrupt.elements: one moment in the file, step 4, mlx", M, 4, "opt_state", f"{D2A}/exp_avg", 1e-3),
        edited("corrupt.elements: one weight in the file, step 1", T, 1, "param", Q1B, 1e-3),
        edited("corrupt.elements: one weight by 1e-5 in the file, step 4, mlx", M, 4, "param", Q1B, 1e-5),
    ]


def all_faults() -> list[Fault]:
    """Every planted fault."""
    return [
        *start_faults(),
        *data_faults(),
        *gradient_faults(),
        *optimizer_faults(),
        *edited_faults(),
        *inside_faults(),
    ]
