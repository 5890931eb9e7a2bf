"""The repository of `tests.acceptance.repository`, with one of its five faults, that of which no setting tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.repository import FAULTS, Repository


def test_a_repository_is_green_and_a_fault_turns_it_red_at_its_address_in_every_report(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    repository = Repository(tmp_path)
    assert repository.tell().wrong(None) == []
    told = repository.tell(FAULTS["mean over padding too"])
    assert told.wrong(FAULTS["mean over padding too"]) == []
    assert set(told.where) == {"terminal", "pytest", "JUnit", "markdown", "HTML"}
    assert repository.changed() == ""
