"""The models behind an optimizer: which module owns its parameters, what they are called, what they hold at the start.

No library is imported to learn this: modules are found among the live objects, and PEFT's layers are known by their
shape (a `scaling` dict beside a `lora_A`).  Invariant: nothing here changes a module; models are referred to
weakly, so that the recorder keeps none alive.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracer.backends.pytorch_tensors import alias_of, record_of, scalar, take, take_frozen
from tracer.modes import Mode, mode_of
from tracer.names import NameMap
from tracer.schema import Phase, Record

LORA_FACTORS = ("lora_A", "lora_embedding_A")


class ParameterNames:
    """The parameters of a module by name, remembered for as long as it holds the same ones in the same places.

    torch finds each name anew, which takes milliseconds in a model of a thousand modules; whether anything has moved is seen
    at a tenth of that.
    """

    def __init__(self) -> None:
        self._structure: list[object] | None = None
        self._named: list[tuple[str, weakref.ref[Any]]] = []

    def of(self, root: Any) -> list[tuple[str, Any]]:
        """Original names and parameters in the module's own order; a tied weight once, under its first name."""
        structure = _structure(root)
        if structure is not None and structure == self._structure:
            known = [(name, ref()) for name, ref in self._named]
            # An address may have been used again, but then what was there before is gone.
            if all(parameter is not None for _, parameter in known):
                return known
        named = list(root.named_parameters())
        self._structure = structure
        self._named = [(name, weakref.ref(parameter)) for name, parameter in named]
        return named


def _structure(root: Any) -> list[object] | None:
    """Names and addresses of the modules and parameters inside a module; None for one that keeps them otherwise (scripted)."""
    found: list[object] = []
    queue, seen = [root], set()
    for module in queue:  # grows on the way
        own = vars(module)
        parameters, children = own.get("_parameters"), own.get("_modules")
        if not isinstance(parameters, dict) or not isinstance(children, dict):
            return None
        if parameters:
            found += parameters
            found += map(id, parameters.values())
        if children and id(module) not in seen:
            seen.add(id(module))
            found += children
            found += map(id, children.values())
            queue += [child for child in children.values() if child is not None]
    return found


@dataclass(frozen=True, slots=True)
class Model:
    """A root module; `prefix` keeps the names of a second model apart from those of the first.

    `hook`: the handle of its forward hook.
    """

    ref: weakref.ref[Any]
    prefix: str
    hook: Any
    names: ParameterNames = field(default_factory=ParameterNames)

    @property
    def root(self) -> Any | None:
        """The module, or None once the program has dropped it."""
        return self.ref()

    def parameters(self) -> Iterator[tuple[str, Any]]:
        """Original names and parameters in the module's own order; a tied weight once, under its first name."""
        root = self.root
        if root is not None:
            for name, parameter in self.names.of(root):
                yield self.prefix + name, parameter


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """A layer that PEFT adapts: its name, and per active adapter the effective scale, rank and dropout."""

    name: str
    scales: Mapping[str, float]
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]


def live_optimizers() -> list[Any]:
    """Optimizers that exist already; some may be left over from an earlier run."""
    import torch

    found = _live(torch.optim.Optimizer)
    # Wrappers around an optimizer (accelerate's) are subclasses without groups of their own.
    return [o for o in found if "param_groups" in vars(o)]


def _live(base: type[Any]) -> list[Any]:
    """Objects of a class and of those derived from it.

    By type(), not isinstance(): asking a lazy proxy for its class may import or run what the program did not.  The classes are
    looked up first, since there are hundreds of thousands of objects.
    """
    kinds, new = {id(base)}, [base]
    while new:
        derived = [kind for one in new for kind in type.__subclasses__(one) if id(kind) not in kinds]
        kinds |= {id(kind) for kind in derived}
        new = derived
    return [o for o in gc.get_objects() if id(type(o)) in kinds]


def trainable(optimizer: Any) -> list[Any]:
    """The parameters that an optimizer can update."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


class ModuleGraph:
    """Which live module holds which: a look at the garbage collector's list, made once for several questions."""

    def __init__(self) -> None:
        import torch

        modules = [o for o in _live(torch.nn.Module) if "_modules" in vars(o)]
        self._parents: dict[int, list[Any]] = {}
        self._owners: dict[int, list[Any]] = {}
        for module in modules:
            for child in module._modules.values():
                self._parents.setdefault(id(child), []).append(module)
            for parameter in module._parameters.values():
                self._owners.setdefault(id(parameter), []).append(module)

    def roots(self, parameters: Sequence[Any]) -> list[Any]:
        """The outermost modules that own the parameters, as few as possible; those that cover most come first."""
        missing = {id(p) for p in parameters}
        tops: dict[int, tuple[Any, set[int]]] = {}
        for parameter in missing:
            for owner in self._owners.get(parameter, ()):
                for top in _tops(owner, self._parents):
                    if id(top) not in tops:
                        tops[id(top)] = top, {id(p) for p in top.parameters()}
        roots: list[Any] = []
        while missing and tops:
            best = max(tops, key=lambda k: (len(tops[k][1] & missing), -len(tops[k][1])))
            top, covered = tops.pop(best)
            if not covered & missing:
                break
            roots.append(top)
            missing -= covered
        return roots


