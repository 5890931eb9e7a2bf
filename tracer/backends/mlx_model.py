"""The state of an MLX run before its first update, and what its live objects say about its settings.

References are taken before the first step runs and are converted once a step is known to be one.  Invariant: nothing is
evaluated that the run would not evaluate, and no weight is copied that is not trained.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.backends.mlx_arrays import Array, Tree, array_record, dtype_name, flatten, plain_record, to_numpy
from tracer.dtypes import is_float
from tracer.modes import Mode, mode_of
from tracer.names import TRANSPOSED, NameMap, state_name
from tracer.perturb import Perturbation, nudge
from tracer.recorder import Recorder
from tracer.schema import RNG_PREFIX, Phase, Record

# Adam keeps its moments as m and v, PyTorch as exp_avg and exp_avg_sq.
ADAM_STATES: Final = {"m": "exp_avg", "v": "exp_avg_sq"}
ADAMAX_STATES: Final = {"m": "exp_avg", "v": "exp_inf"}
SGD_STATES: Final = {"v": "momentum_buffer"}
# The others by class: what PyTorch's optimizer of that name calls the same thing.
OTHER_STATES: Final[Mapping[str, Mapping[str, str]]] = {
    "RMSprop": {"v": "square_avg"},
    "Adagrad": {"v": "sum"},
    "AdaDelta": {"v": "square_avg", "u": "acc_delta"},
    "Lion": {"m": "exp_avg"},
    "Muon": SGD_STATES,
    "Adafactor": {},
}
# Adafactor's factors: the row of a matrix is the column of its transpose.
FACTORS: Final = {"exp_avg_sq_row": "exp_avg_sq_col", "exp_avg_sq_col": "exp_avg_sq_row"}
# How far behind a step function its model is looked for: the function, what it calls, what that calls.
CLOSURE_DEPTH: Final = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """References to what exists before a step: parameters by name, which are trained, optimizer state, RNG key."""

    model: Any
    parameters: Mapping[str, Array]
    trainable: frozenset[str]
    state: Mapping[str, Array]
    optimizer: Any
    rng: npt.NDArray[Any] | None


def snapshot(model: Any, trained: Tree, optimizer: Any) -> Snapshot:
    """Snapshot of a model (or None and the tree of trained parameters), and of an optimizer if one is known."""
    parameters = flatten(trained if model is None else model.parameters())
    trainable = parameters if model is None else flatten(model.trainable_parameters())
    state = {} if optimizer is None else flatten(optimizer.state)
    return Snapshot(model, parameters, frozenset(trainable), state, optimizer, rng_key())


def perturb(model: Any, twin: Perturbation, names: NameMap) -> bool:
    """Move a model's parameters by one rounding unit, in place; returns whether any was moved.

    The model keeps its modules and containers, so that a step that is compiled with `model.state` as its input sees the
    new arrays.
    """
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    trained = flatten(model.trainable_parameters())
    moved = []
    for name, array in flatten(model.parameters()).items():
        value = to_numpy(array) if is_float(dtype_name(array)) else None
        if value is None or twin.seed is None or not twin.moves(dtype_name(array), trained=name in trained):
            continue
        new = mx.array(nudge(value, dtype_name(array), names(name).name, twin.seed))
        moved.append((name, new.view(mx.bfloat16) if array.dtype == mx.bfloat16 else new))
    model.update(tree_unflatten(moved))
    mx.eval(model.parameters())
    return bool(moved)


def observe_trainer(
    recorder: Recorder, trainer: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Note the arguments as mlx-lm's `train` gets them, whatever a configuration file said; no paths."""
    bound = inspect.signature(trainer).bind(*args, **kwargs)
    bound.apply_defaults()
    recorder.observe("trainer.class", f"{trainer.__module__}.{trainer.__qualname__}")
    observe_settings(recorder, bound.arguments.get("args"))


def observe_settings(recorder: Recorder, settings: Any) -> None:
    """Note the fields of a trainer's arguments that are plain values; no paths, nothing of accounts."""
    if not dataclasses.is_dataclass(settings):
        return
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        private = field.name.endswith(("file", "path", "_dir")) or (isinstance(value, str) and os.sep in value)
        if isinstance(value, (bool, int, float, str)) and not private:
            recorder.observe(f"trainer.args.{field.name}", value)


