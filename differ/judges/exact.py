"""Judge what is not computed but given: initial weights, hyper-parameters, batches.

These have no inputs within the trace, so nothing explains a difference: settings agree to float32 precision, integers
exactly, initial parameters to one unit in the last place, frozen weights to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from differ.align import BLOCK, Row, Tensor
from differ.compare import distance, same_integers
from differ.inputs import LORA_SCALE
from differ.result import Finding, Kind
from differ.session import RowPair, Session, structure_finding, value_finding
from tracer.dtypes import is_float

# Statistics that are added up from parts and those of the whole differ by float64 rounding.
PARTS_APART: Final = 1e-9


def judge_init(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """Initial state: LoRA scales, trainable parameters, digests of frozen weights."""
    for name in names:
        if _is_reference(pair.a, name) or _is_reference(pair.b, name):
            session.tally.left_out(pair.phase)  # the weight that it refers to is judged under its own name
        elif name.endswith(LORA_SCALE):
            tolerance = session.policy.exact_for("lora_scale", pair.phase, name)
            if _judge_numbers(session, pair, name, tolerance):
                session.block_model(pair.phase)
        elif pair.a.stored(name) and pair.b.stored(name):
            _judge_numbers(session, pair, name, session.policy.tolerance(pair.phase, pair.dtype(name), name).base)
        elif not _alike_in_parts(session, pair, name):
            session.block_model(pair.phase)
            _find_frozen(session, pair, name)


def judge_hparams(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """Settings of the optimizer object.  Rule flags (`bias_correction`) are left to the replay: the numbers decide."""
    for name in names:
        if pair.dtype(name) == "bool" or "bool" in (pair.a.entry(name).dtype, pair.b.entry(name).dtype):
            session.tally.left_out(pair.phase)
        else:
            tolerance = session.policy.exact_for("hparams", pair.phase, name)
            _judge_numbers(session, pair, name, tolerance, once=True)


def judge_batch(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """What the model is fed: integers exactly, whatever their width; floats (a mask) to the policy's base."""
    for name in names:
        a, b = pair.a.read(name), pair.b.read(name)
        if is_float(a.dtype) or is_float(b.dtype):
            tolerance = session.policy.tolerance(pair.phase, pair.dtype(name), name).base
            if _judge_numbers(session, pair, name, tolerance, once=True):
                session.block_step(pair.phase)
            continue
        at = same_integers(a, b)
        if at < 0:
            session.measured(pair, name, 0.0, 0.0)
            continue
        session.block_step(pair.phase)
        if not session.first_time(pair.phase, name):
            session.tally.repeated(pair.phase, name)
            continue
        session.measured(pair, name, 1.0, 0.0, diverged=True)
        session.tally.find(_integer_finding(pair, name, (a, b), at))


def _integer_finding(pair: RowPair, name: str, tensors: tuple[Tensor, Tensor], at: int) -> Finding:
    """The first element that differs, not the largest difference: token ids have no size."""
    measured = distance(*tensors)
    unequal = sum(
        int((tensors[0].raw(start, start + BLOCK) != tensors[1].raw(start, start + BLOCK)).sum())
        for start in tensors[0].blocks()
    )
    return value_finding(
        pair, name, measured, tensors, observed=None, tolerance=0.0, required=measured.max_abs, at=at,
        detail=f"{unequal:,} of {tensors[0].size:,} elements differ",
    )  # fmt: skip


def _judge_numbers(session: Session, pair: RowPair, name: str, tolerance: float, *, once: bool = False) -> bool:
    """Judge the relative L2 error of one record; returns whether it is beyond tolerance.

    `once`: a difference under this name at an earlier step makes this one a repetition.
    """
    a, b = pair.a.read(name), pair.b.read(name)
    measured = distance(a, b)
    observed = measured.rel_l2()
    if observed <= tolerance and measured.nonfinite < 0:
        session.measured(pair, name, observed, tolerance)
        return False
    if once and not session.first_time(pair.phase, name):
        session.tally.repeated(pair.phase, name)
        return True
    session.measured(pair, name, observed, tolerance, diverged=True)
    session.tally.find(
        value_finding(pair, name, measured, (a, b), observed=observed, tolerance=tolerance, required=observed)
    )
    return True


def _is_reference(row: Row, name: str) -> bool:
    """Whether a record is a tied weight, kept as a reference to another record of the row."""
    return bool(row.entry(name).alias_of)


def _alike_in_parts(session: Session, pair: RowPair, name: str) -> bool:
    """Whether a frozen weight of which ranks hold parts has the other side's statistics: there is no digest of the whole."""
    if all(row.view.exact_digest(row.positions[name]) for row in (pair.a, pair.b)):
        return False
    if pair.a.stored(name) or pair.b.stored(name) or pair.a.shape(name) != pair.b.shape(name):
        return False
    a, b = (row.view.stats[row.positions[name]] for row in (pair.a, pair.b))
    size = np.maximum(np.abs(a), np.abs(b))
    size[1:4] = max(size[1], size[2])  # a mean may be small beside what it is the mean of
    apart = float(np.max(np.abs(a - b) / np.maximum(size, 1e-30)))
    if not apart <= PARTS_APART:
        return False
    session.measured(pair, name, apart, PARTS_APART)
    return True


def _find_frozen(session: Session, pair: RowPair, name: str) -> None:
    """A frozen weight that differs by digest, or a parameter that only one side trains."""
    session.measured(pair, name, 1.0, 0.0, diverged=True)
    trains = (pair.a.stored(name), pair.b.stored(name))
    if trains[0] != trains[1]:
        words = ["trainable" if yes else "frozen" for yes in trains]
        session.tally.find(
            Finding(
                pair.step, pair.phase.label, name, Kind.STATE, a=words[0], b=words[1], detail="trained on one side only"
            )
        )
        return
    dtypes = (pair.a.entry(name).dtype, pair.b.entry(name).dtype)
    norms = f"l2 {pair.a.l2(name):.6g} and {pair.b.l2(name):.6g}"
    detail = f"frozen; {dtypes[0]} and {dtypes[1]}, {norms}" if dtypes[0] != dtypes[1] else f"frozen; {norms}"
    finding = structure_finding(pair, name, Kind.VALUE, detail=detail)
    session.tally.find(replace(finding, a=pair.a.l2(name), b=pair.b.l2(name)))
