# ruff: noqa: E501  (one fault a line: a table)
"""The planted faults: each a pair of arms, where the first finding must be, and which cause must come first.

What is expected follows from the fault alone.  `names` are globs over parameters (or records) of the first finding's phase; the
expected set is what they match among the records of that row whose bits differ.  At step 1 lora_B is 0, so the gradients
of lora_A are 0 and a fault in "all gradients" is one of all lora_B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.bench.accuracy.arms import STEPS, Arm

SETTING, LOOP, EDIT = "setting", "loop", "edit"
NO_CAUSE: Final = ()


@dataclass(frozen=True)
class Fault:
    """One planted fault.  `causes`: any of these may come first; empty where no cause of that name exists."""

    id: str
    how: str
    a: Arm
    b: Arm
    step: int
    phase: str
    names: tuple[str, ...]
    causes: tuple[str, ...]

    @property
    def family(self) -> str:
        """The cause that it is about."""
        return self.id.partition(":")[0]


BASE: Final[Mapping[str, Any]] = {"train.steps": STEPS}
EAGER: Final[Mapping[str, Any]] = {**BASE, "train.compile": False}
T: Final = Arm("torch", BASE)
M: Final = Arm("mlx", EAGER, source=T)
Q1B: Final = "model.layers.1.self_attn.q_proj.lora_B.weight"
D2A: Final = "model.layers.2.mlp.down_proj.lora_A.weight"
D2B: Final = "model.layers.2.mlp.down_proj.lora_B.weight"
ALL: Final = ("*",)
B: Final = ("*.lora_B.weight",)
A: Final = ("*.lora_A.weight",)


def _grad(op: str, *, steps: tuple[int, int] | None = None, names: str = "*", **more: Any) -> dict[str, Any]:
    return {"grad": [{"op": op, "names": names, **({"steps": steps} if steps else {}), **more}]}


def _pair(
    name: str,
    at: tuple[int, str],
    names: tuple[str, ...],
    *causes: str,
    a: Arm = T,
    b: Arm | None = None,
    how: str = LOOP,
    settings: Mapping[str, Any] | None = None,
    **plan: Any,
) -> Fault:
    """`b` is `a` with settings and plan unless it is given, and then that arm with them."""
    other = (b if b is not None else a).but(settings, **plan)
    return Fault(name, how, a, other, at[0], at[1], names, causes or (name.partition(":")[0],))


def gradient_faults() -> list[Fault]:
    """Faults in the backward pass."""
    at = {2: (2, "grad"), 3: (3, "grad"), 4: (4, "grad")}
    return [
        _pair("grad.scale: all x2 from step 1", (1, "grad"), B, **_grad("scale", by=2.0)),
        _pair("grad.scale: all x1.2 at step 4", at[4], ALL, **_grad("scale", by=1.2, steps=(4, 4))),
        _pair("grad.scale: one x1.2 at step 2, mlx", at[2], (Q1B,), a=M, **_grad("scale", by=1.2, steps=(2, 2), names=Q1B)),
        _pair("grad.scale: all x1.01 from step 1, across", (1, "grad"), B, b=M, **_grad("scale", by=1.01)),
        _pair("grad.scale: lora_A x0.5 from step 3, mlx", at[3], A, a=M, **_grad("scale", by=0.5, steps=(3, 5), names=A[0])),
        _pair("grad.scale: one x1.02 at step 4, across", at[4], (D2A,), b=M, **_grad("scale", by=1.02, steps=(4, 4), names=D2A)),
        _pair("grad.zero: one at step 2", at[2], (Q1B,), **_grad("zero", steps=(2, 2), names=Q1B)),
        _pair("grad.zero: a layer at step 4, mlx", at[4], ("*.layers.3.*",), a=M, **_grad("zero", steps=(4, 4), names="*.layers.3.*")),
        _pair("grad.zero: one at step 4, across", at[4], (D2A,), b=M, **_grad("zero", steps=(4, 4), names=D2A)),
        _pair("grad.missing: one at step 2", at[2], (Q1B,), **_grad("none", steps=(2, 2), names=Q1B)),
        _pair("grad.missing: v_proj at step 4", at[4], ("*.v_proj.*",), **_grad("none", steps=(4, 4), names="*.v_proj.*")),
        _pair("grad.stale: not cleared at step 3", at[3], ALL, **_grad("stale", steps=(3, 3))),
        _pair("grad.stale: one not cleared at step 4, mlx", at[4], (Q1B,), a=M, **_grad("stale", steps=(4, 4), names=Q1B)),
        _pair("grad.stale: used again at step 2", at[2], B, **_grad("again", steps=(2, 2), names=B[0])),
        _pair("grad.stale: not cleared at step 3, across", at[3], ALL, b=M, **_grad("stale", steps=(3, 3))),
        _pair("sign: one at step 2, mlx", at[2], (Q1B,), a=M, **_grad("scale", by=-1.0, steps=(2, 2), names=Q1B)),
        _pair("sign: all at step 4", at[4], ALL, **_grad("scale", by=-1.0, steps=(4, 4))),
        _pair("sign: one at step 4, across", at[4], (D2A,), b=M, **_grad("scale", by=-1.0, steps=(4, 4), names=D2A)),
        _pair("layout.permutation: rows by 1, one at step 2", at[2], (D2B,), **_grad("roll", by=1, steps=(2, 2), names=D2B)),
        _pair("layout.permutation: reversed, lora_B at step 4, mlx", at[4], B, a=M, **_grad("reverse", steps=(4, 4), names=B[0])),
        *square_faults(),
        _pair("precision.rounding: all to bf16 from step 1", (1, "grad"), B, **_grad("round", by="bfloat16")),
        _pair("precision.rounding: one to fp16 at step 4, mlx", at[4], (D2A,), a=M, **_grad("round", by="float16", steps=(4, 4), names=D2A)),
        _pair("precision.rounding: all to bf16 at step 3, across", at[3], ALL, b=M, **_grad("round", by="bfloat16", steps=(3, 3))),
        _pair("precision.overflow: inf in one at step 2", at[2], (Q1B,), **_grad("set", by="inf", flat=5, steps=(2, 2), names=Q1B)),
        _pair("precision.overflow: nan in one at step 4, mlx", at[4], (D2A,), a=M, **_grad("set", by="nan", flat=5, steps=(4, 4), names=D2A)),
        _pair("rng.dropout: 10 % of all at step 2", at[2], B, **_grad("drop", by=0.1, steps=(2, 2), names=B[0])),
        _pair("rng.dropout: half of one at step 4, mlx", at[4], (D2A,), a=M, **_grad("drop", by=0.5, steps=(4, 4), names=D2A)),
        _pair("rng.dropout: another 10 % at step 3", at[3], B, a=T.but(**_grad("drop", by=0.1, steps=(3, 3), names=B[0])),
              b=T, **_grad("drop", by=0.1, steps=(3, 3), names=B[0], seed=1)),
        _pair("corrupt.elements: one gradient element by 10 rms at step 2", at[2], (D2B,), **_grad("element", by=10, flat=7, steps=(2, 2), names=D2B)),
        _pair("corrupt.elements: one gradient element by 0.1 rms at step 4, mlx", at[4], (D2A,), a=M, **_grad("element", by=0.1, flat=7, steps=(4, 4), names=D2A)),
    ]  # fmt: skip


def square_faults() -> list[Fault]:
    """Transposed gradients; rank 64 makes lora_A of a 64 wide model square."""
    wide = {"lora.rank": 64, "lora.targets": ["q_proj"]}
    t, name = T.but(wide), "model.layers.1.self_attn.q_proj.lora_A.weight"
    m = Arm("mlx", {**EAGER, **wide}, source=t)
    return [
        _pair("layout.transpose: one at step 2", (2, "grad"), (name,), a=t, **_grad("transpose", steps=(2, 2), names=name)),
        _pair("layout.transpose: lora_A at step 4, mlx", (4, "grad"), A, a=m, **_grad("transpose", steps=(4, 4), names=A[0])),
    ]  # fmt: skip


def start_faults() -> list[Fault]:
    """Faults in what a run starts from."""
    init, q = (0, "init"), "model.layers.{}.self_attn.q_proj.lora_A.weight"
    fed = Arm("torch", BASE, source=T)
    one = q.format(1)
    swap = {"adapters": [{"op": "swap", "names": "model.layers.[01].self_attn.q_proj.lora_A.weight"}]}
    return [
        _pair("init.names: 3 of 4 layers", init, ("*.layers.0.*.weight",), b=fed, how=SETTING, settings={"lora.layers": 3}),
        _pair("init.names: q and v only, mlx", init, ("*.k_proj.*.weight", "*.o_proj.*.weight", "*.mlp.*.weight"), a=M, how=SETTING, settings={"lora.targets": ["q_proj", "v_proj"]}),
        _pair("init.names: 3 of 4 layers, across", init, ("*.layers.0.*.weight",), b=M, how=SETTING, settings={"lora.layers": 3}),
        _pair("init.draw: seed", init, A, how=SETTING, settings={"train.seed": 1}),
        _pair("init.draw: own draw, across", init, A, b=Arm("mlx", EAGER), how=SETTING),
        _pair("init.scale: all x1.732, mlx", init, A, a=M, adapters=[{"op": "scale", "names": A[0], "by": 1.7320508}]),
        _pair("init.scale: one x1.01", init, (one,), b=fed, adapters=[{"op": "scale", "names": one, "by": 1.01}]),
        _pair("init.swapped: two tensors", init, (q.format(0), one), b=fed, **swap),
        _pair("init.swapped: two tensors, mlx", init, (q.format(0), one), a=M, **swap),
        _pair("init.frozen: one weight x1.5", init, ("model.layers.1.self_attn.q_proj.weight",), base={"name": "model.layers.1.self_attn.q_proj.weight", "factor": 1.5}),
        _pair("init.frozen: one norm x1.001, mlx", init, ("model.norm.weight",), a=M, base={"name": "model.norm.weight", "factor": 1.001}),
        _pair("init.frozen: base in bf16, mlx", init, ("model.*norm.weight", "model.*proj.weight", "model.embed_tokens.weight"), a=M, how=SETTING, settings={"model.dtype": "bfloat16"}),
        _pair("precision.rounding: adapters to bf16", init, A, b=fed, adapters=[{"op": "round", "names": A[0], "by": "bfloat16"}]),
        _pair("precision.rounding: one adapter to fp16, mlx", init, (one,), a=M, adapters=[{"op": "round", "names": one, "by": "float16"}]),
        _pair("layout.permutation: rows of one adapter reversed, mlx", init, (one,), a=M, adapters=[{"op": "reverse", "names": one}]),
        _pair("lora.scale: alpha 32", init, ("*.lora_scale",), how=SETTING, settings={"lora.alpha": 32}),
        _pair("lora.scale: alpha 16.1, across", init, ("*.lora_scale",), b=M, how=SETTING, settings={"lora.alpha": 16.1}),
    ]  # fmt: skip


def data_faults() -> list[Fault]:
    """Faults in batches and loss."""
    four = {"train.batch": 4}
    two = {"train.batch": 2, "train.accumulation": 2}
    scaled = (1, "loss")
    return [
        _pair("batch.shift: labels by 1 at step 2", (2, "batch"), ("labels", "tokens"), batch=[{"op": "labels", "by": 1, "steps": [2, 2]}]),
        _pair("batch.shift: BOS twice from step 1, mlx", (1, "batch"), ALL, a=M, batch=[{"op": "bos"}]),
        _pair("batch.shift: BOS twice at step 4", (4, "batch"), ALL, batch=[{"op": "bos", "steps": [4, 4]}]),
        _pair("batch.order: shuffled", (1, "batch"), ALL, how=SETTING, settings={"data.order": "shuffled", "data.rows": 10}, a=T.but({"data.rows": 10})),
        _pair("batch.order: rows turned round at step 3, mlx", (3, "batch"), ALL, a=M, batch=[{"op": "rows", "steps": [3, 3]}]),
        _pair("batch.order: loader one step on", (1, "batch"), ALL, batch=[{"op": "offset", "by": 1}]),
        _pair("batch.order: 4 rows or 2 x 2", (1, "batch"), ALL, a=T.but(four), b=T, how=SETTING, settings=two),
        _pair("batch.padding: 1 wider at step 2", (2, "batch"), ALL, batch=[{"op": "wider", "by": 1, "steps": [2, 2]}]),
        _pair("batch.padding: 8 wider from step 1, mlx", (1, "batch"), ALL, a=M, batch=[{"op": "wider", "by": 8}]),
        _pair("batch.mask: one label at step 1, across", (1, "batch"), ("labels", "tokens"), b=M, how=SETTING, settings={"data.mask_label": [1, 4]}),
        _pair("batch.mask: one label at step 4", (4, "batch"), ("labels", "tokens"), how=SETTING, settings={"data.mask_label": [0, 3], "data.mask_step": 4}),
        _pair("batch.mask: prompts of 4 from step 1, mlx", (1, "batch"), ("labels", "tokens"), a=M, batch=[{"op": "prompt", "by": 4}]),
        _pair("batch.order: another order, across", (1, "batch"), ("input_ids", "labels", "tokens"), a=T.but({"data.rows": 10}), b=Arm("mlx", {**EAGER, "data.rows": 10}, source=T.but({"data.rows": 10}), fed=False), how=SETTING, settings={"data.order": "shuffled"}),
        _pair("loss.reduction: x2", scaled, ("loss",), loss={"factor": 2.0}),
        _pair("loss.reduction: x1.3, mlx", scaled, ("loss",), a=M, loss={"factor": 1.3}),
        _pair("loss.reduction: by rows", scaled, ("loss",), loss={"denominator": "rows"}),
        _pair("loss.reduction: by all positions, across", scaled, ("loss",), b=M, loss={"denominator": "all"}),
        _pair("loss.precision: bf16", scaled, ("loss",), loss={"dtype": "bfloat16"}),
        _pair("loss.precision: fp16, mlx", scaled, ("loss",), a=M, loss={"dtype": "float16"}),
        _pair("rng.dropout: LoRA dropout 0.1 or none", (1, "grad"), B, "rng.dropout", "config.differs lora.dropout", how=SETTING, settings={"lora.dropout": 0.1}),
        _pair("rng.dropout: LoRA dropout 0.05 of another seed", (1, "grad"), B, "rng.dropout", "config.differs train.seed", a=Arm("mlx", {**EAGER, "lora.dropout": 0.05}, source=T), how=SETTING, settings={"train.seed": 1}),
        _pair("grad.mean_of_means: 2 micro-batches unweighted", (1, "grad"), B, "-", a=T.but({"train.accumulation": 2}), b=Arm("hf-trainer", {**BASE, "train.accumulation": 2}, source=T.but({"train.accumulation": 2})), how=SETTING),
    ]  # fmt: skip


def optimizer_faults() -> list[Fault]:
    """Faults in schedule, clipping and optimizer."""
    hparams, clipped, param, state = (1, "hparams"), (1, "clipped_grad"), (1, "param"), (1, "opt_state")
    norm = {"clip.mode": "norm", "clip.value": 0.1}
    tensor = {"mode": "tensor", "value": 0.01}
    linear, cosine = {"optimizer.schedule": "linear"}, {"optimizer.schedule": "cosine"}
    decay = {"optimizer.weight_decay": 0.1}
    lr = ("group0.lr",)
    return [
        _pair("schedule.lr: x2", hparams, lr, how=SETTING, settings={"optimizer.lr": 2e-3}),
        _pair("schedule.lr: x1.01, across", hparams, lr, b=M, how=SETTING, settings={"optimizer.lr": 1.01e-3}),
        _pair("schedule.lr: warm-up of 2, mlx", hparams, lr, a=M, how=SETTING, settings={"optimizer.warmup": 2}),
        _pair("schedule.lr: linear, advanced twice a step", (2, "hparams"), lr, a=T.but(linear), schedule={"times": 2}),
        _pair("schedule.lr: cosine, one step on, mlx", hparams, lr, a=M.but(cosine), schedule={"plus": 1}),
        _pair("clip.value: 0.01", clipped, B, how=SETTING, settings={"clip.mode": "value", "clip.value": 0.01}),
        _pair("clip.value: 0.05, mlx", clipped, B, a=M, how=SETTING, settings={"clip.mode": "value", "clip.value": 0.05}),
        _pair("clip.value: 0.01, across", clipped, B, b=M, how=SETTING, settings={"clip.mode": "value", "clip.value": 0.01}),
        _pair("clip.norm: 0.1 or none, mlx", clipped, B, a=M, how=SETTING, settings=norm),
        _pair("clip.norm: 0.1 or 0.11", clipped, B, a=T.but(norm), how=SETTING, settings={"clip.value": 0.11}),
        _pair("clip.norm: 0.1 or none, across", clipped, B, b=M, how=SETTING, settings=norm),
        _pair("clip.tensor: 0.01", clipped, B, clip=tensor),
        _pair("clip.tensor: 0.01, mlx", clipped, B, a=M, clip=tensor, settings=norm),
        _pair("clip.none: declared and not done", clipped, B, a=T.but(norm), clip={"mode": "none"}),
        _pair("clip.none: declared and not done, mlx", clipped, B, a=M.but(norm), clip={"mode": "none"}),
        _pair("optimizer.bias_correction: none", param, B, how=SETTING, settings={"optimizer.bias_correction": False}),
        _pair("optimizer.bias_correction: none, mlx", param, B, a=M, how=SETTING, settings={"optimizer.bias_correction": False}),
        _pair("optimizer.bias_correction: none, across", param, B, b=M, how=SETTING, settings={"optimizer.bias_correction": False}),
        _pair("optimizer.weight_decay: 0.1 or 0", hparams, ("group0.weight_decay",), "optimizer.weight_decay", "config.differs optimizer.weight_decay", how=SETTING, settings=decay),
        _pair("optimizer.weight_decay: coupled", state, A, a=T.but(decay), optimizer={"coupled": True}),
        _pair("optimizer.weight_decay: recorded and not applied, mlx", param, A, a=M.but(decay), optimizer={"decay": 0.0}),
        _pair("optimizer.weight_decay: applied and not recorded", param, A, optimizer={"decay": 0.1}),
        _pair("optimizer.weight_decay: on one parameter only, mlx", param, A, a=M.but(decay), optimizer={"decayed": [0]}),
        _pair("optimizer.eps: 1e-6 or 1e-8, across", hparams, ("group0.eps",), "optimizer.eps", "config.differs optimizer.eps", b=M, how=SETTING, settings={"optimizer.eps": 1e-6}),
        _pair("optimizer.eps: 1e-4, not recorded", param, B, optimizer={"eps": 1e-4}),
        _pair("optimizer.eps: 1e-6, not recorded, mlx", param, B, a=M, optimizer={"eps": 1e-6}),
        _pair("optimizer.eps: before the correction", param, B, a=T.but({"optimizer.eps": 1e-5}), optimizer={"eps_place": "before"}),
        _pair("optimizer.eps: inside the root, mlx", param, B, a=M.but({"optimizer.eps": 1e-6}), optimizer={"eps_place": "inside"}),
        _pair("optimizer.betas: beta2 0.95, recorded, across", hparams, ("group0.beta2",), "optimizer.betas", "config.differs optimizer.betas", b=M, how=SETTING, settings={"optimizer.betas": [0.9, 0.95]}),
        _pair("optimizer.betas: beta2 0.95, not recorded", state, B, optimizer={"beta2": 0.95}),
        _pair("optimizer.betas: beta1 0.8, not recorded, mlx", state, B, a=M, optimizer={"beta1": 0.8}),
        _pair("optimizer.state_reset: all at step 3", (3, "opt_state"), ALL, optimizer={"reset_at": 3}),
        _pair("optimizer.state_reset: all at step 4, mlx", (4, "opt_state"), ALL, a=M, optimizer={"reset_at": 4}),
        _pair("optimizer.lr: 1 % more than recorded", param, B, "-", optimizer={"lr": 1.01}),
        _pair("corrupt.elements: one weight at step 2", (2, "param"), ALL, a=T.but(optimizer={}), b=T, optimizer={"element_at": 2, "element": 3, "flat": 9, "by": 1e-2}),
        _pair("corrupt.elements: one weight by 1e-4 at step 4, mlx", (4, "param"), ALL, a=M.but(optimizer={}), b=M, optimizer={"element_at": 4, "element": 3, "flat": 9, "by": 1e-4}),
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
    return [*start_faults(), *data_faults(), *gradient_faults(), *optimizer_faults(), *edited_faults()]
