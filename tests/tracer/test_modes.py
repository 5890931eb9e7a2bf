"""The mode of a run's steps, as one setting and a record where a step departs from it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tracer.modes import MIXED, Mode, TrainingMode, mode_of
from tracer.recorder import Recorder


class Observed:
    """Stands for a recorder: the first value of a key is kept."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def observe(self, key: str, value: Any) -> None:
        self.settings.setdefault(key, value)


@pytest.mark.parametrize(
    ("flags", "mode"),
    [([], None), ([True, True], True), ([False], False), ([True, False], MIXED), ([True, MIXED], MIXED)],
)
def test_modes_are_one_mode_or_mixed(flags: list[Mode], mode: Mode | None) -> None:
    assert mode_of(flags) == mode


def test_a_step_whose_mode_is_not_that_of_the_first_says_so() -> None:
    observed = Observed()
    training = TrainingMode(cast("Recorder", observed))
    steps: list[list[Mode | None]] = [[None], [True, None], [True, True], [True, False], [False], [None], [True]]
    found = [[float(cast("Any", record.data)) for record in training.of_step(modes)] for modes in steps]
    assert observed.settings == {"model.training": True}
    assert found == [[], [], [], [0.5], [0.0], [], []]
