"""Small training loops, each with a mistake of its users, beside the same without it: `torch_gaps.py FOLDER`.

Every loop runs without and with a recorder, which writes FOLDER/<loop>.h5.  Prints per loop a digest of what it ends with, both
times, and the error with which the recording ended, if any.
"""

import contextlib
import hashlib
import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import tracer
from tracer.errors import NothingRecorded

torch.set_num_threads(1)
LOOPS = {}
IDS = torch.arange(1, 9).reshape(2, 4)


def loop(function):
    LOOPS[function.__name__] = function
    return function


def adapted(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


def train(model, optimizer, change=lambda loss: loss, before=lambda: None, after=lambda step: None, steps=2):
    """Steps of a causal language model; `change` makes of its loss what is differentiated, or None."""
    for step in range(steps):
        loss = change(model(input_ids=IDS, labels=IDS).loss)
        if loss is not None:
            loss.backward()
        before()
        optimizer.step()
        optimizer.zero_grad()
        after(step)
    return model


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


# What the optimizer holds.


@loop
def after_peft():
    model = adapted(llama())
    return train(model, adamw(model.parameters()))


@loop
def before_peft():
    model = llama()
    optimizer = adamw(model.parameters())
    return train(adapted(model), optimizer)


@loop
def before_peft_of_a_frozen_base():
    model = llama().requires_grad_(False)
    optimizer = adamw(model.parameters())
    return train(adapted(model), optimizer)


@loop
def half_held():
    model = adapted(llama())
    return train(model, adamw([p for name, p in model.named_parameters() if "lora_A" in name]))


# What is differentiated.


@loop
def detached():
    model = adapted(llama())
    return train(model, adamw(model.parameters()), lambda loss: loss.detach().requires_grad_())


@loop
def zeroed_too_early():
    model = adapted(llama())
    optimizer = adamw(model.parameters())
    return train(model, optimizer, before=optimizer.zero_grad)


@loop
def never_differentiated():
    model = adapted(llama())
    return train(model, adamw(model.parameters()), lambda loss: None)


@loop
def nothing_held_nor_differentiated():
    model = llama()
    optimizer = adamw(model.parameters())
    return train(adapted(model), optimizer, lambda loss: None)


@loop
def all_frozen():
    model = llama()
    optimizer = adamw(model.parameters())
    return train(model.requires_grad_(False), optimizer, lambda loss: None)


@loop
def always_overflowing():
    model = llama()
    optimizer = adamw(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in range(2):
        scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model


@loop
def idle_beside_another():
    """An optimizer without gradients that steps first, and one that steps before anything was differentiated."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    idle, busy = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    busy.step()
    for _ in range(2):
        model[1](torch.randn(3, 4)).pow(2).mean().backward()
        idle.step()
        busy.step()
        busy.zero_grad()
    return model


# Autocast and modes.


class Small(torch.nn.Module):
    """A model whose forward may be under autocast inside, as a decorator makes it."""

    def __init__(self, inside=False):
        super().__init__()
        self.up, self.dropout, self.down = torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
        self.inside = inside

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=True) if self.inside else contextlib.nullcontext():
            return self.down(self.dropout(self.up(x)))


def steps_of(model, around=contextlib.nullcontext, after=lambda step: None, optimizer=None, steps=3):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        with around():
            loss = model(torch.randn(3, 4)).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)
    return model


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@loop
def autocast_around():
    return steps_of(Small(), autocast)


@loop
def autocast_inside():
    return steps_of(Small(inside=True))


@loop
def autocast_in_evaluation_only():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with autocast(), torch.no_grad():
        model(torch.randn(3, 4))
    return steps_of(model, optimizer=optimizer)


@loop
def evaluated_in_between():
    model = Small()

    def evaluate(step):
        model.eval()
        model(torch.randn(3, 4))
        with torch.no_grad():
            model(torch.randn(3, 4))
        model.train()

    return steps_of(model, after=evaluate)


@loop
def left_in_evaluation():
    model = Small()
    return steps_of(model, after=lambda step: model.eval())


@loop
def always_in_evaluation():
    return steps_of(Small().eval())


@loop
def partly_in_evaluation():
    model = Small()
    model.dropout.eval()
    return steps_of(model)


# Names.


def within(inner):
    return torch.nn.Sequential(inner, torch.nn.Linear(2, 2))


@loop
def wrapped_before():
    model = within(Small())
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    return steps_of(model, optimizer=optimizer)


@loop
def wrapped_later():
    inner = Small()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    model = within(inner)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    return steps_of(model, optimizer=optimizer)


@loop
def wrapped_later_and_unheld():
    inner = Small()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    return steps_of(within(inner), optimizer=optimizer)


@loop
def held_beside():
    """A head that a list holds beside the model, which is never called, and a parameter that no module owns."""
    model, head, factor = Small(), torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = torch.nn.ModuleList([model, head])
    optimizer.add_param_group({"params": [*parts[1].parameters(), factor]})
    steps_of(lambda x: head(model(x)) * factor, optimizer=optimizer)
    return torch.nn.ParameterList([*model.parameters(), *head.parameters(), factor])


def digest(model):
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    return hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()


def main(folder):
    said = {}
    for name, run in LOOPS.items():
        torch.manual_seed(0)
        plain, error, found = digest(run()), "", []
        torch.manual_seed(0)
        try:
            with tracer.record(f"{folder}/{name}.h5") as recorder:
                found.append(digest(run()))
        except NothingRecorded as nothing:
            error = nothing.line()
        said[name] = {"plain": plain, "recorded": found[0], "error": error, "failure": recorder.failure}
    said["hooks"] = len(torch.nn.modules.module._global_forward_pre_hooks)
    print(json.dumps(said))


main(sys.argv[1])
