"""Make a PyTorch run a twin: move its parameters by one rounding unit, in place, before its first training forward.

The only code of this backend that changes a tensor, and it runs only where `RecordOptions.twin` asks for it.  Optimizers keep
their references (nothing is replaced), and no generator is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tracer.backends.pytorch_registry import Registry
from tracer.backends.pytorch_tensors import local_part, take
from tracer.names import NameMap
from tracer.perturb import Perturbation, nudge


def perturb(registry: Registry, twin: Perturbation, names: NameMap) -> int:
    """Move what the twin moves, one parameter in memory at a time; returns how many parameters were moved."""
    import torch

    moved = 0
    with torch.no_grad():
        for name, parameter in _parameters(registry):
            if twin.seed is None or not parameter.is_floating_point():
                continue
            taken = take(parameter, live=True)
            if taken.data is None or not twin.moves(taken.dtype, trained=parameter.requires_grad):
                continue
            new = nudge(taken.data, taken.dtype, names(name).name, twin.seed)
            local_part(parameter).copy_(_tensor(new, parameter.dtype))
            moved += 1
    return moved


def _parameters(registry: Registry) -> Iterator[tuple[str, Any]]:
    """Trained parameters, and the frozen ones of the models; each once."""
    seen = set()
    for name, parameter in registry.tracked():
        seen.add(id(parameter))
        yield name, parameter
    for model in registry.models:
        for name, parameter in model.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def _tensor(array: Any, dtype: Any) -> Any:
    """A tensor of a stored array; bfloat16 comes as bits."""
    import torch

    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
