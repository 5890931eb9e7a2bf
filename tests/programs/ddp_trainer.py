"""A transformers Trainer on a tiny Llama, on one process or on the ranks of torchrun: `ddp_trainer.py ROWS_OF_A_PROCESS [MODEL]`.

MODEL: folder to save the model in before training.
"""

import json
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
torch.manual_seed(7)
config = LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config)
if len(sys.argv) > 2:
    model.save_pretrained(sys.argv[2])
ids = torch.randint(1, 61, (8, 9), generator=torch.Generator().manual_seed(3))
rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
# Ranks supervise unequally many positions.
for row in rows[::3]:
    row["labels"][:5] = -100

arguments = TrainingArguments(
    output_dir=tempfile.gettempdir(), per_device_train_batch_size=int(sys.argv[1]), max_steps=2, learning_rate=1e-2,
    max_grad_norm=0.05, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=5, logging_strategy="no",
)  # fmt: skip
trainer = Trainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
if trainer.is_world_process_zero():
    print(json.dumps([p.double().sum().item().hex() for p in model.parameters()]))
