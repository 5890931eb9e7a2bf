"""Small training loops with something unusual in each; every one runs without and with a recorder.

    torch_cases.py FOLDER

Writes FOLDER/<case>.h5 and prints per case what it returned: both times it must be the same.
"""

import contextlib
import copy
import gc
import hashlib
import io
import json
import math
import sys
import warnings
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_ as clip_imported_by_name
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import tracer

torch.set_num_threads(1)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


class Tiny(torch.nn.Module):
    """A language model of two tied matrices; `unused` takes no part in the forward."""

    def __init__(self, dtype=torch.float32, dropout=0.1):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6, dtype=dtype)
        self.inner = torch.nn.Linear(6, 6, dtype=dtype)
        self.unused = torch.nn.Linear(2, 2, dtype=dtype)
        self.head = torch.nn.Linear(6, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.frozen = torch.nn.Parameter(torch.ones(6, dtype=dtype), requires_grad=False)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, input_ids, labels=None):
        hidden = self.dropout(torch.tanh(self.inner(self.embed(input_ids) * self.frozen)))
        logits = self.head(hidden)
        if labels is None:
            return logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def batches(count):
    data = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (2, 5), generator=data) for _ in range(count)]


def digest(model, *optimizers):
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [v for _, v in sorted(state.items()) if torch.is_tensor(v)]
    return hashlib.sha256(b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()


@case
def full_fine_tune():
    """Two groups with different settings, a tied weight, a parameter without a gradient, positional arguments."""
    model = Tiny()
    groups = [{"params": [model.embed.weight], "weight_decay": 0.5}, {"params": [*model.inner.parameters()]}]
    optimizer = torch.optim.AdamW([*groups, {"params": [*model.unused.parameters()]}], lr=0.1, betas=(0.8, 0.9))
    for ids in batches(3):
        optimizer.zero_grad()
        model(ids, ids).backward()
        optimizer.step()
    return digest(model, optimizer)


@case
def sgd_in_bfloat16():
    model = Tiny(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for ids in batches(3):
        optimizer.zero_grad()
        model(ids, labels=ids).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
    return digest(model, optimizer)


@case
def clip_by_a_function_imported_before():
    model = Tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for ids in batches(2):
        optimizer.zero_grad()
        model(ids, ids).backward()
        clip_imported_by_name((p for p in model.parameters()), 0.25)
        optimizer.step()
    return digest(model, optimizer)


@case
def loss_outside_the_model():
    """The loop computes its own loss, from shifted and partly ignored labels; never calls train()."""
    model = Tiny().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for ids in batches(2):
        with torch.no_grad():
            model(ids)
        model(ids.flip(0))  # not training: no backward follows
        target = ids[:, 1:].clone()
        target[0, :2] = 0
        loss = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2)[:, :, :-1], target, ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return digest(model, optimizer)


@case
def loss_with_a_mask_of_its_own():
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for ids in batches(2):
        each = torch.nn.functional.cross_entropy(
            model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        (each * torch.arange(8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return digest(model, optimizer)


@case
def two_optimizers():
    model = Tiny()
    first = torch.optim.AdamW(model.inner.parameters(), lr=0.1)
    second = torch.optim.SGD([model.embed.weight], lr=0.2)
    for ids in batches(3):
        model(ids, ids).backward()
        first.step()
        second.step()
        model.zero_grad()
    return digest(model, first, second)


@case
def closure_once():
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for ids in batches(2):

        def closure(ids=ids):
            optimizer.zero_grad()
            loss = model(ids, ids)
            loss.backward()
            return loss

        optimizer.step(closure)
    return digest(model, optimizer)


@case
def closure_often():
    model = Tiny(dropout=0.0)
    optimizer = torch.optim.LBFGS([*model.inner.parameters()], max_iter=3)
    for ids in batches(2):

        def closure(ids=ids):
            optimizer.zero_grad()
            loss = model(ids, ids)
            loss.backward()
            return loss

        optimizer.step(closure)
    return digest(model)


@case
def scaled_losses():
    """A GradScaler, accumulation over two micro-batches, the second window overflows and is skipped."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, ids in enumerate(batches(6)):
        loss = model(ids, ids) / 2
        scaler.scale(loss * math.inf if i == 2 else loss).backward()
        if i % 2:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return digest(model, optimizer)


@case
def scaled_losses_fused():
    """The optimizer unscales by itself, and skips the second window by itself."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, ids in enumerate(batches(3)):
        loss = model(ids, ids)
        scaler.scale(loss * math.inf if i == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return digest(model, optimizer)


@case
def thrown_away_gradients():
    """Gradients of the first of each two batches are thrown away."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for i, ids in enumerate(batches(4)):
        optimizer.zero_grad()
        model(ids, ids).backward()
        if i % 2:
            optimizer.step()
    return digest(model, optimizer)


@case
def update_inside_backward():
    model = Tiny()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters() if p.requires_grad}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    for ids in batches(2):
        model(ids, ids).backward()
    return digest(model)


@case
def gradients_by_hand():
    model = Tiny()
    parameters = [*model.inner.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for ids in batches(2):
        for parameter, grad in zip(parameters, torch.autograd.grad(model(ids, ids), parameters), strict=True):
            parameter.grad = grad
        optimizer.step()
    return digest(model)


@case
def checkpointed():
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    inner = model.inner.forward
    model.inner.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=True)
    for ids in batches(2):
        optimizer.zero_grad()
        model(ids, ids).backward()
        optimizer.step()
    return digest(model, optimizer)


@case
def compiled():
    model = Tiny(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    fast = torch.compile(model, backend="eager")
    for ids in batches(2):
        optimizer.zero_grad()
        fast(ids, ids).backward()
        optimizer.step()
    torch._dynamo.reset()
    return digest(model, optimizer)


@case
def compiled_in_place():
    model = Tiny(dropout=0.0)
    model.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for ids in batches(2):
        optimizer.zero_grad()
        model(ids, ids).backward()
        optimizer.step()
    torch._dynamo.reset()
    return digest(model, optimizer)


@case
def backward_that_fails():
    """As a loop that meets "out of memory" and tries again with the next batch."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def fail(grad):
        raise MemoryError

    for i, ids in enumerate(batches(3)):
        loss = model(ids, ids)
        if i == 1:
            loss.register_hook(fail)
        with contextlib.suppress(MemoryError):
            loss.backward()
        if i == 2:
            optimizer.step()
    return digest(model, optimizer)


@case
def copied_and_saved():
    """A copy of the model and a saved file hold nothing of the recorder."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for ids in batches(2):
        optimizer.zero_grad()
        model(ids, ids).backward()
        optimizer.step()
    model.train()
    copy.deepcopy(model)(ids, ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    text = buffer.getvalue()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)(ids, ids)
    return [b"tracer" in text, digest(model, optimizer)]


EARLIER = {}


@case
def begun_before():
    """The model and the optimizer are older than the recording, and have made steps."""
    model, optimizer = EARLIER.pop("run")
    for ids in batches(2):
        optimizer.zero_grad()
        model(ids, ids).backward()
        optimizer.step()
    return digest(model, optimizer)


def prepare_begun_before():
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(batches(1)[0], batches(1)[0]).backward()
    optimizer.step()
    EARLIER["run"] = model, optimizer


def run(name, recording):
    torch.manual_seed(3)
    if name == "begun_before":
        prepare_begun_before()
    with recording:
        return CASES[name]()


@contextlib.contextmanager
def careless_recorder(fault):
    """What a recorder must never do, to show that the comparison would find it."""
    original = torch.Tensor.backward

    def backward(loss, *args, **kwargs):
        result = original(loss, *args, **kwargs)
        if fault == "draws a number":
            torch.rand(1)
        elif fault == "rounds a gradient":
            for model in (o for o in gc.get_objects() if type(o) is Tiny and o.inner.weight.grad is not None):
                model.inner.weight.grad[0, 0] = torch.nextafter(model.inner.weight.grad[0, 0], torch.tensor(9.0))
        return result

    torch.Tensor.backward = backward
    try:
        yield
    finally:
        torch.Tensor.backward = original


def hooked():
    """What the recorder replaces, as it is now."""
    return [
        torch.Tensor.backward, torch.autograd.backward, torch.optim.Optimizer.__init__, torch.compile,
        torch.amp.GradScaler.scale, torch.amp.GradScaler.step, torch.nn.functional.cross_entropy,
        torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad.clip_grad_norm_, torch.nn.utils.clip_grad_value_,
        clip_imported_by_name, *_global_optimizer_pre_hooks.values(),
        *_global_optimizer_post_hooks.values(),
    ]  # fmt: skip


def main():
    folder, before, results = Path(sys.argv[1]), hooked(), {}
    warnings.simplefilter("ignore")
    for name in CASES:
        plain = run(name, contextlib.nullcontext())
        results[name] = [plain, run(name, tracer.record(folder / f"{name}.h5"))]
    results["restored"] = hooked() == before
    results["planted"] = {
        fault: [run("full_fine_tune", contextlib.nullcontext()), run("full_fine_tune", careless_recorder(fault))]
        for fault in ("nothing", "draws a number", "rounds a gradient")
    }
    print(json.dumps(results))


main()
