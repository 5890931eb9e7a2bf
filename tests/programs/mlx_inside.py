"""Small MLX training loops, each plain and recorded with all that is inside, some plain again: `mlx_inside.py FOLDER`.

Leaves `results.json` (fingerprints and what became of the classes), a trace of each recorded run, and `expected.npz`: outputs
of the first step's modules, computed by calling them one after the other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_common import digest
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

import tracer
from tracer.schema import Phase

VOCABULARY, STEPS, MICRO_BATCHES, WIDTH = 64, 2, 2, 9
LENGTHS = [[0, 8], [2, 6]]
Loss = Callable[..., tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Case:
    """One loop: how it runs, and what it is recorded with."""

    loss: str = "default_loss"
    compiled: bool = True
    dropout: float = 0.0
    checkpointed: str = ""
    dtype: str = "float32"
    tied: bool = True
    made_before: bool = False
    options: tuple[tuple[str, Any], ...] = ()


CASES = {
    "compiled": Case(),
    "eager": Case(compiled=False),
    "bfloat16": Case(dtype="bfloat16", dropout=0.1),
    "dropout": Case(dropout=0.1, tied=False),
    "checkpointed": Case(checkpointed="before"),
    "checkpointed later": Case(checkpointed="after"),
    "checkpointed eager": Case(checkpointed="before", compiled=False),
    "checkpointed dropout": Case(checkpointed="before", dropout=0.1, tied=False),
    "made before": Case(made_before=True, compiled=False),
    "reduced": Case(loss="reduced"),
    "by hand": Case(loss="by_hand"),
    "unlabelled": Case(loss="unlabelled"),
    "two models": Case(loss="two_models"),
    "two passes": Case(loss="two_passes"),
    "probed": Case(loss="probed"),
    "few rows": Case(options=(("forward_rows", 3), ("modules", ("model.layers.1.*q_proj.lora_delta", "lm_head")))),
    "only losses": Case(options=(("what", frozenset(Phase) - {Phase.FORWARD}),)),
}
# Cases that run once more after they have been recorded.
AGAIN = ("compiled", "eager", "checkpointed later")


class Probe(nn.Module):
    """A module whose result is stopped, and is used by nothing."""

    def __call__(self, hidden: mx.array) -> mx.array:
        return mx.stop_gradient(mx.tanh(hidden).sum(-1, keepdims=True))


def build(case: Case, seed: int = 3) -> Model:
    """Two layers; LoRA on q and v of both, with factors that are not zero."""
    mx.random.seed(seed)
    model = Model(
        ModelArgs(
            model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2,
            rms_norm_eps=1e-5, vocab_size=VOCABULARY, num_key_value_heads=1, tie_word_embeddings=case.tied,
        )
    )  # fmt: skip
    model.set_dtype(getattr(mx, case.dtype))
    if case.loss == "probed":
        model.probe = Probe()
    model.freeze()
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": case.dropout, "keys": keys})
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.trainable_parameters()))
    mx.eval(model.parameters())
    return model.train()


def batches(loss: str) -> list[tuple[mx.array, mx.array]]:
    """Arguments of a loss function for every micro-batch: token ids, and lengths or targets."""
    draw = np.random.RandomState(7)
    made = [mx.array(draw.randint(1, VOCABULARY, (2, WIDTH))) for _ in range(STEPS * MICRO_BATCHES)]
    if loss in ("reduced", "by_hand"):
        return [(ids[:, :-1], ids[:, 1:]) for ids in made]
    return [(ids, mx.array(LENGTHS)) for ids in made]


def losses_of(name: str, other: Model) -> Loss:
    """A loss function by name; all are mean cross-entropies."""

    def reduced(model: Model, inputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        return nn.losses.cross_entropy(model(inputs), targets, reduction="mean"), mx.array(targets.size)

    def by_hand(model: Model, inputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        logits = model(inputs)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return -mx.take_along_axis(logits, targets[..., None], -1).mean(), mx.array(targets.size)

    def unlabelled(model: Model, ids: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        logits = model(ids)
        return mx.square(logits - logits.mean()).mean() * weight.sum(), mx.array(1)

    def probed(model: Model, input_ids: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        hidden = model.model.embed_tokens(input_ids[:, :-1])
        model.probe(hidden)
        loss, count = default_loss(model, input_ids, lengths)
        return loss + 0 * mx.tanh(hidden).sum(-1, keepdims=True).mean(), count

    def two_models(model: Model, input_ids: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        hint = mx.stop_gradient(other(input_ids[:, :-1])).mean()
        loss, count = default_loss(model, input_ids, lengths)
        return loss + 0 * hint, count

    def two_passes(model: Model, input_ids: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        first, count = default_loss(model, input_ids, lengths)
        return (first + default_loss(model, input_ids, lengths)[0]) / 2, count

    functions = (reduced, by_hand, unlabelled, probed, two_models, two_passes, default_loss)
    named: dict[str, Loss] = {function.__name__: function for function in functions}
    return named[name]


def train(case: Case, recording: Callable[[], Any]) -> dict[str, Any]:
    """One run.  `recording` gives the context in which it is recorded, or one that does nothing."""
    if case.made_before:
        model, step = make(case)
        with recording():
            return fingerprint(model, *run(case, model, step))
    with recording():
        model, step = make(case)
        return fingerprint(model, *run(case, model, step))


def make(case: Case) -> tuple[Model, Any]:
    """Model and its gradient function."""
    model, other = build(case), build(case, seed=4)
    if case.checkpointed == "before":
        grad_checkpoint(model.layers[0])
    return model, nn.value_and_grad(model, losses_of(case.loss, other))


def run(case: Case, model: Model, value_and_grad: Any) -> tuple[list[float], Any]:
    """Steps of two micro-batches, their gradients averaged."""
    optimizer = optim.AdamW(1e-2)
    state = [model.state, optimizer.state, mx.random.state]

    def step(batch: Any, total: Any, update: bool) -> Any:
        (loss, _), gradients = value_and_grad(model, *batch)
        if total is not None:
            gradients = tree_map(mx.add, gradients, total)
        if update:
            optimizer.update(model, tree_map(lambda g: g / MICRO_BATCHES, gradients))
            gradients = None
        return loss, gradients

    call = partial(mx.compile, inputs=state, outputs=state)(step) if case.compiled else step
    losses, total = [], None
    for k, batch in enumerate(batches(case.loss), 1):
        loss, total = call(batch, total, k % MICRO_BATCHES == 0)
        mx.eval(loss, total, state)
        losses.append(loss.item())
        if case.checkpointed == "after" and k == MICRO_BATCHES:
            grad_checkpoint(model.layers[0])
    return losses, optimizer


def fingerprint(model: Model, losses: list[float], optimizer: Any) -> dict[str, Any]:
    """Everything that the run leaves behind."""
    return {
        "losses": [loss.hex() for loss in losses],
        "parameters": digest(model.parameters()),
        "optimizer": digest(optimizer.state),
        "rng": digest({"key": mx.random.state[0]}),
    }


def expected() -> dict[str, Any]:
    """Module outputs of the first micro-batch without dropout, each module called by itself."""
    model, (ids, _) = build(CASES["compiled"]), batches("default_loss")[0]
    hidden = model.model.embed_tokens(ids[:, :-1])
    found = {"model.embed_tokens": hidden}
    for i, layer in enumerate(model.layers):
        at, query = f"model.layers.{i}", layer.self_attn.q_proj
        normed = layer.input_layernorm(hidden)
        found |= {f"{at}.input_layernorm": normed, f"{at}.self_attn.q_proj": query(normed)}
        found |= {f"{at}.self_attn.q_proj.base_layer": query.linear(normed)}
        found |= {f"{at}.self_attn.q_proj.lora_delta": query(normed) - query.linear(normed)}
        found |= {f"{at}.self_attn": layer.self_attn(normed, "causal")}
        hidden = found[at] = layer(hidden, "causal")
    found["model.norm"] = model.model.norm(hidden)
    found["lm_head"] = model.model.embed_tokens.as_linear(found["model.norm"])
    return {name: np.array(value) for name, value in found.items()}


def main() -> None:
    """Run every case two or three times."""
    folder, results = Path(sys.argv[1]), {}
    block = type(build(CASES["compiled"]).layers[0])
    clean = block.__call__
    for name, case in CASES.items():
        options = {"what": frozenset(Phase), "token_loss": True, "micro_grads": True, **dict(case.options)}
        trace = folder / f"{name.replace(' ', '-')}.h5"
        results[name] = {}
        contexts = {"plain": nullcontext, "recorded": partial(tracer.record, trace, **options)}
        contexts |= {"again": nullcontext} if name in AGAIN else {}
        for run_name, make_context in contexts.items():
            results[name][run_name] = train(case, make_context)
            results[name][f"{run_name} left"] = "clean" if block.__call__ is clean else block.__call__.__qualname__
            block.__call__ = clean  # grad_checkpoint changes the class for good
    np.savez(folder / "expected.npz", **expected())
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
