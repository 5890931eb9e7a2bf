"""A transformers Trainer on a tiny Llama with PEFT; prints hashes of everything that recording must not change.

    torch_trainer.py DTYPE

bfloat16 also trains under autocast.
"""

import hashlib
import json
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

DTYPE = sys.argv[1]

torch.set_num_threads(1)
torch.manual_seed(7)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(LlamaForCausalLM(config).to(getattr(torch, DTYPE)), lora)
ids = torch.randint(1, 97, (18, 9), generator=torch.Generator().manual_seed(3))
rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
for row in rows[::2]:
    row["labels"][:5] = -100


class Log(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        seen.append({k: v for k, v in logs.items() if k in ("loss", "grad_norm", "learning_rate", "eval_loss")})


seen = []
arguments = TrainingArguments(
    output_dir=tempfile.gettempdir(), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=3,
    learning_rate=1e-2, max_grad_norm=0.05, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
    bf16=DTYPE == "bfloat16", disable_tqdm=True, seed=5, weight_decay=0.1, eval_strategy="steps", eval_steps=2,
)  # fmt: skip
trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[Log()])
trainer.train()


def digest(*tensors):
    flat = b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(flat).hexdigest()


state = trainer.optimizer.state
print(
    json.dumps(
        {
            "log": seen,
            "parameters": digest(*model.state_dict().values()),
            "optimizer": digest(*(s[k].reshape(-1) for s in state.values() for k in sorted(s))),
            "rng": digest(torch.get_rng_state()),
            "rows": [row["input_ids"].tolist() for row in rows],
        }
    )
)
