"""Tiny models in the Hugging Face format, built from a fixed seed on first use and kept in a cache folder.

A folder holds config.json, model.safetensors and a byte-level tokenizer, so that transformers and mlx-lm load the
very same files; the weights are drawn with numpy, so that a machine needs neither framework to build them.

`tiny-gemma3-64` and `tiny-gemma3-96` differ in one thing that matters: mlx-lm rounds Gemma's embedding scale,
sqrt(hidden), to bfloat16.  8.0 survives that and 9.798 does not, so at 96 the two frameworks really compute
different models.  Invariant: a folder in the cache is complete (it is built beside and renamed).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scenarios.corpus import sentences
from tracer.errors import BadConfig, PathUnavailable

CACHE_VARIABLE: Final = "STEPTRACE_CACHE"
# Part of a folder's name; a change to what is built here needs a new one.
_REVISION: Final = "1"
_VOCABULARY: Final = 512
_SPECIAL: Final = ("<pad>", "<bos>", "<eos>")
_TOKENIZER_ROWS: Final = 400


@dataclass(frozen=True, slots=True)
class Tiny:
    """Sizes of a tiny model; `family` is llama or gemma3_text."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    intermediate: int
    seed: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


TINY: Final[dict[str, Tiny]] = {
    tiny.name: tiny
    for tiny in (
        Tiny("tiny-llama", "llama", 4, 64, 4, 2, 128, 11),
        Tiny("tiny-gemma3-64", "gemma3_text", 18, 64, 4, 1, 128, 12),
        Tiny("tiny-gemma3-96", "gemma3_text", 18, 96, 4, 1, 192, 13),
    )
}


def cache_folder() -> Path:
    """Where tiny models are kept: $STEPTRACE_CACHE, else the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "steptrace"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steptrace"


def model_source(name: str) -> str:
    """What to hand to a framework's loader for `model.name`: a folder, or a hub id as it was given.

    Builds a tiny model on first use.  Raises BadConfig for a folder without a config.json or an unlikely hub id.
    """
    if name in TINY:
        return str(tiny_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadConfig(f"{name} has no config.json", "give a folder in the Hugging Face format")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise BadConfig(
            f"model.name = {json.dumps(name)} is neither a folder nor a hub id",
            f"use one of {', '.join(TINY)}, a local folder or owner/name",
        )
    return name


def tiny_folder(name: str) -> Path:
    """Folder of a tiny model, built if it is not there yet."""
    folder = cache_folder() / f"{name}-{_REVISION}"
    if not (folder / "config.json").is_file():
        _build(TINY[name], folder)
    return folder


def _build(tiny: Tiny, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save = _safetensors()
        save(weights(tiny), str(beside / "model.safetensors"), metadata={"format": "pt"})
        (beside / "config.json").write_text(json.dumps(model_config(tiny), indent=2) + "\n", "utf-8")
        _write_tokenizer(beside)
        beside.chmod(0o755)
        try:
            beside.rename(folder)
        except OSError:  # another process was faster; its files are the same
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _safetensors() -> Any:
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise PathUnavailable(
            "the tiny models need safetensors", "install steptrace[torch] or steptrace[mlx]"
        ) from error
    return save_file


def model_config(tiny: Tiny) -> dict[str, Any]:
    """config.json.  The rotary settings are there twice: transformers 5 reads `rope_parameters`, mlx-lm the older keys."""
    common = {
        "hidden_size": tiny.hidden,
        "num_hidden_layers": tiny.layers,
        "intermediate_size": tiny.intermediate,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.key_value_heads,
        "head_dim": tiny.head_dim,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return common | (_gemma3(tiny) if tiny.family == "gemma3_text" else _llama())


def _llama() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _gemma3(tiny: Tiny) -> dict[str, Any]:
    pattern = 6
    kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(tiny.layers)]
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": tiny.head_dim,
        "sliding_window": 512,
        "sliding_window_pattern": pattern,
        "layer_types": kinds,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def weights(tiny: Tiny) -> dict[str, npt.NDArray[np.float32]]:
    """Weights by checkpoint name, float32.  Projections have standard deviation 1/sqrt(in), so activations stay O(1)."""
    random = np.random.RandomState(tiny.seed)
    return {
        name: (mean + deviation * random.standard_normal(shape)).astype(np.float32)
        for name, shape, mean, deviation in _tensors(tiny)
    }


def _tensors(tiny: Tiny) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, mean and standard deviation of each weight, in the order in which they are drawn."""
    hidden, wide = tiny.hidden, tiny.intermediate
    queries, keys = tiny.heads * tiny.head_dim, tiny.key_value_heads * tiny.head_dim
    norm = 1.0 if tiny.family == "llama" else 0.0  # Gemma adds the 1 itself
    yield "model.embed_tokens.weight", (_VOCABULARY, hidden), 0.0, hidden**-0.5
    for layer in range(tiny.layers):
        at = f"model.layers.{layer}"
        for name, shape in (
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, queries)),
            ("mlp.gate_proj", (wide, hidden)),
            ("mlp.up_proj", (wide, hidden)),
            ("mlp.down_proj", (hidden, wide)),
        ):
            yield f"{at}.{name}.weight", shape, 0.0, shape[1] ** -0.5
        for name, width in _norms(tiny):
            yield f"{at}.{name}.weight", (width,), norm, 0.1
    yield "model.norm.weight", (hidden,), norm, 0.1


def _norms(tiny: Tiny) -> tuple[tuple[str, int], ...]:
    around = (("input_layernorm", tiny.hidden), ("post_attention_layernorm", tiny.hidden))
    if tiny.family == "llama":
        return around
    inside = (("self_attn.q_norm", tiny.head_dim), ("self_attn.k_norm", tiny.head_dim))
    return (*around, ("pre_feedforward_layernorm", tiny.hidden), ("post_feedforward_layernorm", tiny.hidden), *inside)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 512 tokens, trained on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(_TOKENIZER_ROWS, seed=0), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": _SPECIAL[0],
        "bos_token": _SPECIAL[1],
        "eos_token": _SPECIAL[2],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
