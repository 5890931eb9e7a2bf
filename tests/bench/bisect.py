"""`python -m tests.bench.bisect [FOLDER]`: an mlx-lm-default configuration against an unsloth-like one, bisected.

The two differ in more than twenty settings, three of which matter: how many layers are adapted, where the seed is set, and an
element-wise clip.  Prints the report; ends with 1 unless just those three are named within 40 runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scenarios.models import model_source

RUNS = 40
MATTER = {"lora.layers", "train.seed_at", "clip.mode"}
A = """\
defaults = "mlx-lm"
model.name = "tiny-gemma3-64"
train = { batch = 2, autocast = "none", checkpointing = false }
optimizer.lr = 1e-3
"""
B = """\
model = { name = "MODEL", dtype = "float32" }
data = { batching = "library", order_seed = 7, mask_step = 3 }
optimizer = { name = "adamw", lr = 1e-3, bias_correction = false }
clip = { mode = "value", value = 1.0 }
loss = { reduction = "mean-of-means", precision = "float32" }
parts = { loader = "mlx-lm", loss = "mlx-lm", loop = "mlx-lm" }

[lora]
rank = 8
alpha = 160
layers = "all"
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

[train]
steps = 60
batch = 2
seed_at = "before-load"
compile = true
device = "cpu"
checkpointing = true
data_seed = 0
autocast = "library"
validation_batches = 4
"""


def main(folder: Path) -> int:
    """Bisect in `folder`; the exit code."""
    model = folder / "gemma"
    if not model.exists():
        shutil.copytree(model_source("tiny-gemma3-64"), model)
    (folder / "a.toml").write_text(A)
    (folder / "b.toml").write_text(B.replace("MODEL", str(model)))
    command = [sys.executable, "-m", "tracer", "bisect", "a.toml", "b.toml", "--path", "mlx-lm"]
    began = time.monotonic()
    done = subprocess.run([*command, "--max-runs", str(RUNS)], cwd=folder, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - began
    print(done.stdout)
    again = [*command, "-q", "--format", "json"]
    report = json.loads(subprocess.run(again, cwd=folder, stdout=subprocess.PIPE, text=True).stdout)
    named = {item["key"] for found in report["found"] for item in found["items"]}
    print(f"{len(report['differing'])} settings differ, {seconds:.0f} s; named: {', '.join(sorted(named))}")
    return int(done.returncode != 1 or named != MATTER or len(report["differing"]) < 20)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory(prefix="bench-bisect-") as made:
        sys.exit(main(Path(made)))