def training_mode(model: Any, loss: Any) -> Mode | None:
    """The mode of all modules of a model, or of the one that the loss function reaches; None without one."""
    import mlx.nn as nn

    model = model if isinstance(model, nn.Module) else find(loss, nn.Module)
    return None if model is None else mode_of(bool(module.training) for module in model.modules())


def rng_key() -> npt.NDArray[Any] | None:
    """Key of MLX's generator, uint32[2].  It is per thread: ask on the training thread."""
    import mlx.core as mx

    state: Any = mx.random.state
    return to_numpy(state[0])


def add_init(recorder: Recorder, start: Snapshot) -> None:
    """Add step 0 and what is observed of the model; the caller ends the step."""
    names = recorder.names
    recorder.add(Phase.INIT, _parameter_records(names, start))
    if start.model is not None:
        recorder.add(Phase.INIT, _lora_scales(names, start.model))
        recorder.add(Phase.INIT, _tied(names, start))
    recorder.add(Phase.INIT, rng_records(start.rng))
    resumed = start.state.get("step")
    if resumed is not None and int(np.asarray(to_numpy(resumed))) > 0:
        recorder.add(Phase.OPT_STATE, state_records(names, start.optimizer, sorted(start.trainable), start.state))
    _observe(recorder, start)


def rng_records(key: npt.NDArray[Any] | None) -> list[Record]:
    """The generator's key as a record, or nothing if there is none."""
    return [] if key is None else [plain_record(f"{RNG_PREFIX}mlx", key, "uint32")]


def state_records(names: NameMap, optimizer: Any, held: Sequence[str], state: Mapping[str, Array]) -> list[Record]:
    """Optimizer state of the parameters `held`, without `step` and what belongs to the whole optimizer."""
    kinds = _state_kinds(optimizer, state)
    holders = frozenset(held)
    records = []
    for path, array in state.items():
        parameter, kind = _split(path, holders)
        if parameter:
            record = array_record(names, parameter, array)
            kind = kinds.get(kind, kind)
            if kind in FACTORS and names(parameter).transform == TRANSPOSED:
                kind = FACTORS[kind]
            name = state_name(record.name, kind)
            records.append(replace(record, name=name, original=path))
    return records


def shared_state(held: Sequence[str], state: Mapping[str, Array]) -> dict[str, float]:
    """Scalars of the whole optimizer: `step`, `learning_rate`, other scheduled settings."""
    holders = frozenset(held)
    found = {}
    for path, array in state.items():
        value = None if _split(path, holders)[0] or array.ndim else to_numpy(array)
        if value is not None and is_number(dtype_name(array)):
            found[path] = float(array.item())
    return found


def is_number(dtype: str) -> bool:
    """Whether a scalar of this dtype can be a setting."""
    return is_float(dtype) or "int" in dtype


def find(function: Any, kind: type, depth: int = CLOSURE_DEPTH) -> Any:
    """First object of a type that a function can reach: closure, bound object, partial arguments, globals it names."""
    level = [function]
    seen: set[int] = set()
    for _ in range(depth):
        following: list[Any] = []
        for holder in level:
            for item in _held(holder):
                if isinstance(item, kind):
                    return item
                if id(item) not in seen and _can_hold(item):
                    seen.add(id(item))
                    following.append(item)
        level = following
    return None


def _parameter_records(names: NameMap, start: Snapshot) -> Iterator[Record]:
    for name, array in start.parameters.items():
        if name in start.trainable:
            yield array_record(names, name, array)
        else:
            # Only digest and statistics of a frozen weight are kept; its memory is read in place.
            yield array_record(names, name, array, copy=False, stored=False)


def _lora_scales(names: NameMap, model: Any) -> Iterator[Record]:
    for path, module in _lora_modules(model):
        scale = getattr(module, "scale", None)
        if isinstance(scale, (int, float)):
            original = f"{path}.lora_scale"
            yield plain_record(names(original).name, float(scale), "float64", original=original)


def _tied(names: NameMap, start: Snapshot) -> Iterator[Record]:
    """`lm_head.weight` as a reference to the embedding, where the model says that they are one."""
    for name in start.parameters:
        prefix, found, _ = name.rpartition("model.embed_tokens.")
        if found and not any(other.startswith(f"{prefix}lm_head.") for other in start.parameters):
            owner = _attribute(start.model, prefix.rstrip("."))
            flags = (getattr(owner, "tie_word_embeddings", None), _argument(owner, "tie_word_embeddings"))
            if any(flag is True for flag in flags) and name.endswith("weight"):
                target = array_record(names, name, start.parameters[name], copy=name in start.trainable, stored=False)
                head = names(f"{prefix}lm_head.weight").name
                yield replace(target, name=head, alias_of=f"{Phase.INIT.label}/{target.name}", original="")


