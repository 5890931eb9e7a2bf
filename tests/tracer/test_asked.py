"""What `tracer.record` is asked for may be written as on the command line; what means nothing is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tracer
from tracer.asked import ENDLESS, understood
from tracer.errors import BadUsage
from tracer.schema import Phase

BOTH = frozenset({Phase.GRAD, Phase.PARAM})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"what": "grad,param"}, {"what": BOTH}),
        ({"what": ["grad", Phase.PARAM]}, {"what": BOTH}),
        ({"what": Phase.GRAD}, {"what": frozenset({Phase.GRAD})}),
        ({"what": BOTH}, {"what": BOTH}),
        ({"what": "all"}, {"what": frozenset(Phase)}),
        ({"steps": 3}, {"steps": (3, 3)}),
        ({"steps": "2:"}, {"steps": (2, ENDLESS)}),
        ({"steps": (1, 5)}, {"steps": (1, 5)}),
        ({"steps": None}, {"steps": None}),
        ({"only": "*.lora_A.*"}, {"only": ("*.lora_A.*",)}),
        ({"omit": ["a", "b"], "modules": ()}, {"omit": ("a", "b"), "modules": ()}),
        ({"durable": True}, {"durable": True}),
    ],
)
def test_the_words_of_the_command_line_and_objects_mean_the_same(given: dict[str, Any], meant: dict[str, Any]) -> None:
    assert understood(given) == meant


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"what": ("grad", "nope")}, "what: 'nope' is no phase"),
        ({"what": 3}, "what=3 is no set of phases"),
        ({"what": [None]}, "what: None is no phase"),
        ({"steps": "5:3"}, "steps='5:3' holds no step"),
        ({"steps": (1, None)}, "is not a step"),
        ({"only": 7}, "only=7 is no glob"),
        ({"omit": [b"x"]}, "is no glob"),
    ],
)
def test_what_means_nothing_is_refused_and_no_file_is_made(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadUsage) as refused, tracer.record(tmp_path / "a.h5", **given):
        pytest.fail("the program ran")
    assert says in str(refused.value)
    assert list(tmp_path.iterdir()) == []
