"""Ways to fine-tune with transformers and PEFT, each trained twice, plain and recorded: `peft_varieties.py FOLDER`.

Leaves FOLDER/<case>.h5, and FOLDER/digests.json with the digests of the final parameters of both runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import tracer

# transformers warns of its own deprecated attribute when PEFT reads it.
warnings.simplefilter("ignore")

CASES = (
    "dora", "rslora", "modules_to_save", "tied_modules_to_save", "embeddings", "full", "unfrozen_later", "autocast",
    "second_model", "two_adapters", "checkpointed", "compiled",
)  # fmt: skip


def build(case: str) -> torch.nn.Module:
    """Two layers of Llama, prepared as the case says."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=case == "tied_modules_to_save",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if case == "full":
        return model
    options: dict[str, object] = {"target_modules": ["q_proj", "v_proj"]}
    if case == "dora":
        options["use_dora"] = True
    elif case == "rslora":
        options["use_rslora"] = True
    elif case.endswith("modules_to_save"):
        options["modules_to_save"] = ["lm_head", "embed_tokens"]
    elif case == "embeddings":
        options["target_modules"] = ["embed_tokens", "q_proj"]
    if case == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    if case == "two_adapters":
        adapted.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    return adapted


def train(case: str) -> str:
    """Three steps; the digest of all parameters afterwards."""
    model = build(case)
    forward = torch.compile(model, backend="eager") if case == "compiled" else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    frozen = build("full").eval() if case == "second_model" else None
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        ids = torch.randint(0, 64, (2, 8), generator=generator)
        if case == "unfrozen_later" and step == 1:
            norm = model.base_model.model.model.norm.weight
            norm.requires_grad_(True)
            optimizer.add_param_group({"params": [norm], "lr": 1e-3})
        if frozen is not None:
            with torch.no_grad():
                frozen(input_ids=ids)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
            loss = forward(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Every case, plain and recorded."""
    folder, digests = Path(sys.argv[1]), {}
    for case in CASES:
        plain = train(case)
        with tracer.record(folder / f"{case}.h5"):
            recorded = train(case)
        digests[case] = [plain, recorded]
    (folder / "digests.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main()
