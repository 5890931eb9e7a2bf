"""What a trace holds that a reference needs: parameters before each step, batches, losses, gradients.  numpy only.

Nothing is guessed: what is missing is said by name and step, as a NoReference.  Invariant: everything is read under its
canonical name and in canonical layout, so the framework of the run does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from differ.reference import LOSS, NoReference
from tracer.dtypes import is_float, to_numpy
from tracer.reader import RowView, Trace
from tracer.schema import REPORTED_PREFIX, RNG_PREFIX, IndexEntry, Phase, State

IGNORED: Final = -100
LORA_A: Final = ".lora_A.weight"
LORA_B: Final = ".lora_B.weight"
LORA_SCALE: Final = ".lora_scale"
MAGNITUDE: Final = ".lora_magnitude_vector.weight"
FACTORS: Final = (LORA_A, LORA_B, MAGNITUDE)
TORCH_STATE: Final = "rng.torch"
# Endings of trained parameters whose arithmetic is not rebuilt, and what they belong to.
_OTHER_ADAPTERS: Final = {
    ".lora_embedding_A.weight": "LoRA on an embedding",
    ".lora_embedding_B.weight": "LoRA on an embedding",
}
_ORIGINAL: Final = ".original_module."
_QUANTIZED: Final = (".scales", ".biases", ".absmax", ".quant_map")
_TOKENS: Final = "tokens"
# What a loss function was given that is neither ids nor labels; where it matters the loss will not follow.
_ARGUMENT: Final = "args."
_INPUTS: Final = ("input_ids", "labels", "attention_mask", "position_ids")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA module: its name, rank, effective scale, and whether it has DoRA's magnitudes."""

    module: str
    rank: int
    scale: float
    dora: bool


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen weight as recorded: dtype of the run, shape, digest of its bytes (None: the trace has none of the whole)."""

    dtype: str
    shape: tuple[int, ...]
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: arrays by name, `input_ids` and `labels` int64 [B, L] among them."""

    inputs: Mapping[str, npt.NDArray[Any]]

    @property
    def tokens(self) -> int:
        """Supervised positions; column 0 is predicted from nothing."""
        return int(np.count_nonzero(self.inputs["labels"][:, 1:] != IGNORED))


