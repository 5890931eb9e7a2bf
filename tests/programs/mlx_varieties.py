"""Ways to fine-tune with mlx-lm's `train`, each trained twice, plain and recorded: `mlx_varieties.py FOLDER`.

Leaves FOLDER/<case>.h5, and FOLDER/digests.json with the digests of the final parameters of both runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

import tracer

CASES = ("full", "dora", "quantized_4", "quantized_8", "quantized_dora", "lion", "adafactor", "muon", "sgd")


class Rows:
    """Eight rows of eight tokens."""

    def __init__(self) -> None:
        self.rows = np.random.default_rng(0).integers(1, 60, (8, 8)).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> list[int]:
        return self.rows[i]

    def process(self, row: list[int]) -> tuple[list[int], int]:
        return row, 0


def build(case: str) -> llama.Model:
    """Two layers of Llama, prepared as the case says."""
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
            num_key_value_heads=1, rms_norm_eps=1e-6, vocab_size=64, tie_word_embeddings=False,
        )
    )  # fmt: skip
    if case.startswith("quantized"):
        nn.quantize(model, group_size=32, bits=8 if case == "quantized_8" else 4)
    if case != "full":
        model.freeze()
        keys = ["self_attn.q_proj", "self_attn.v_proj"]
        config = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(model, 2, config, use_dora="dora" in case)
    return model


def optimizer(case: str) -> optim.Optimizer:
    """The optimizer of a case."""
    others = {"lion": optim.Lion(1e-3), "adafactor": optim.Adafactor(1e-2), "sgd": optim.SGD(1e-2, momentum=0.9)}
    if case == "muon":
        return optim.Muon(1e-2)
    return others.get(case) or optim.AdamW(1e-2)


def run(case: str, folder: Path) -> str:
    """Three steps; the digest of all parameters afterwards."""
    np.random.seed(0)
    model = build(case)
    arguments = TrainingArgs(
        batch_size=2, iters=3, val_batches=0, steps_per_report=1, steps_per_eval=100, steps_per_save=100,
        max_seq_length=32, adapter_file=str(folder / "adapters.safetensors"),
    )  # fmt: skip
    train(model, optimizer(case), CacheDataset(Rows()), None, arguments)
    digest = hashlib.sha256()
    for _, array in sorted(tree_flatten(model.parameters())):
        digest.update(np.array(array).tobytes())
    return digest.hexdigest()


def main() -> None:
    """Every case, plain and recorded."""
    mx.set_default_device(mx.cpu)
    folder, digests = Path(sys.argv[1]), {}
    for case in CASES:
        plain = run(case, folder)
        with tracer.record(folder / f"{case}.h5"):
            recorded = run(case, folder)
        digests[case] = [plain, recorded]
    (folder / "digests.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main()
