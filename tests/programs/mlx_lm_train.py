"""mlx-lm's `train()` on a tiny Llama with LoRA: `mlx_lm_train.py RESULT DTYPE ACCUMULATION DROPOUT`.

Nothing in here knows the recorder.  Beside the fingerprint it leaves (`.npz`) the gradients of the first step, computed
a second time and eagerly; they are the run's own only where nothing is dropped out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_common import leave
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, default_loss, iterate_batches, train
from mlx_lm.tuner.utils import linear_to_lora_layers

VOCABULARY = 64


class Losses(TrainingCallback):
    """Keeps what the trainer reports at every iteration."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.losses.append(train_info["train_loss"])
        self.tokens.append(train_info["trained_tokens"])


def build(dtype: str, dropout: float) -> llama.Model:
    """Two layers; LoRA on q and v of both."""
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2,
            rms_norm_eps=1e-5, vocab_size=VOCABULARY, num_key_value_heads=1,
        )
    )  # fmt: skip
    model.set_dtype(getattr(mx, dtype))
    model.freeze()
    config = {"rank": 4, "scale": 8.0, "dropout": dropout, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
    linear_to_lora_layers(model, 2, config)
    # B is zero at first, and so is the gradient of A: start from where both are alive.
    model.update(tree_map(lambda p: p + 0.01 * mx.random.normal(p.shape), model.trainable_parameters()))
    mx.eval(model.parameters())
    return model


def data() -> list[tuple[list[int], int]]:
    """Rows of different lengths with the offset from which they are supervised; one is longer than the limit."""
    draw = np.random.RandomState(5)
    return [
        (draw.randint(1, VOCABULARY, length).tolist(), offset)
        for length, offset in ((5, 0), (9, 2), (40, 0), (33, 7), (50, 3), (12, 0), (3, 1), (20, 4))
    ]


def first_gradients(model: llama.Model, args: TrainingArgs) -> dict[str, np.ndarray[Any, Any]]:
    """Mean of the gradients of the first step's micro-batches; leaves both generators as they were."""
    np.random.seed(11)
    batches = iterate_batches(data(), args.batch_size, args.max_seq_length, loop=True)
    value_and_grad, total = nn.value_and_grad(model, default_loss), None
    for _ in range(args.grad_accumulation_steps):
        _, gradients = value_and_grad(model, *next(batches))
        total = gradients if total is None else tree_map(mx.add, gradients, total)
    mean = tree_map(lambda g: g / args.grad_accumulation_steps, total)
    return {name: np.array(array) for name, array in tree_flatten(mean)}


def main() -> None:
    """Train, and leave the results."""
    result, dtype, accumulation, dropout = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    mx.random.seed(3)
    model = build(dtype, dropout)
    optimizer = optim.Adam(optim.cosine_decay(1e-2, 20))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArgs(
            batch_size=2, iters=6, steps_per_report=1, max_seq_length=48, grad_accumulation_steps=accumulation,
            adapter_file=str(Path(folder) / "adapters.safetensors"), steps_per_eval=3, val_batches=1,
        )  # fmt: skip
        if not dropout and "check" in sys.argv:
            np.savez(f"{result}.npz", **first_gradients(model, args))
        np.random.seed(11)
        report = Losses()
        train(model, optimizer, data(), data(), args=args, training_callback=report)
    leave(result, losses=report.losses, model=model, optimizer=optimizer, tokens=report.tokens, rows=data())


if __name__ == "__main__":
    main()
