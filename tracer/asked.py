"""What a caller of `tracer.record` asked for, in the words of the command line or as objects, in the types of `RecordOptions`.

    what="grad,param"  what=["grad", Phase.PARAM]  what="all"    steps=3  steps="1:5"  steps=(1, 5)    only="*.lora_A.*"

Says so at once where a value means nothing: an unknown phase that is compared with the known ones would record nothing, and a
glob that is taken apart into letters something else.  Never imports a framework or the recorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from tracer.errors import BadUsage
from tracer.schema import Phase

ALL: Final = "all"
# The last step of a range that has no end.
ENDLESS: Final = 2**62


def understood(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `tracer.record` as `RecordOptions` takes them; what is not known here is left as it is.  Raises BadUsage."""
    return {name: _KINDS[name](name, value) if name in _KINDS else value for name, value in options.items()}


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of `3`, `1:5`, `:5` or `4:`, both included.  Raises ValueError, its text a sentence's end."""
    first, colon, last = text.partition(":")
    try:
        low = int(first) if first else 0
        high = (int(last) if last else ENDLESS) if colon else low
    except ValueError:
        raise ValueError("is not a step (3) or a range of steps (1:5)") from None
    if low > high or low < 0:
        raise ValueError("holds no step")
    return low, high


def _phases(name: str, value: Any) -> frozenset[Phase]:
    if value == ALL:
        return frozenset(Phase)
    asked = value.split(",") if isinstance(value, str) else [value] if isinstance(value, Phase) else value
    known = ", ".join(phase.label for phase in Phase)
    if not isinstance(asked, Iterable):
        raise BadUsage(f"{name}={value!r} is no set of phases", f"phases are {known}")
    found = set()
    for one in asked:
        try:
            found.add(one if isinstance(one, Phase) else Phase.parse(one.strip()))
        except (KeyError, AttributeError):
            raise BadUsage(f"{name}: {one!r} is no phase", f"phases are {known}") from None
    return frozenset(found)


def _steps(name: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    text = ":".join(map(str, pair)) if len(pair) == 2 and all(type(step) is int for step in pair) else value
    try:
        return parse_steps(str(text))
    except ValueError as error:
        raise BadUsage(f"{name}={value!r} {error}", 'give 3, "1:5" or (1, 5)') from None


def _globs(name: str, value: Any) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(glob, str) for glob in globs):
        raise BadUsage(f"{name}={value!r} is no glob", "give a string, or a list of strings")
    return globs


_KINDS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "what": _phases,
    "steps": _steps,
    "only": _globs,
    "omit": _globs,
    "modules": _globs,
}