class Recorded:
    """A trace as the reference reads it; `adapters` are its LoRA modules, in its own order.

    Raises NoReference for a trace that cannot be recomputed at all.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        for phase, why in (
            (Phase.INIT, "the parameters that training starts from"),
            (Phase.BATCH, "what the model was given"),
            (Phase.GRAD, "gradients to compare with"),
        ):
            if phase not in trace.phases:
                raise NoReference(
                    f"{trace.path} has no {phase.label}: {why}", f"record it again with --what including {phase.label}"
                )
        row = trace.row(Phase.INIT, 0)
        if row is None:
            raise NoReference(f"{trace.path} has no step 0", "record from the start of training")
        self._init = row
        self._check_weights()
        self.adapters = tuple(
            self._adapter(name.removesuffix(LORA_A)) for name in self.trainable if name.endswith(LORA_A)
        )

    # Step 0.

    @cached_property
    def trainable(self) -> dict[str, IndexEntry]:
        """Trained parameters by name."""
        return {entry.name: entry for entry in self._weights() if entry.stored or entry.sketched}

    @cached_property
    def frozen(self) -> dict[str, Frozen]:
        """Frozen weights by name."""
        found = {}
        for i, entry in enumerate(self._init.layout.entries):
            if entry.name in self._weight_names and entry.name not in self.trainable:
                known = self._init.state(i) in (State.VALUE, State.ZERO) and self._init.exact_digest(i)
                digest = self._init.digests[i].tobytes() if known else None
                found[self._of_base(entry.name)] = Frozen(entry.dtype, entry.shape, digest)
        return found

    def _of_base(self, name: str) -> str:
        """Name in the base: of a module that is trained as a copy, PEFT keeps the original one beside it."""
        original = name.replace(_ORIGINAL, ".")
        return original if original in self.trainable else name

    @property
    def dropout(self) -> float:
        """Largest LoRA dropout of the run, as observed or else declared; 0 where nothing says."""
        given = self.trace.observed.get("lora.dropout", self.trace.declared.get("lora.dropout", 0.0))
        rates = given if isinstance(given, list) else [given]
        return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)

    @property
    def framework(self) -> str:
        """`torch`, `mlx`, or what the recorder said."""
        return str(self.trace.observed.get("framework", ""))

    def _weights(self) -> Iterator[IndexEntry]:
        for entry in self._init.layout.entries:
            shown = entry.name.startswith((RNG_PREFIX, REPORTED_PREFIX))
            if not shown and not entry.alias_of and LORA_SCALE not in entry.name:
                yield entry

    @cached_property
    def _weight_names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self._weights())

    def _check_weights(self) -> None:
        frozen = self.frozen
        packed = [name for name, weight in frozen.items() if not is_float(weight.dtype) or name.endswith(_QUANTIZED)]
        if packed:
            raise NoReference(
                f"{self.trace.path} was made on a quantized base ({len(packed)} packed weights, {packed[0]} the first): "
                "its arithmetic is not rebuilt",
                "record the same run on the unquantized model",
            )
        if not self.trainable:
            raise NoReference(f"{self.trace.path} holds no trained parameters at step 0")
        for name in self.trainable:
            for ending, what in _OTHER_ADAPTERS.items():
                if name.endswith(ending):
                    raise NoReference(f"{self.trace.path} trains {name}: {what} is not rebuilt")
            partner = _partner(name)
            if partner and partner not in self.trainable:
                raise NoReference(f"{self.trace.path} trains {name} without {partner}")

    def _adapter(self, module: str) -> Adapter:
        shape = self.trainable[module + LORA_A].shape
        if len(shape) != 2:
            raise NoReference(f"{module} has LoRA factors of shape {list(shape)}: only [rank, in] is rebuilt")
        position = self._init.layout.positions.get(module + LORA_SCALE)
        if position is None:
            raise NoReference(
                f"{self.trace.path} holds no {module}{LORA_SCALE}: the effective LoRA scale is not guessed",
                "record it again with this version",
            )
        dora = module + MAGNITUDE in self.trainable
        if dora and self.dropout > 0.0:
            raise NoReference(f"{self.trace.path} trains DoRA with dropout: where its masks are drawn is not rebuilt")
        return Adapter(module, shape[0], float(self._init.read(position).reshape(-1)[0]), dora)

    # Steps.

    def usable(self, steps: Sequence[int]) -> tuple[list[int], list[str]]:
        """The steps that hold all that is needed, and why the others do not; raises NoReference if none does."""
        good, reasons = [], []
        for step in steps:
            reason = self._lacks(step)
            if reason:
                reasons.append(reason)
            else:
                good.append(step)
        if not good:
            raise NoReference(reasons[0] if reasons else f"{self.trace.path} has none of the steps asked for")
        return good, reasons

    def _lacks(self, step: int) -> str:
        """What a step cannot be recomputed for; empty if it can."""
        gradients = self.trace.row(Phase.GRAD, step)
        if gradients is None:
            return f"step {step} has no grad"
        if not any(self._readable(gradients, i) for i in range(gradients.layout.records)):
            return f"step {step} has fingerprints of its gradients only"
        numbers = self.trace.micro_batches(Phase.BATCH, step)
        if not numbers:
            return f"step {step} has no batch"
        for number in numbers:
            row = self.trace.row(Phase.BATCH, step, number)
            for needed in ("input_ids", "labels"):
                position = None if row is None else row.layout.positions.get(needed)
                if row is None or position is None or not self._readable(row, position):
                    return f"step {step} has no {needed} in batch, micro-batch {number}"
        return self._strange(gradients, step) or self._lacks_parameters(step)

    def _strange(self, gradients: RowView, step: int) -> str:
        """What the model of step 0 has no place for: inputs other than tokens, gradients of weights that were frozen."""
        for number in self.trace.micro_batches(Phase.BATCH, step):
            row = self.trace.row(Phase.BATCH, step, number)
            names = () if row is None else tuple(row.layout.positions)
            other = [name for name in names if name not in (*_INPUTS, _TOKENS) and not name.startswith(_ARGUMENT)]
            if other:
                return f"step {step} feeds the model {other[0]}, which the reference does not"
        for name in gradients.layout.positions:
            if name not in self.trainable and not name.startswith(REPORTED_PREFIX):
                return f"step {step} has a gradient of {name}, which was not trained at step 0"
        return ""

    def _lacks_parameters(self, step: int) -> str:
        row = self._before(step)
        if row is None:
            return f"step {step} cannot be started: there is no param at step {step - 1}"
        for name in self.trainable:
            position = row.layout.positions.get(name)
            if position is not None and not self._readable(row, position):
                return f"step {step} starts from parameters of which only fingerprints are kept"
        return ""

    def _before(self, step: int) -> RowView | None:
        return self._init if step == 1 else self.trace.row(Phase.PARAM, step - 1)

    @staticmethod
    def _readable(row: RowView, position: int) -> bool:
        return row.stored(position) and row.state(position) in (State.VALUE, State.ZERO)

    def parameters(self, step: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Trained parameters before a step; one that the step before did not update comes from the last that did."""
        for name in self.trainable:
            for k in range(step, 0, -1):
                row = self._before(k)
                position = None if row is None else row.layout.positions.get(name)
                if row is not None and position is not None:
                    yield name, to_numpy(row.read(position), row.layout.entries[position].dtype)
                    break

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, in order."""
        found = []
        for number in self.trace.micro_batches(Phase.BATCH, step):
            row = self.trace.row(Phase.BATCH, step, number)
            assert row is not None
            positions = row.layout.positions
            names = [n for n in _INPUTS if n in positions and self._readable(row, positions[n])]
            found.append(Batch({name: _input(row, positions[name]) for name in names}))
        return found

    def losses(self, step: int) -> dict[int, float]:
        """Recorded losses by micro-batch; those that were not recorded are left out."""
        found = {}
        for number in self.trace.micro_batches(Phase.LOSS, step):
            row = self.trace.row(Phase.LOSS, step, number)
            position = None if row is None else row.layout.positions.get(LOSS)
            if row is not None and position is not None and self._readable(row, position):
                found[number] = float(to_numpy(row.read(position), row.layout.entries[position].dtype).reshape(-1)[0])
        return found

    def gradients(self, step: int) -> Iterator[tuple[str, npt.NDArray[Any] | None, str]]:
        """Accumulated gradients: name, stored array (None: the framework produced none) and dtype."""
        row = self.trace.row(Phase.GRAD, step)
        assert row is not None
        for i, entry in enumerate(row.layout.entries):
            if entry.name.startswith(REPORTED_PREFIX):
                continue
            if row.state(i) is State.NONE:
                yield entry.name, None, entry.dtype
            elif self._readable(row, i):
                yield entry.name, row.read(i), entry.dtype

    def generator(self, step: int) -> npt.NDArray[np.uint8] | None:
        """State of torch's generator at the start of a step; None where it was not recorded."""
        row = self.trace.row(Phase.HPARAMS, step)
        position = None if row is None else row.layout.positions.get(TORCH_STATE)
        if row is None or position is None or not self._readable(row, position):
            return None
        return row.read(position).astype(np.uint8)


def _input(row: RowView, position: int) -> npt.NDArray[Any]:
    """An input of the model: whole numbers and booleans as int64, an additive mask as it is."""
    dtype = row.layout.entries[position].dtype
    value = to_numpy(row.read(position), dtype)
    return value if is_float(dtype) else value.astype(np.int64)


def _partner(name: str) -> str:
    for ending, other in ((LORA_A, LORA_B), (LORA_B, LORA_A), (MAGNITUDE, LORA_A)):
        if name.endswith(ending):
            return name.removesuffix(ending) + other
    return ""
