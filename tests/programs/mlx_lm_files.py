"""A tiny Llama in Hugging Face format, its tokenizer, a data set and a config for `mlx_lm lora`: `mlx_lm_files.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import yaml
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, models, pre_tokenizers

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
    "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 64,
    "tie_word_embeddings": True, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip


def main() -> None:
    """Write everything into the folder."""
    folder = Path(sys.argv[1])
    model_folder, data = folder / "model", folder / "data"
    for path in (model_folder, data):
        path.mkdir(parents=True)
    (model_folder / "config.json").write_text(json.dumps(CONFIG))
    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    mx.save_safetensors(
        str(model_folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(61))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model_folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, first in (("train", 0), ("valid", 8)):
        lines = [
            {"text": " ".join(f"w{(7 * row + 3 * i) % 61}" for i in range(4 + row))} for row in range(first, first + 8)
        ]
        (data / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    config = {
        "model": str(model_folder), "train": True, "data": str(data), "iters": 4, "batch_size": 2, "num_layers": 1,
        "adapter_path": str(folder / "adapters"), "seed": 4, "val_batches": 1, "steps_per_report": 1, "optimizer": "adamw",
        "optimizer_config": {"adamw": {"bias_correction": True}}, "max_seq_length": 64, "learning_rate": 1e-3,
        "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.05},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


if __name__ == "__main__":
    main()
