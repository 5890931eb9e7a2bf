"""Compare a run with its baseline, replace the baseline, keep what a failure leaves: shared by the gate and the pytest plugin.

A baseline is replaced only by a finished trace, only when something changed, and in one step, so that it is whole at any
moment.  A file that is not a trace is never overwritten.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from differ.engine import diff
from differ.options import DiffOptions
from differ.publish import Destination, write_reports
from differ.result import DiffResult, Verdict
from tracer.errors import Damaged, Empty, NewerFormat, NoPermission, NotFound, RecordingStopped
from tracer.reader import open_trace

# Reports that are kept of a failure: kind -> ending.
KEPT: Final = {"text": "txt", "markdown": "md", "html": "html", "json": "json", "junit": "junit.xml"}


@dataclass(frozen=True, slots=True)
class Updated:
    """What became of a baseline: why it was replaced (empty: it was not), and what the comparison with it said."""

    why: str
    result: DiffResult | None


def compare(baseline: Path, run: Path, options: DiffOptions) -> DiffResult:
    """Baseline (a) against a run (b).  Raises NotFound without a baseline, RecordingStopped for an unfinished run."""
    _require_finished(run)
    return diff(baseline, run, options)


def update(baseline: Path, run: Path, options: DiffOptions, *, fingerprint: bool | None = None) -> Updated:
    """Replace a baseline by a run if anything changed.

    `fingerprint`: keep sketches instead of tensors; None: as the baseline is, or tensors for a new one.
    """
    _require_finished(run)
    result: DiffResult | None = None
    was: bool | None = None
    why = "it did not exist"
    if baseline.exists():
        try:
            was, result, why = _changes(baseline, run, options)
        except (Damaged, Empty, NewerFormat) as error:
            why = str(error)
    wanted = bool(was) if fingerprint is None else fingerprint
    if was is not None and wanted != was:
        why = why or ("sketches are wanted instead of tensors" if wanted else "tensors are wanted instead of sketches")
    if why:
        _replace(baseline, run, fingerprint=wanted)
    return Updated(why, result)


def _changes(baseline: Path, run: Path, options: DiffOptions) -> tuple[bool, DiffResult, str]:
    """Whether a baseline is a fingerprint, how a run compares with it, and why it has to be replaced, if so."""
    with open_trace(baseline) as old, open_trace(run) as new:
        result = diff(old, new, options)
        if result.verdict is not Verdict.SAME:
            return old.fingerprint, result, f"the run {'diverged' if result.first else 'has nothing in common with it'}"
        if old.phases != new.phases:
            return old.fingerprint, result, "other phases are recorded"
        if old.steps != new.steps or not old.finished:
            return old.fingerprint, result, "other steps are recorded"
        return old.fingerprint, result, ""


def _require_finished(run: Path) -> None:
    with open_trace(run) as trace:
        if not trace.finished:
            reason = trace.end.get("reason") or "it was cut off"
            raise RecordingStopped(
                f"the run was recorded up to step {trace.last_step} only ({reason})", "mend that first"
            )


def _replace(baseline: Path, run: Path, *, fingerprint: bool) -> None:
    from tracer.shrink import replacing, shrink  # writes files, which nothing else of this package does

    try:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        with replacing(baseline) as part:
            if fingerprint:
                with open_trace(run) as trace:
                    shrink(trace, part, overwrite=True)
            else:
                shutil.copyfile(run, part)
    except PermissionError as error:
        raise NoPermission(f"{baseline} may not be written", "mend its permissions (chmod u+w)") from error
    except OSError as error:
        raise NotFound(f"{baseline} cannot be written: {error.strerror or error}", "check the name") from error


def keep(result: DiffResult, run: Path, folder: Path, name: str) -> list[str]:
    """Keep the trace and the reports of a failure as `folder/name.*`; returns a line for each file.

    The HTML report needs jinja2; without it there is a line that says so.
    """
    from tracer.errors import TraceError

    folder.mkdir(parents=True, exist_ok=True)
    stem = safe_name(name)
    trace = folder / f"{stem}.h5"
    shutil.copyfile(run, trace)
    lines = [f"wrote {trace}"]
    for kind, ending in KEPT.items():
        try:
            lines += write_reports(result, [Destination(kind, folder / f"{stem}.{ending}")])
        except TraceError as error:
            lines.append(f"no {kind} report: {error}")
    return lines


def safe_name(text: str) -> str:
    """A name that any file system takes; two texts that would get the same one get different ones."""
    import xxhash

    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"
    if safe == text and len(safe) <= 100:
        return safe
    return f"{safe[:100]}-{xxhash.xxh3_64_hexdigest(text.encode())[:8]}"


def unused(baselines: Sequence[Path]) -> list[Path]:
    """Traces beside the baselines that are none of them, sorted."""
    known = {path.resolve() for path in baselines}
    found = {path.resolve() for folder in {path.parent for path in known} for path in folder.glob("*.h5")}
    return sorted(found - known)
