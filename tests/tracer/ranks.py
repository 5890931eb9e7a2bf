"""Write the traces of ranks without a launcher: small rows that hang together, one file a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tracer.schema import WHOLE_STEP, Phase, Record, Row
from tracer.shards import Piece, with_piece
from tracer.writer import TraceWriter

WORLD, STEPS, ROWS = 2, 3, 2
WEIGHT = (5, 4)
Edit = Callable[[Row, int], Row]


def whole(step: int, name: str, phase: Phase) -> np.ndarray[Any, Any]:
    """A tensor that all ranks share, float32 of shape WEIGHT."""
    return np.random.default_rng([step, phase, len(name)]).normal(size=WEIGHT).astype(np.float32)


def tokens(step: int, rank: int, length: int = 6) -> np.ndarray[Any, Any]:
    """Ids of a rank's rows, int64 [ROWS, length]."""
    return np.random.default_rng([step, rank, 99]).integers(1, 50, (ROWS, length))


def tensor(phase: Phase, step: int, name: str, data: np.ndarray[Any, Any], **fields: Any) -> Record:
    """A record of an array."""
    return Record(name, data, str(data.dtype), data.shape, **fields)


def rows_of(step: int, rank: int, *, length: int = 6) -> list[Row]:
    """The rows of one rank at one step; rank -1 is one process that accumulates what the ranks are given."""
    if step == 0:
        frozen = tensor(Phase.INIT, 0, "frozen", np.arange(20, dtype=np.float32).reshape(WEIGHT), stored=False)
        own = tensor(Phase.INIT, 0, "rng.torch", np.arange(4, dtype=np.uint8) + np.uint8(rank + 1))
        return [Row(Phase.INIT, 0, WHOLE_STEP, (tensor(Phase.INIT, 0, "w", whole(0, "w", Phase.INIT)), frozen, own))]
    made = []
    for number, one in enumerate(range(WORLD) if rank < 0 else [rank]):
        ids = tokens(step, one, length)
        share = WORLD if rank < 0 else 1
        loss = np.array((3.0 + one) / share, np.float32)
        made.append(Row(Phase.BATCH, step, number, (tensor(Phase.BATCH, step, "input_ids", ids),)))
        made.append(Row(Phase.LOSS, step, number, (tensor(Phase.LOSS, step, "loss", loss),)))
    for phase in (Phase.GRAD, Phase.PARAM):
        made.append(Row(phase, step, WHOLE_STEP, (tensor(phase, step, "w", whole(step, "w", phase)),)))
    return made


def write(
    path: Path, rank: int, *, world: int = WORLD, steps: int = STEPS, edit: Edit | None = None, **more: Any
) -> Path:
    """One rank's trace beside `path`, or with rank -1 that of one process at `path` itself.  `extra`: rows that are added."""
    extra: Callable[[int, int], list[Row]] = more.pop("extra", lambda step, rank: [])
    env = {"rank": rank, "world_size": world, "launch": more.pop("launch", "x")} if rank >= 0 else {}
    file = path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank >= 0 else path
    finished = more.pop("finished", True)
    writer = TraceWriter(file, env=env, declared={}, overwrite=True)
    for step in range(steps + 1):
        rows = rows_of(step, rank, **more)
        changed = [edit(row, rank) for row in rows] if edit is not None else rows
        changed = [*changed, *(extra(step, rank) if step else [])]
        writer.write_step(
            step, changed, {"framework": "numpy", "accumulation": WORLD if rank < 0 else 1} if step else None
        )
    if finished:
        writer.finish()
    else:
        writer.finish(finished=False, reason="killed")
    return file


def run(path: Path, edit: Edit | None = None, **more: Any) -> Path:
    """The traces of all ranks; returns the name of the run."""
    for rank in range(WORLD):
        write(path, rank, edit=edit, **more)
    return path


def change(phase: Phase, step: int, rank: int, how: Callable[[Record], Record]) -> Edit:
    """An edit of the records of one phase at one step on one rank."""

    def edit(row: Row, at: int) -> Row:
        if (row.phase, row.step, at) != (phase, step, rank):
            return row
        return replace(row, records=tuple(how(record) for record in row.records))

    return edit


def sharded(row: Row, rank: int) -> Row:
    """A row as `fully_shard` would leave it on a rank: the first dimension cut as torch.chunk does."""
    if row.phase.per_micro_batch:
        return row
    records = []
    for record in row.records:
        if record.shape != WEIGHT or record.data is None:
            records.append(record)
            continue
        step = -(-WEIGHT[0] // WORLD)
        part = record.data[rank * step : (rank + 1) * step]
        piece = Piece((rank * step, 0), WEIGHT)
        records.append(replace(record, data=part, shape=part.shape, transform=with_piece("", piece)))
    return replace(row, records=tuple(records))