def _observe(recorder: Recorder, start: Snapshot) -> None:
    import mlx.core as mx

    recorder.observe("framework", "mlx")
    recorder.observe("framework.version", getattr(mx, "__version__", ""))
    # It has none: everything is computed in the dtypes of the arrays.
    recorder.observe("autocast", "none")
    dtypes = sorted({d for a in start.parameters.values() if is_float(d := dtype_name(a))})
    recorder.observe("model.dtype", dtypes[0] if len(dtypes) == 1 else dtypes)
    if start.model is None:
        return
    kind = type(start.model)
    recorder.observe("model.class", f"{kind.__module__}.{kind.__qualname__}".removeprefix("__main__."))
    layers = getattr(start.model, "layers", None)
    if isinstance(layers, (list, tuple)):
        recorder.observe("model.layers", len(layers))
    _observe_lora(recorder, [module for _, module in _lora_modules(start.model)])


def _observe_lora(recorder: Recorder, modules: Sequence[Any]) -> None:
    if not modules:
        return
    ranks = sorted({_rank(module) for module in modules})
    recorder.observe("lora.rank", ranks[0] if len(ranks) == 1 else ranks)
    # mlx.nn.Dropout keeps 1 - p; rounding takes back what the subtraction added.
    rates = sorted({round(1 - m.dropout._p_1, 12) for m in modules if hasattr(getattr(m, "dropout", None), "_p_1")})
    if rates:
        recorder.observe("lora.dropout", rates[0] if len(rates) == 1 else rates)


def _rank(module: Any) -> int:
    """Rank of lora_a [in, r], or [experts, r, in]."""
    shape = module.lora_a.shape
    return int(shape[-1] if len(shape) == 2 else shape[-2])


def _lora_modules(model: Any) -> list[tuple[str, Any]]:
    return sorted(
        ((path, module) for path, module in model.named_modules() if "lora_a" in module), key=lambda item: item[0]
    )


def _state_kinds(optimizer: Any, state: Mapping[str, Array]) -> Mapping[str, str]:
    import mlx.optimizers as optim

    if isinstance(optimizer, optim.Adamax):
        return ADAMAX_STATES
    if isinstance(optimizer, optim.SGD):
        return SGD_STATES
    for name, kinds in OTHER_STATES.items():
        # Muon is not in every version.
        if isinstance(optimizer, getattr(optim, name, ())):
            return kinds
    ends = {path.rpartition(".")[2] for path in state}
    return ADAM_STATES if ADAM_STATES.keys() <= ends else {}


def _split(path: str, holders: frozenset[str]) -> tuple[str, str]:
    """Parameter and kind of a path in an optimizer's state; an empty parameter for the whole optimizer's."""
    end = path.rfind(".")
    while end > 0:
        if path[:end] in holders:
            return path[:end], path[end + 1 :]
        end = path.rfind(".", 0, end)
    return "", path


def _argument(owner: Any, name: str) -> Any:
    return getattr(getattr(owner, "args", None), name, None)


def _attribute(root: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        root = getattr(root, part, None)
    return root


def _held(holder: Any) -> Iterator[Any]:
    """Objects that a function, a partial, a bound method or an object of the program's own refers to."""
    if isinstance(holder, functools.partial):
        yield from (holder.func, *holder.args, *holder.keywords.values())
        return
    if isinstance(holder, types.MethodType):
        yield from (holder.__self__, holder.__func__)
        return
    if not isinstance(holder, types.FunctionType):
        yield from vars(holder).values()
        return
    for cell in holder.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is bound later
            continue
    yield from (holder.__globals__[name] for name in holder.__code__.co_names if name in holder.__globals__)
    yield from holder.__defaults__ or ()


def _can_hold(item: Any) -> bool:
    """Whether to look into an object: functions, and instances of plain classes; never modules, types or containers."""
    if isinstance(item, (type, types.ModuleType, dict, list, tuple)):
        return False
    return isinstance(getattr(item, "__dict__", None), dict) or isinstance(item, types.MethodType)
