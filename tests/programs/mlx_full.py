"""Full fine-tuning of a tiny Llama in MLX, tied embedding and all, two steps, recorded.  mlx_full.py MODEL TRACE"""

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np

import tracer

folder, trace = sys.argv[1:]
model = mlx_lm.load(folder)[0]
model.train()
optimizer = optim.AdamW(learning_rate=1e-3, bias_correction=True)
random = np.random.RandomState(5)


def loss(model, input_ids, labels):
    logits = model(input_ids[:, :-1])
    targets = labels[:, 1:]
    keep = targets != -100
    return (nn.losses.cross_entropy(logits, mx.where(keep, targets, 0)) * keep).sum() / keep.sum()


with tracer.record(trace):
    step = nn.value_and_grad(model, loss)
    for _ in range(2):
        ids = random.randint(3, 500, (2, 11))
        labels = ids.copy()
        labels[:, 0] = labels[1, 7:] = -100
        _, gradients = step(model, mx.array(ids), mx.array(labels))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
