"""Why nothing was compared: an `incomparable` that says no more helps nobody."""

from __future__ import annotations

from differ.options import DiffOptions
from differ.result import Cause
from tracer.reader import Trace


def why(a: Trace, b: Trace, options: DiffOptions) -> Cause:
    """The note `nothing`: what was asked for that no record of both sides meets."""
    asked = [f"--only {glob}" for glob in options.only] + [f"--omit {glob}" for glob in options.omit]
    if options.phases is not None:
        asked.append(f"--phases {','.join(phase.label for phase in sorted(options.phases))}")
    if options.steps is not None:
        asked.append(f"--steps {':'.join(map(str, dict.fromkeys(options.steps)))}")
    of_a, of_b = _about(a), _about(b)
    have = f"both have {of_a}" if of_a == of_b else f"a has {of_a}; b has {of_b}"
    if not asked:
        return Cause("nothing", f"a and b have no record in common: {have}")
    return Cause("nothing", f"no record that both have is left by {' '.join(asked)}: {have}")


def _about(trace: Trace) -> str:
    first, last = trace.steps[0], trace.last_step
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"{steps}, {', '.join(phase.label for phase in trace.phases)}"
