"""The traces of a run's ranks, opened as one trace.

    replicated       parameters, settings, optimizer state under DDP      rank 0's; what ranks hold differently: `RowView.drifts`
    sharded          the same under `fully_shard`                         put together from the parts, by name
    micro-batches    one set a rank                                       further micro-batches: number = local * world + rank
    loss             of a rank, which averages it into the run's          divided by the number of ranks
    gradients        local, where the program averages them itself        their mean (or sum), as the optimizer's input shows
    eval             logged by any rank                                   rank 0's, else the first one's that has it

A loss so divided is what the run as a whole differentiates, as in one process that divides each micro-batch's loss by their
number.  Ranks that are fed the same batches (parts of one model) count once.  With `joined` the micro-batches of the ranks become
one: the batch that a single process would see.

Invariants: only steps that every rank has are shown; a rank that is missing, has no step, or is of another run, is an error
that names it.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tracer.built import Absent, BuiltLayout, BuiltRow, Drift, Held, Made, Pieces, Source
from tracer.dtypes import from_float64, to_float64
from tracer.errors import Damaged, Empty, MissingRank, NotATrace
from tracer.joining import join_rows
from tracer.local_gradients import share_of
from tracer.reader import RowKey, RowView, Trace, open_trace
from tracer.schema import REPORTED_PREFIX, RNG_PREFIX, WHOLE_STEP, Phase, State
from tracer.shards import Piece, piece_of

Maker = Callable[[], RowView]

# Each rank has its own.
OWN: tuple[str, ...] = (RNG_PREFIX, REPORTED_PREFIX)
LOSS = "loss"
# What the environment says of one rank only.
_OF_A_RANK = ("rank", "launch")


class Order(enum.StrEnum):
    """How the ranks' micro-batches, or the rows of their batches, follow each other in one process."""

    # Micro-batches: the first of every rank, then the second.  Rows: all of rank 0, then all of rank 1.
    BY_RANK = "rank after rank"
    # Micro-batches: all of rank 0, then all of rank 1.  Rows: the first of every rank, then the second.
    INTERLEAVED = "ranks by turns"


def open_ranks(run: Path, files: Mapping[int, Path]) -> RankTrace:
    """Open the files of a run's ranks as the trace `run`; raises MissingRank, and whatever opening one raises."""
    with contextlib.ExitStack() as stack:
        members: dict[int, Trace] = {}
        without_steps: list[int] = []
        for rank, file in files.items():
            try:
                members[rank] = stack.enter_context(open_trace(file))
            except Empty:
                without_steps.append(rank)
            except (NotATrace, Damaged) as error:
                if file.stat().st_size:
                    raise type(error)(f"rank {rank} of {run}: {error}", error.hint) from error
                without_steps.append(rank)
        if without_steps:
            raise _without_steps(run, files, members, without_steps)
        _check_complete(run, members)
        trace = RankTrace(run, list(members.values()))
        stack.pop_all()
        return trace


def _without_steps(
    run: Path, files: Mapping[int, Path], members: Mapping[int, Trace], ranks: Sequence[int]
) -> MissingRank:
    """The error that says which ranks ended before their first step, and what there is of the others."""
    names = ", ".join(files[rank].name for rank in ranks)
    several = "s" * (len(ranks) > 1)
    which = f"rank{several} {', '.join(map(str, ranks))}"
    have = "have" if several else "has"
    if not members:
        return MissingRank(f"{run}: {which} {have} no complete step ({names})", "record the run again")
    first = min(members)
    world = int(members[first].env.get("world_size", 0))
    if max(ranks) >= world:
        return MissingRank(
            f"{names} {'are' if several else 'is'} not of the run of {members[first].path.name}, which has {world} ranks",
            "remove what is left of an earlier run",
        )
    left = ", ".join(f"rank {rank} up to step {trace.last_step}" for rank, trace in members.items())
    return MissingRank(
        f"{run}: {which} of {world} {have} no complete step ({names}), killed before the first one; there is {left}",
        f"record the run again, or look at one rank by itself: {members[first].path}",
    )


