"""A plain PyTorch + PEFT loop on a tiny Llama; prints hashes of everything that recording must not change.

    torch_peft_loop.py DTYPE CLIP

CLIP: `clip` by global norm, or by `hand`.
"""

import hashlib
import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

DTYPE, CLIP = getattr(torch, sys.argv[1]), sys.argv[2]
STEPS, ACCUMULATION = 3, 3

torch.set_num_threads(1)
torch.manual_seed(7)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
lora = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(LlamaForCausalLM(config).to(DTYPE), lora)
model.train()
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 / (k + 1))
data = torch.Generator().manual_seed(3)
losses, fed = [], []
for _ in range(STEPS):
    for _ in range(ACCUMULATION):
        ids = torch.randint(1, 97, (2, 9), generator=data)
        labels = ids.clone()
        labels[0, 6:] = -100
        mask = torch.ones_like(ids)
        loss = model(ids, attention_mask=mask, labels=labels).loss / ACCUMULATION
        loss.backward()
        losses.append(loss.item())
        fed.append(ids.tolist())
    if CLIP == "clip":
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
    else:
        for p in parameters:
            p.grad.clamp_(-0.002, 0.002)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def digest(*tensors):
    flat = b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(flat).hexdigest()


print(
    json.dumps(
        {
            "losses": losses,
            "fed": fed,
            "parameters": digest(*model.state_dict().values()),
            "optimizer": digest(*(s[k].reshape(-1) for s in optimizer.state.values() for k in sorted(s))),
            "rng": digest(torch.get_rng_state()),
            "modules": sorted(
                m for m in sys.modules if m.split(".")[0] in ("torch", "transformers", "peft", "accelerate")
            ),
        }
    )
)
