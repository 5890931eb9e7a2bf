"""The tiny models: the same weights in both frameworks, and the same function where it is meant to be the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scenarios.models import CACHE_VARIABLE, TINY, model_source, weights
from tests.scenarios.conftest import needs_mlx, needs_torch
from tracer.errors import BadConfig

LOGITS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
ids = np.random.RandomState(0).randint(3, 512, (2, 24))
def torch_side(folder):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return {n: p.numpy() for n, p in model.named_parameters()}, model(torch.tensor(ids)).logits.numpy()
def mlx_side(folder):
    import mlx.core as mx, mlx_lm
    from mlx.utils import tree_flatten
    model = mlx_lm.load(folder)[0]
    return {n: np.array(p) for n, p in tree_flatten(model.parameters())}, np.array(model(mx.array(ids)))
result = {}
for folder in sys.argv[1:]:
    (a, logits_a), (b, logits_b) = torch_side(folder), mlx_side(folder)
    result[folder] = {
        "names": sorted(a) == sorted(b),
        "bits": all(np.array_equal(a[n].view(np.uint32), b[n].view(np.uint32)) for n in a),
        "weights": len(a),
        "error": float(np.linalg.norm(logits_a - logits_b) / np.linalg.norm(logits_a)),
    }
print(json.dumps(result))
"""


@needs_torch
@needs_mlx
def test_both_frameworks_load_the_same_bits_and_agree_where_the_embedding_scale_survives_bfloat16() -> None:
    folders = {name: model_source(name) for name in TINY}
    done = subprocess.run([sys.executable, "-c", LOGITS, *folders.values()], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for name, folder in folders.items():
        assert found[folder]["names"]
        assert found[folder]["bits"]
        assert found[folder]["weights"] == len(weights(TINY[name]))
    assert found[folders["tiny-llama"]]["error"] < 5e-6
    assert found[folders["tiny-gemma3-64"]]["error"] < 5e-6
    assert found[folders["tiny-gemma3-96"]]["error"] > 1e-4


def test_the_scale_of_hidden_96_and_not_that_of_64_is_changed_by_bfloat16() -> None:
    from tracer.dtypes import bf16_to_float32, float32_to_bf16

    rounded = {h: bf16_to_float32(float32_to_bf16(np.array([h**0.5], np.float32)))[0] for h in (64, 96)}
    assert rounded[64] == 64**0.5
    assert rounded[96] != pytest.approx(96**0.5, rel=1e-3)


def test_weights_are_the_same_at_every_draw() -> None:
    first, second = weights(TINY["tiny-llama"]), weights(TINY["tiny-llama"])
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_cache_folder_can_be_moved_and_holds_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra `torch` or `mlx`")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    folder = Path(model_source("tiny-llama"))
    assert folder.parent == tmp_path
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} == {
        p.name for p in folder.iterdir()
    }
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_local_folder_and_a_hub_id_are_handed_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_source(str(tmp_path)) == str(tmp_path)
    assert model_source("google/gemma-3-270m-it") == "google/gemma-3-270m-it"


@pytest.mark.parametrize("name", ["tiny-lama", "./absent", "/absent/model", "a/b/c"])
def test_a_model_that_is_neither_is_refused(name: str) -> None:
    with pytest.raises(BadConfig, match="neither a folder nor a hub id"):
        model_source(name)