def _tops(module: Any, parents: Mapping[int, Sequence[Any]]) -> list[Any]:
    """The modules above a module that have nothing above them."""
    found, queue, seen = [], [module], {id(module)}
    while queue:
        above = parents.get(id(queue[-1]), ())
        current = queue.pop()
        if not above:
            found.append(current)
        for parent in above:
            if id(parent) not in seen:
                seen.add(id(parent))
                queue.append(parent)
    return found


def lora_layers(root: Any) -> Iterator[LoraLayer]:
    """The layers of a model that carry LoRA factors, in the model's order."""
    for name, module in root.named_modules():
        own = vars(module)
        scaling, children = own.get("scaling"), own.get("_modules", {})
        factors = next((children[f] for f in LORA_FACTORS if f in children and len(children[f])), None)
        if not isinstance(scaling, dict) or factors is None:
            continue
        active = own.get("_active_adapter", list(scaling))
        active = [active] if isinstance(active, str) else list(active)
        adapters = [a for a in active if a in scaling]
        rank, dropout = own.get("r", {}), children.get("lora_dropout", {})
        yield LoraLayer(
            name,
            {a: float(scaling[a]) for a in adapters},
            tuple(int(rank[a]) for a in adapters if a in rank),
            tuple(float(getattr(dropout[a], "p", 0.0)) for a in adapters if a in dropout),
        )


def initial_records(models: Iterable[Model], names: NameMap) -> Iterator[Record]:
    """Phase `init` of all models: trainable parameters, digests of frozen ones, tied weights, LoRA scales."""
    for model in models:
        root = model.root
        if root is None:
            continue
        first: dict[int, Record] = {}
        for name, parameter in root.named_parameters(remove_duplicate=False):
            original = model.prefix + name
            if id(parameter) in first:
                target = f"{Phase.INIT.label}/{first[id(parameter)].name}"
                yield alias_of(record_of(names, original, take_frozen(parameter)), target)
                continue
            taken = take(parameter) if parameter.requires_grad else take_frozen(parameter)
            record = record_of(names, original, taken, stored=parameter.requires_grad)
            first[id(parameter)] = record
            yield record
        for layer in lora_layers(root):
            yield from _scales(names, model.prefix, layer)


def _scales(names: NameMap, prefix: str, layer: LoraLayer) -> Iterator[Record]:
    name = names(f"{prefix}{layer.name}.lora_scale").name
    for adapter, scale in layer.scales.items():
        # With one active adapter its name is left out, as in the names of the factors.
        yield scalar(name if len(layer.scales) == 1 else f"{name}.{adapter}", scale)


def model_facts(models: Sequence[Model]) -> dict[str, object]:
    """What there is to observe about the models: class, dtypes, layers, LoRA rank and dropout, compiled or not."""
    roots = [root for model in models if (root := model.root) is not None]
    if not roots:
        return {}
    layers = [layer for root in roots for layer in lora_layers(root)]
    facts: dict[str, object] = {
        "model.class": _one_or_all(class_name(_without_wrappers(root)) for root in roots),
        "model.dtype": _one_or_all(
            sorted({str(p.dtype).removeprefix("torch.") for root in roots for p in root.parameters()})
        ),
        "compiled": any(is_compiled(root) for root in roots),
    }
    depth = getattr(getattr(_without_wrappers(roots[0]), "config", None), "num_hidden_layers", None)
    if isinstance(depth, int):
        facts["model.layers"] = depth
    if layers:
        facts["lora.rank"] = _one_or_all(sorted({rank for layer in layers for rank in layer.ranks}))
        facts["lora.dropout"] = _one_or_all(sorted({p for layer in layers for p in layer.dropouts}))
    return facts


def training_mode(root: Any) -> Mode | None:
    """The mode of all modules of a model.  torch.compile's wrappers keep the mode that their module had when it was wrapped."""
    flags: set[Mode] = set()
    queue, seen = [root], {id(root)}
    for module in queue:  # grows on the way
        children = module._modules
        if "_orig_mod" not in children:
            flags.add(bool(module.training))
        new = [child for child in children.values() if child is not None and id(child) not in seen]
        seen.update(map(id, new))
        queue += new
    return mode_of(flags)


def _one_or_all(values: Iterable[object]) -> object:
    """A single value as itself, several as a list."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else found


def _without_wrappers(root: Any) -> Any:
    """The model inside torch.compile's, DDP's and PEFT's wrappers."""
    while True:
        children = root._modules
        inner = children.get("_orig_mod")
        if inner is None and len(children) == 1:
            inner = children.get("module")
        if inner is None and callable(getattr(type(root), "get_base_model", None)):
            inner = root.get_base_model()
        if inner is None or inner is root:
            return root
        root = inner


def is_sharded(root: Any) -> bool:
    """Whether `fully_shard` was applied to a module; it makes a class of its own from the module's."""
    return any(base.__name__ == "FSDPModule" for base in type(root).__mro__)


def is_flattened(root: Any) -> bool:
    """Whether a model is wrapped by the first FSDP, whose parameters are flattened and cut anywhere."""
    return root is not None and any(type(module).__name__ == "FullyShardedDataParallel" for module in root.modules())


def class_name(root: Any) -> str:
    """Name of a module's class as its author wrote it."""
    kind = type(root)
    if is_sharded(root) and len(kind.__bases__) == 2:
        kind = kind.__bases__[1]
    return str(kind.__name__)


def is_compiled(root: Any) -> bool:
    """Whether torch.compile wraps the model or works in place in a part of it."""
    return any("_orig_mod" in m._modules or vars(m).get("_compiled_call_impl") is not None for m in root.modules())
