"""Train a small language model on one process or on the ranks of torchrun, once unrecorded and once recorded per case.

`ddp_cases.py FOLDER CASE…` writes FOLDER/CASE.h5 (each rank its own) and prints, on rank 0, one JSON object: case -> whether the
two trainings end in the same bits on every rank.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tracer

WORLD, STEPS, ROWS, LENGTH, WORDS, WIDTH, LIMIT = 2, 3, 2, 7, 23, 6, 0.05
# Supervised positions of each rank's rows, where they are not all.
UNEQUAL = (2, LENGTH)


class Tiny(torch.nn.Module):
    """Embedding (frozen), one hidden layer of odd width, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(WORDS, WIDTH).requires_grad_(False)
        self.hidden = torch.nn.Linear(WIDTH, 5)
        self.lm_head = torch.nn.Linear(5, WORDS, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the supervised positions."""
        logits = self.lm_head(torch.tanh(self.hidden(self.embed_tokens(input_ids))))
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def batch(step: int, rank: int, *, supervised: int) -> dict[str, torch.Tensor]:
    """The rows of one rank at one step, int64 [ROWS, LENGTH]."""
    ids = torch.randint(WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(100 * step + rank))
    labels = ids.clone()
    labels[:, supervised:] = -100
    return {"input_ids": ids, "labels": labels}


def wrap(case: str, model: Tiny) -> Any:
    """The model as the case distributes it."""
    if case.startswith("fsdp"):
        fully_shard(model.hidden)
        return fully_shard(model)
    return DistributedDataParallel(model) if case in ("ddp", "local_clip", "no_sync", "unequal") else model


def train(case: str) -> list[torch.Tensor]:
    """One training; the parameters that this process holds at its end."""
    torch.manual_seed(0)
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = wrap(case, Tiny())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    local: dict[str, float] = {}
    if case == "local_clip":
        model.register_comm_hook(local, remember_norm)
    for step in range(STEPS):
        supervised = UNEQUAL if case in ("unequal", "tokens") else (LENGTH,) * WORLD
        batches = [batch(step, r, supervised=supervised[r]) for r in range(WORLD)]
        with model.no_sync() if case == "no_sync" and step == 1 else contextlib.nullcontext():
            backward(case, model, batches, rank)
        if case == "hand":
            for parameter in trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= WORLD
        clip(case, trained, local, rank)
        optimizer.step()
        optimizer.zero_grad()
    return [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]


def backward(case: str, model: Any, batches: list[dict[str, torch.Tensor]], rank: int) -> None:
    """The gradients of one step."""
    if case == "single":
        model(**{name: torch.cat([b[name] for b in batches]) for name in batches[0]}).backward()
    elif case in ("accumulated", "tokens"):
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
        for one, count in zip(batches, counts, strict=True):
            (model(**one) * (count / sum(counts) if case == "tokens" else 1 / WORLD)).backward()
    else:
        model(**batches[rank]).backward()


def clip(case: str, trained: list[Any], local: dict[str, float], rank: int) -> None:
    """Clip by the global norm; a rank at fault uses the norm of what it held itself."""
    grads = [p.grad for p in trained]
    if case == "local_clip" and rank == 1:
        factor = LIMIT / (local.pop("squares") ** 0.5 + 1e-6)
        for grad in grads:
            grad.mul_(factor)
    elif case == "fsdp_local_clip":
        parts = [grad.to_local() for grad in grads]
        factor = LIMIT / (float(torch.stack([part.norm() for part in parts]).norm()) + 1e-6)
        for part in parts:
            part.mul_(factor)
    else:
        local.clear()
        torch.nn.utils.clip_grad_norm_(trained, LIMIT)


def remember_norm(local, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """DDP's own all-reduce, after a look at what this rank brings."""
    local["squares"] = local.get("squares", 0.0) + float(bucket.buffer().double().square().sum())
    reduced = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True).get_future()
    return reduced.then(lambda done: done.value()[0])


@contextlib.contextmanager
def ranks() -> Iterator[bool]:
    """The process group, if torchrun started us; whether this process prints."""
    if not dist.is_torchelastic_launched():
        yield True
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        # A sharded model that outlives the group aborts the process at its end, now and then (torch 2.13, gloo).
        gc.collect()
        dist.destroy_process_group()


def same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two trainings end in the same parameters, bit for bit."""
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(first, second, strict=True))


def recorded(folder: Path, case: str, run: Callable[[str], list[torch.Tensor]]) -> list[torch.Tensor]:
    """The training of a case under the recorder."""
    options = {"micro_grads": True} if case == "tokens" else {}
    with tracer.record(folder / f"{case}.h5", **options):
        return run(case)


def main(folder: Path, cases: list[str]) -> None:
    """Run the cases."""
    torch.set_num_threads(1)
    with ranks() as prints:
        found = {case: same_bits(train(case), recorded(folder, case, train)) for case in cases}
        if dist.is_initialized():
            everywhere: list[Any] = [None] * WORLD
            dist.all_gather_object(everywhere, found)
            found = {case: all(one[case] for one in everywhere) for case in cases}
        if prints:
            print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
