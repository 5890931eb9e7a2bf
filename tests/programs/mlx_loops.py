"""Hand-written MLX training loops: `mlx_loops.py LOOP RESULT`.  Written as users write them; nothing in here knows the recorder.

Each loop leaves a fingerprint, and beside it (`.npz`) the gradients that it computed itself, before clipping.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_map
from mlx_common import leave, rows

VOCABULARY, WIDTH, STEPS = 32, 8, 4


class Model(nn.Module):
    """Two layers over token ids, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 16)
        self.dropout = nn.Dropout(0.1)
        self.up = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        hidden = self.dropout(self.embed_tokens(ids))
        return self.lm_head(mx.clip(nn.gelu(self.up(hidden)), -3, 3))


def loss_fn(model: Model, inputs: mx.array, targets: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Mean over supervised positions, and their number."""
    losses = nn.losses.cross_entropy(model(inputs), targets) * mask
    return losses.sum() / mask.sum(), mask.sum()


def batches(count: int) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Inputs, targets and loss masks; the last target of every first row is not supervised."""
    made = []
    for ids in rows(count, 2, WIDTH, VOCABULARY):
        mask = np.ones((2, WIDTH - 1), np.int32)
        mask[0, -1] = 0
        made.append((mx.array(ids[:, :-1]), mx.array(ids[:, 1:]), mx.array(mask)))
    return made


Gradients = dict[str, np.ndarray[Any, Any]]


def keep(step: int, gradients: Any) -> Gradients:
    """A copy of a tree of gradients under `step/name`."""
    return {f"{step}/{name}": np.array(array) for name, array in tree_flatten(gradients)}


def compiled_norm(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """The usual compiled step, clipped by global norm."""
    state = [model.state, optimizer.state, mx.random.state]
    value_and_grad = nn.value_and_grad(model, loss_fn)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch: mx.array) -> tuple[mx.array, Any]:
        (loss, _), gradients = value_and_grad(model, *batch)
        clipped, _ = clip_grad_norm(gradients, 0.05)
        optimizer.update(model, clipped)
        return loss, gradients

    losses, kept = [], {}
    for k, batch in enumerate(batches(STEPS), 1):
        loss, gradients = step(*batch)
        mx.eval(loss, gradients, state)
        losses.append(loss.item())
        kept.update(keep(k, gradients))
    return losses, kept


def eager_value(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """Eager, two micro-batches a step, clipped by value by hand."""
    value_and_grad = nn.value_and_grad(model, loss_fn)
    losses, kept, total = [], {}, None
    for k, batch in enumerate(batches(2 * STEPS), 1):
        (loss, _), gradients = value_and_grad(model, *batch)
        total = gradients if total is None else tree_map(mx.add, total, gradients)
        losses.append(loss)
        if k % 2 == 0:
            mean = tree_map(lambda g: g / 2, total)
            optimizer.update(model, tree_map(lambda g: mx.clip(g, -0.002, 0.002), mean))
            kept.update(keep(k // 2, mean))
            mx.eval(model.parameters(), optimizer.state)
            total = None
    return [loss.item() for loss in losses], kept


def made_before(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """Eager; recording begins only here, after the gradient function was made and one step was taken."""
    import tracer

    value_and_grad = nn.value_and_grad(model, loss_fn)

    def step(batch: tuple[mx.array, ...]) -> tuple[float, Any]:
        (loss, _), gradients = value_and_grad(model, *batch)
        clipped, _ = clip_grad_norm(gradients, 0.05)
        optimizer.update(model, clipped)
        mx.eval(loss, gradients, model.parameters(), optimizer.state)
        return loss.item(), gradients

    first, *others = batches(STEPS + 1)
    losses, kept = [step(first)[0]], {}
    trace = sys.argv[3] if len(sys.argv) > 3 else ""
    with tracer.record(trace) if trace else nullcontext():
        for k, batch in enumerate(others, 1):
            loss, gradients = step(batch)
            losses.append(loss)
            kept.update(keep(k, gradients))
    if trace and not (type(mx.compile) is type(mx.clip) is type(mx.value_and_grad) is type(mx.add)):
        raise AssertionError("a hook was left behind")
    if not clip_grad_norm.__code__.co_filename.endswith("optimizers.py"):
        raise AssertionError("a rebound name was left behind")
    losses.append(step(first)[0])
    return losses, kept


def partly_compiled(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """Only the gradient is compiled, the update is eager."""
    state = [model.state, mx.random.state]
    value_and_grad = nn.value_and_grad(model, loss_fn)

    @partial(mx.compile, inputs=state, outputs=state)
    def gradient(*batch: mx.array) -> tuple[mx.array, Any]:
        (loss, _), gradients = value_and_grad(model, *batch)
        return loss, gradients

    losses, kept = [], {}
    for k, batch in enumerate(batches(STEPS), 1):
        loss, gradients = gradient(*batch)
        optimizer.update(model, gradients)
        mx.eval(loss, gradients, model.parameters(), optimizer.state)
        losses.append(loss.item())
        kept.update(keep(k, gradients))
    return losses, kept


def functional(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """A pure function of parameters and batch, compiled with nothing captured: the recorder cannot look inside."""
    return _functional(model, optimizer, inside=True)


def functional_direct(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """The gradient function itself is compiled, with nothing captured."""
    return _functional(model, optimizer, inside=False)


def _functional(model: Model, optimizer: Any, *, inside: bool) -> tuple[list[float], Gradients]:
    model.eval()

    def loss_of(parameters: Any, inputs: mx.array, targets: mx.array) -> mx.array:
        hidden = parameters["embed_tokens"]["weight"][inputs] @ parameters["up"]["weight"].T + parameters["up"]["bias"]
        return nn.losses.cross_entropy(hidden @ parameters["lm_head"]["weight"].T, targets).mean()

    taken = mx.value_and_grad(loss_of)

    @mx.compile
    def gradient(*arguments: Any) -> Any:
        return taken(*arguments)

    call = gradient if inside else mx.compile(taken)
    losses, kept = [], {}
    for k, (inputs, targets, _) in enumerate(batches(STEPS), 1):
        loss, gradients = call(model.trainable_parameters(), inputs, targets)
        optimizer.update(model, gradients)
        mx.eval(loss, gradients, model.parameters(), optimizer.state)
        losses.append(loss.item())
        kept.update(keep(k, gradients))
    return losses, kept


def nested(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """A compiled step that calls a compiled gradient function."""
    model.eval()
    state = [model.state, optimizer.state]

    def loss_of(parameters: Any, inputs: mx.array, targets: mx.array) -> mx.array:
        hidden = parameters["embed_tokens"]["weight"][inputs]
        return nn.losses.cross_entropy(hidden @ parameters["lm_head"]["weight"].T, targets).mean()

    taken = mx.compile(mx.value_and_grad(loss_of))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(inputs: mx.array, targets: mx.array) -> tuple[mx.array, Any]:
        loss, gradients = taken(model.trainable_parameters(), inputs, targets)
        optimizer.update(model, gradients)
        return loss, gradients

    losses, kept = [], {}
    for k, (inputs, targets, _) in enumerate(batches(STEPS), 1):
        loss, gradients = step(inputs, targets)
        mx.eval(loss, gradients, state)
        losses.append(loss.item())
        kept.update(keep(k, gradients))
    return losses, kept


def per_example(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """Gradients per row by vmap inside a compiled step: what value_and_grad sees there has no value."""
    model.eval()
    state = [model.state, optimizer.state]

    def loss_of(parameters: Any, inputs: mx.array, targets: mx.array) -> mx.array:
        hidden = parameters["embed_tokens"]["weight"][inputs]
        return nn.losses.cross_entropy(hidden @ parameters["lm_head"]["weight"].T, targets).mean()

    taken = mx.vmap(mx.value_and_grad(loss_of), in_axes=(None, 0, 0))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(inputs: mx.array, targets: mx.array) -> mx.array:
        losses, rows_of = taken(model.trainable_parameters(), inputs, targets)
        optimizer.update(model, tree_map(lambda g: g.mean(0), rows_of))
        return losses.mean()

    losses = []
    for inputs, targets, _ in batches(STEPS):
        loss = step(inputs, targets)
        mx.eval(loss, state)
        losses.append(loss.item())
    return losses, {}


def compiled_unseen(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """The whole step as a pure function: parameters and optimizer state go in and come out, nothing is captured."""
    optimizer.init(model.trainable_parameters())

    def loss_of(parameters: Any, ids: mx.array) -> mx.array:
        hidden = parameters["embed_tokens"]["weight"][ids[:, :-1]]
        return nn.losses.cross_entropy(hidden @ parameters["lm_head"]["weight"].T, ids[:, 1:]).mean()

    @mx.compile
    def step(parameters: Any, state: Any, ids: mx.array) -> Any:
        loss, gradients = mx.value_and_grad(loss_of)(parameters, ids)
        optimizer.state = state
        optimizer._initialized = True
        return loss, optimizer.apply_gradients(gradients, parameters), optimizer.state

    losses, parameters, state = [], model.trainable_parameters(), optimizer.state
    for ids in rows(STEPS, 2, WIDTH, VOCABULARY):
        loss, parameters, state = step(parameters, state, mx.array(ids))
        mx.eval(loss, parameters, state)
        losses.append(loss.item())
    model.update(parameters)
    optimizer.state = state
    return losses, {}


def two_optimizers(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """A MultiOptimizer in a compiled step: the embedding by SGD with momentum, the rest by Adam."""
    return compiled_norm(model, optimizer)


def touched(model: Model, optimizer: Any) -> tuple[list[float], Gradients]:
    """`compiled_norm` with one random number drawn before it: what a recorder that is not inert would do."""
    mx.eval(mx.random.uniform())
    return compiled_norm(model, optimizer)


LOOPS: dict[str, Callable[[Model, Any], tuple[list[float], Gradients]]] = {
    function.__name__: function
    for function in (
        compiled_norm, eager_value, made_before, partly_compiled, functional, functional_direct, nested, per_example,
        compiled_unseen, two_optimizers, touched,
    )
}  # fmt: skip


def main() -> None:
    """Train, and leave the results."""
    loop, result = sys.argv[1:3]
    mx.random.seed(3)
    model = Model()
    mx.eval(model.parameters())
    optimizer: Any = optim.AdamW(optim.linear_schedule(1e-2, 1e-3, 8), weight_decay=0.1)
    if loop == "two_optimizers":
        sgd = optim.SGD(0.1, momentum=0.9)
        optimizer = optim.MultiOptimizer([sgd, optimizer], [lambda name, _: name.startswith("embed_tokens")])
        optimizer.init(model.trainable_parameters())
    losses, gradients = LOOPS[loop](model, optimizer)
    leave(result, losses=losses, model=model, optimizer=optimizer)
    np.savez(f"{result}.npz", **gradients)


if __name__ == "__main__":
    main()
