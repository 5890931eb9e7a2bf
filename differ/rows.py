"""Compare two rows: structure first (names, states, shapes), then digests, and what still differs goes to its judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from differ.align import Row
from differ.fingerprint import judge_sketched, sketched_names
from differ.inputs import LORA_A, LORA_SCALE
from differ.judges import JUDGES, unheld
from differ.judges.groups import judge_groups
from differ.replay.rules.adafactor import SIZE as DERIVED_STATE
from differ.replay.rules.sgd import MOMENTUM
from differ.result import Cause, Finding, Kind
from differ.session import RowPair, Session, structural_key, structure_finding
from tracer.names import nearest, split_state_name
from tracer.schema import POSITIONS, REPORTED_PREFIX, RNG_PREFIX, TOKEN_LOSS, WHOLE_STEP, Phase, State

# Records that are shown and never judged.
UNJUDGED: Final = (RNG_PREFIX, REPORTED_PREFIX)
# What only some frameworks are given in a batch; on one side only it is no divergence.
OPTIONAL_IN_BATCH: Final = ("attention_mask", "position_ids", "args.")
# Phases whose records are outputs of the model: with unequal inputs their structure says nothing either.
# An optimizer's update counter: of all parameters, or `<parameter>/step`.
COUNTER: Final = "step"
MODEL_PHASES: Final = (Phase.FORWARD, Phase.LOSS, Phase.EVAL)
# Candidates are looked up for this many missing names of a row, which is more than a report shows.
MOST_CANDIDATES: Final = 20
# How much alike a candidate's name must be, of 1.
ALIKE: Final = 0.75


def compare_rows(session: Session, pair: RowPair) -> None:
    """Compare all records of a row that both sides have."""
    if pair.phase is Phase.HPARAMS:
        judge_groups(session, pair)
    if pair.a.view.seal == pair.b.view.seal and not session.options.filters_names:
        session.tally.same(pair.step, pair.phase, pair.a.view.layout.records)
        return
    if pair.phase is Phase.FORWARD:
        matched = _matched(session, pair)
        if matched is None:
            return
        pair = matched
    pairing = session.aligner.pair(pair.a, pair.b)
    _one_sided(session, pair, pairing.only_a, other=pairing.only_b, in_a=True)
    _one_sided(session, pair, pairing.only_b, other=pairing.only_a, in_a=False)
    differing = []
    same = 0
    for name in pairing.common:
        if not session.options.wants_name(name):
            continue
        if name.startswith(UNJUDGED) or _is_index(pair, name):
            session.tally.left_out(pair.phase)
        elif _differs_in_structure(session, pair, name):
            continue
        elif _same_bits(pair, name):
            same += 1
        else:
            differing.append(name)
    session.tally.same(pair.step, pair.phase, same)
    estimated = sketched_names(pair, differing)
    if estimated and pair.a.partial:
        # A sketch is of all rows and cannot be had of some.
        session.tally.left_out(pair.phase, len(estimated))
        differing = [name for name in differing if name not in set(estimated)]
    elif estimated:
        judge_sketched(session, pair, estimated)
        differing = [name for name in differing if name not in set(estimated)]
    if pair.phase in (Phase.GRAD, Phase.PARAM):
        differing = unheld.followed(session, pair, differing)
    if differing:
        JUDGES[pair.phase](session, pair, differing)


def _matched(session: Session, pair: RowPair) -> RowPair | None:
    """A row pair of `forward` at the positions that both sides have; None if there are none."""
    _note_modules(session, pair)
    if POSITIONS not in pair.a.positions and POSITIONS not in pair.b.positions:
        return pair  # whole outputs, as somebody else's recorder may write them
    from differ.matching import match

    found = match(pair.a, pair.b)
    if found is None or len(found.positions) == 0:
        reason = "a side does not say which positions it has" if found is None else "they have no position in common"
        summary = f"module outputs are not compared: {reason}"
        session.note_once(Cause("forward.positions", summary, step=pair.step, phase=pair.phase.label))
        session.tally.left_out(pair.phase, pair.a.view.layout.records)
        return None
    if not found.whole:
        counts = [len(row.read(POSITIONS).stored) for row in (pair.a, pair.b)]
        summary = (
            f"module outputs are compared at {len(found.positions)} positions of a micro-batch, "
            f"of {counts[0]} in a and {counts[1]} in b"
        )
        session.note_once(Cause("forward.positions", summary, step=pair.step, phase=pair.phase.label))
    a, b = found.rows(pair.a, pair.b)
    return replace(pair, a=a, b=b)


def _note_modules(session: Session, pair: RowPair) -> None:
    """Say once which modules only one side has: libraries are built in different ways, and that is no divergence."""
    pairing = session.aligner.pair(pair.a, pair.b)
    for side, names in (("a", pairing.only_a), ("b", pairing.only_b)):
        names = tuple(name for name in names if session.options.wants_name(name))
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            summary = f"modules whose outputs only {side} has: {shown}"
            session.note_once(
                Cause("forward.modules", summary, side=side, step=pair.step, phase=pair.phase.label, names=names)
            )


def _is_index(pair: RowPair, name: str) -> bool:
    """Whether a record only says where the others are from."""
    return pair.phase is Phase.FORWARD and name == POSITIONS


def _same_bits(pair: RowPair, name: str) -> bool:
    if pair.a.state(name) is State.NONE:
        return True
    digest = pair.a.digest(name)
    return bool(digest) and digest == pair.b.digest(name) and pair.a.entry(name).dtype == pair.b.entry(name).dtype


def _differs_in_structure(session: Session, pair: RowPair, name: str) -> bool:
    """Count and report a record whose states or shapes do not go together; returns whether it is done with."""
    states = (pair.a.state(name), pair.b.state(name))
    if State.UNRECORDED in states:
        session.tally.left_out(pair.phase)
        return True
    if (states[0] is State.NONE) != (states[1] is State.NONE):
        kind = Kind.STATE
    elif states[0] is not State.NONE and pair.a.shape(name) != pair.b.shape(name):
        kind = Kind.SHAPE
    elif pair.phase is Phase.INIT and _untied(pair, name):
        kind = Kind.STATE
    else:
        return False
    key = structural_key(pair.phase, name)
    if _is_explained(session, pair.phase) or key in session.structural:
        session.tally.explained(pair.phase)
    elif pair.phase is Phase.BATCH and not session.first_time(pair.phase, name):
        session.tally.repeated(pair.phase, name)
        session.block_step(pair.phase)
    else:
        if pair.phase is not Phase.BATCH and session.options.wants_phase(pair.phase):
            session.structural.add(key)
        session.measured(pair, name, 1.0, 0.0, diverged=True)
        found = structure_finding(pair, name, kind)
        session.tally.find(_with_ties(found, pair) if pair.phase is Phase.INIT and _untied(pair, name) else found)
        _block(session, pair.phase)
    return True


def _untied(pair: RowPair, name: str) -> bool:
    """Whether a parameter is one tensor with another on one side, and is trained as one of its own on the other."""
    tied = [bool(row.entry(name).alias_of) for row in (pair.a, pair.b)]
    return tied[0] != tied[1] and bool((pair.b if tied[0] else pair.a).entry(name).dataset)


def _with_ties(found: Finding, pair: RowPair) -> Finding:
    """A finding about a tied parameter, with what it is tied to in place of states."""
    assert found.name is not None
    targets = [row.entry(found.name).alias_of.partition("/")[2] for row in (pair.a, pair.b)]
    words = [f"tied to {target}" if target else "a parameter of its own" for target in targets]
    return replace(found, a=words[0], b=words[1], detail="tied on one side only")


def _is_explained(session: Session, phase: Phase) -> bool:
    return phase in MODEL_PHASES and (session.model_blocked or session.step_blocked)


def _block(session: Session, phase: Phase) -> None:
    """What a structural divergence in a phase takes the meaning from."""
    if phase is Phase.INIT:
        session.block_model(phase)
    elif phase in (Phase.BATCH, Phase.FORWARD, Phase.LOSS, Phase.GRAD):
        session.block_step(phase)


def _one_sided(session: Session, pair: RowPair, names: Sequence[str], *, other: Sequence[str], in_a: bool) -> None:
    """Records of one side without a counterpart."""
    row = pair.a if in_a else pair.b
    kind = Kind.MISSING_B if in_a else Kind.MISSING_A
    looked_up = 0
    for name in names:
        if not session.options.wants_name(name):
            continue
        if _may_be_missing(pair, row, name):
            session.tally.left_out(pair.phase)
            continue
        key = structural_key(pair.phase, name)
        if _is_explained(session, pair.phase) or _follows_from(session, pair, row, name) or key in session.structural:
            session.tally.explained(pair.phase)
            continue
        candidates: tuple[str, ...] = ()
        if session.options.wants_phase(pair.phase):
            session.structural.add(key)
        if looked_up < MOST_CANDIDATES and session.options.wants_phase(pair.phase):
            candidates = tuple(nearest(name, other, cutoff=ALIKE))
            looked_up += 1
        session.tally.find(structure_finding(pair, name, kind, nearest=candidates))
        _block(session, pair.phase)
        if session.options.wants_phase(pair.phase):
            unheld.remember(session, pair, name, in_a=in_a)


def _may_be_missing(pair: RowPair, row: Row, name: str) -> bool:
    """Whether a record on one side only is no divergence: shown only, optional, switched off, or a tied reference."""
    if name.startswith(UNJUDGED):
        return True
    if pair.phase is Phase.FORWARD or name == TOKEN_LOSS:
        return True
    if pair.phase is Phase.BATCH:
        return name.startswith(OPTIONAL_IN_BATCH)
    if pair.phase is Phase.HPARAMS:
        return row.entry(name).dtype == "bool" or row.scalar(name) == 0.0
    if pair.phase is Phase.OPT_STATE:
        kind = split_state_name(name)[1]
        # transformers' Adafactor keeps the size of the weights; MLX's SGD without momentum a buffer of zeros.
        zeros = kind == MOMENTUM[0] and row.state(name) is State.ZERO
        return kind == DERIVED_STATE or zeros or (kind == COUNTER and _is_counted(pair, row, name))
    if pair.phase is Phase.INIT:
        target = row.entry(name).alias_of.partition("/")[2]
        return bool(target) and target in pair.a.positions and target in pair.b.positions
    return False


def _is_counted(pair: RowPair, row: Row, name: str) -> bool:
    """Whether the other side has an update counter's value: one for all parameters where this side has one for each, or one each.

    Parameters are counted one by one once their counts differ; each that is what all have on the other side is the same.
    """
    other = pair.b if row is pair.a else pair.a
    if name == COUNTER:
        return any(split_state_name(each)[1] == COUNTER and each != COUNTER for each in other.positions)
    return COUNTER in other.positions and row.scalar(name) == other.scalar(COUNTER)


def _follows_from(session: Session, pair: RowPair, row: Row, name: str) -> bool:
    """Whether another missing record explains this one: a module's scale, a parameter's state."""
    if pair.phase is Phase.INIT and name.endswith(LORA_SCALE):
        factor = name.removesuffix(LORA_SCALE) + LORA_A
        return factor in row.positions and not (factor in pair.a.positions and factor in pair.b.positions)
    if pair.phase is Phase.OPT_STATE:
        return split_state_name(name)[0] in session.structural
    return False


def missing_row(session: Session, present: Row, *, in_a: bool) -> None:
    """A row that one side lacks: a finding unless that side did not record the phase at all."""
    view = present.view
    phase, records = view.phase, view.layout.records
    other = (session.b if in_a else session.a).trace
    # Losses tell how many micro-batches there are; their gradients are extra.
    extra = phase is Phase.GRAD and view.micro_batch != WHOLE_STEP
    # torch's Adagrad makes its state before the first step; zeros are what any other starts from.
    fresh = phase is Phase.OPT_STATE and view.step == 0 and all(state == State.ZERO for state in view.states)
    if phase not in other.phases or extra or fresh:
        session.tally.left_out(phase, records)
        return
    if _is_explained(session, phase):
        session.tally.explained(phase, records)
        return
    side, kind = ("b", Kind.MISSING_B) if in_a else ("a", Kind.MISSING_A)
    if not session.first_time("row", phase, kind):
        session.tally.repeated(phase, "")
    else:
        micro_batch = None if view.micro_batch == WHOLE_STEP else view.micro_batch
        detail = f"{side} has no {phase.label} at this step"
        if micro_batch is not None:
            detail = f"{side} has {len(other.micro_batches(phase, view.step))} micro-batches at this step"
        session.tally.find(Finding(view.step, phase.label, None, kind, micro_batch, detail=detail))
    _block(session, phase)