def _check_complete(run: Path, members: Mapping[int, Trace]) -> None:
    sizes = {rank: int(trace.env.get("world_size", 0)) for rank, trace in members.items()}
    launches = {rank: trace.env.get("launch", "") for rank, trace in members.items()}
    first = min(members)
    world = sizes[first]
    names = {rank: trace.path.name for rank, trace in members.items()}
    for rank, trace in members.items():
        if trace.env.get("rank") != rank:
            raise MissingRank(f"{names[rank]} was not recorded as rank {rank}", "give the files their names back")
        if sizes[rank] != world or launches[rank] != launches[first] or rank >= world:
            raise MissingRank(
                f"{names[first]} and {names[rank]} are not of one run: ranks of {world} and of {sizes[rank]}",
                "remove what is left of an earlier run",
            )
    for rank in range(world):
        if rank not in members:
            name = f"{run.stem}.rank{rank}{run.suffix}"
            raise MissingRank(f"{run}: rank {rank} of {world} is missing ({name})", "copy its file beside the others")


class LazyRows(Mapping[RowKey, RowView]):
    """Rows that are made when they are asked for, and kept."""

    def __init__(self, makers: Iterable[tuple[RowKey, Maker]]) -> None:
        self._makers = dict(makers)
        self._made: dict[RowKey, RowView] = {}

    def __getitem__(self, key: RowKey) -> RowView:
        if key not in self._made:
            self._made[key] = self._makers[key]()
        return self._made[key]

    def __contains__(self, key: object) -> bool:
        return key in self._makers

    def get(self, key: RowKey, default: Any = None) -> Any:
        """The row, or `default` if there is none; an error while it is made is not taken for that."""
        return self[key] if key in self._makers else default

    def __iter__(self) -> Iterator[RowKey]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class RankTrace(Trace):
    """The ranks' traces as one; `members` by rank.  `order`, `joined`: how micro-batches are shown, see Order."""

    def __init__(
        self, path: Path, members: Sequence[Trace], *, order: Order = Order.BY_RANK, joined: bool = False
    ) -> None:
        self.path = path
        self.members = tuple(members)
        self.order = order
        self.joined = joined
        first = self.members[0]
        self.format = max(member.format for member in members)
        self.tool = first.tool
        common = set.intersection(*(set(member.steps) for member in members))
        self.steps = tuple(step for step in first.steps if step in common)
        self._layouts: dict[tuple[object, ...], BuiltLayout] = {}
        self.same_batches = self._same_batches()
        self._rows = LazyRows(self._build())

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.members)

    def view(self, *, order: Order, joined: bool) -> RankTrace:
        """The same ranks with their micro-batches shown in another way.  It shares the open files."""
        return RankTrace(self.path, self.members, order=order, joined=joined)

    # What the set says of itself.

    def document(self, name: str) -> dict[str, Any]:
        """One of schema.DOCUMENTS: rank 0's, with what is known of all ranks."""
        document = dict(self.members[0].document(name))
        if name == "env":
            document = {key: value for key, value in document.items() if key not in _OF_A_RANK}
        elif name == "observed":
            document["ranks"] = self.world_size
            if isinstance(document.get("accumulation"), int) and not (self.joined or self.same_batches):
                document["accumulation"] *= self.world_size
        elif name == "end":
            document = {"finished": not self._unfinished(), "reason": self._unfinished()}
        return document

    def _unfinished(self) -> str:
        """Why the last common step is not the last of the run; empty if it is."""
        for rank, member in enumerate(self.members):
            if not member.finished:
                reason = member.end.get("reason") or "it was cut off"
                return f"rank {rank} ends after step {member.last_step}: {reason}"
        ends = {rank: member.last_step for rank, member in enumerate(self.members) if member.steps != self.steps}
        return ", ".join(f"rank {rank} has steps up to {last}" for rank, last in ends.items())

    @property
    def end(self) -> dict[str, Any]:
        """How recording ended: `finished`, `reason`."""
        return self.document("end")

    @property
    def sketched_steps(self) -> tuple[int, ...]:
        """The steps at which any rank keeps sketches in place of tensors, ascending."""
        return tuple(sorted({step for member in self.members for step in member.sketched_steps} & set(self.steps)))

    @property
    def size(self) -> int:
        """Length of all ranks' files in bytes."""
        return sum(member.size for member in self.members)

    @property
    def parts(self) -> tuple[Trace, ...]:
        """The ranks' traces."""
        return self.members

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return sum(member.bytes_read for member in self.members)

    def _repr_html_(self) -> str:
        from tracer.notebook import summary

        return summary(self)

    def close(self) -> None:
        """Close the files."""
        for member in self.members:
            member.close()

    # Rows.

    def _same_batches(self) -> bool:
        """Whether all ranks are fed the same micro-batches: they hold parts of one model, or nobody shards the data."""
        for step in self.steps[1:]:
            fed = [
                tuple(member.row(Phase.BATCH, step, m) for m in member.micro_batches(Phase.BATCH, step))
                for member in self.members
            ]
            if any(fed):
                seals = {tuple(row.seal for row in rows if row is not None) for rows in fed}
                return self.world_size > 1 and len(seals) == 1
        return False

    def _build(self) -> Iterator[tuple[RowKey, Maker]]:
        """Every row there is, and how it is made; made when it is asked for, since that reads digests."""
        for step in self.steps:
            for phase in Phase:
                if not phase.per_micro_batch:
                    # A micro-batch's own gradient is that of one rank, or averaged already: it belongs to no row here.
                    yield from self._replicated(phase, step, WHOLE_STEP)
                elif self.same_batches:
                    for m in self.members[0].micro_batches(phase, step):
                        yield from self._replicated(phase, step, m)
                elif self.joined:
                    yield from self._joined(phase, step)
                else:
                    yield from self._further(phase, step)

    def _replicated(self, phase: Phase, step: int, micro_batch: int) -> Iterator[tuple[RowKey, Maker]]:
        rows = {rank: row for rank, member in enumerate(self.members) if (row := member.row(phase, step, micro_batch))}
        if rows:
            yield (phase, step, micro_batch), lambda: self._put_together(rows, step, micro_batch)

    def _put_together(self, rows: Mapping[int, RowView], step: int, micro_batch: int) -> RowView:
        first = next(iter(rows.values()))
        alike = len(rows) == self.world_size and len({row.seal for row in rows.values()}) == 1
        if first.phase is Phase.EVAL or (alike and not _has_pieces(first)):
            return first
        parts: dict[str, dict[int, tuple[RowView, int]]] = {}
        for rank, row in rows.items():
            for name, i in row.layout.positions.items():
                parts.setdefault(name, {})[rank] = row, i
        sources = {name: _source(list(held.values())) for name, held in parts.items()}
        drifts = [drift for name, held in parts.items() if (drift := _drift(name, held)) is not None]
        if first.phase is Phase.GRAD and drifts:
            share = share_of(self.members, step, [drift.name for drift in drifts])
            if share is not None:
                sources |= {drift.name: _mean(parts[drift.name], share) for drift in drifts}
                drifts = []
        key = ("whole", first.phase, *(row.layout.digest for row in rows.values()))
        return self._row(key, first.phase, step, micro_batch, list(rows.values()), list(sources.values()), drifts)

    def _further(self, phase: Phase, step: int) -> Iterator[tuple[RowKey, Maker]]:
        """The ranks' micro-batches, one after the other."""
        found = [
            (local, rank) for rank, member in enumerate(self.members) for local in member.micro_batches(phase, step)
        ]
        if self.order is Order.BY_RANK:
            found.sort()
        for number, (local, rank) in enumerate(found):
            row = self.members[rank].row(phase, step, local)
            if row is not None:
                yield (phase, step, number), partial(self._one, row, number)

    def _one(self, row: RowView, number: int) -> RowView:
        sources: list[Source] = [Held(row, i) for i in range(row.layout.records)]
        if row.phase is Phase.LOSS:
            sources = [_divided(source, self.world_size) for source in sources]
        return self._row(("one", row.phase, row.layout.digest), row.phase, row.step, number, [row], sources)

    def _joined(self, phase: Phase, step: int) -> Iterator[tuple[RowKey, Maker]]:
        """The ranks' micro-batches of the same number as one."""
        for m in self.members[0].micro_batches(phase, step):
            rows = [row for member in self.members if (row := member.row(phase, step, m)) is not None]
            if len(rows) == self.world_size:
                yield (phase, step, m), partial(self._join, rows, m)

    def _join(self, rows: Sequence[RowView], number: int) -> RowView:
        phase, step = rows[0].phase, rows[0].step
        batches = [member.row(Phase.BATCH, step, number) for member in self.members]
        sources = join_rows(rows, batches, by_turns=self.order is Order.INTERLEAVED)
        shapes = tuple((source.entry.name, source.entry.dtype, source.entry.shape) for source in sources)
        return self._row(("joined", phase, shapes), phase, step, number, rows, sources)

    def _row(
        self, key: tuple[object, ...], phase: Phase, step: int, micro_batch: int, rows: Sequence[RowView],
        sources: Sequence[Source], drifts: Sequence[Drift] = (),
    ) -> BuiltRow:  # fmt: skip
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = BuiltLayout(self, phase, [source.entry for source in sources])
        # Equal for rows that were put together in the same way from the same bits, and for no others.
        made = f"{key[0]} {self.order} {self.world_size} {phase.label} {step} {micro_batch} ".encode()
        seal = xxhash.xxh3_128_digest(made + b"".join(row.seal for row in rows))
        return BuiltRow(layout, step, micro_batch, seal, sources, drifts)


def _has_pieces(row: RowView) -> bool:
    return any(piece_of(entry.transform) is not None for entry in row.layout.entries)


def _source(held: Sequence[tuple[RowView, int]]) -> Source:
    """Where a record of a whole step comes from: its parts if any rank holds one, else the first rank that has it."""
    pieces = [piece_of(row.layout.entries[i].transform) for row, i in held]
    known = next((piece for piece in pieces if piece is not None), None)
    if known is None:
        return Held(*held[0])
    boxes: dict[tuple[object, ...], tuple[RowView, int, Piece]] = {}
    for (row, i), piece in zip(held, pieces, strict=True):
        # A rank whose part is all of it says nothing of parts.
        place = piece or Piece((0,) * len(known.whole), known.whole)
        boxes.setdefault((place, row.layout.entries[i].shape), (row, i, place))
    return Pieces(tuple(boxes.values()))


def _drift(name: str, held: Mapping[int, tuple[RowView, int]]) -> Drift | None:
    """The first rank that holds a replicated record, or the same part of a sharded one, differently."""
    if name.startswith(OWN):
        return None
    known: dict[tuple[object, ...], tuple[RowView, tuple[object, ...]]] = {}
    for rank, (row, i) in held.items():
        entry = row.layout.entries[i]
        piece = piece_of(entry.transform)
        place = (piece, entry.shape) if piece is not None else ()
        bits = row.state(i), entry.dtype, entry.shape, row.digests[i].tobytes()
        first, expected = known.setdefault(place, (row, bits))
        if bits != expected and State.UNRECORDED not in (bits[0], expected[0]):
            return Drift(name, rank, first, row)
    return None


def _mean(held: Mapping[int, tuple[RowView, int]], share: float) -> Source:
    """Local gradients as one: each times `share`, added up."""
    parts = [(row, i) for row, i in held.values() if row.state(i) in (State.VALUE, State.ZERO)]
    if not parts or not all(row.stored(i) for row, i in parts):
        row, i = next(iter(held.values()))
        return Held(row, i) if not parts else Absent(row.layout.entries[i])
    entry = parts[0][0].layout.entries[parts[0][1]]

    def make() -> Any:
        total = sum((to_float64(row.read(i), entry.dtype) for row, i in parts), np.zeros(entry.shape))
        return from_float64(total * share, entry.dtype)

    return Made(entry, make)


def _divided(source: Source, world_size: int) -> Source:
    """A rank's loss as a share of the run's."""
    entry = source.entry
    if entry.name != LOSS or source.state() not in (State.VALUE, State.ZERO) or not source.stored():
        return source
    return Made(entry, lambda: from_float64(to_float64(source.read(), entry.dtype) / world_size, entry.dtype))
