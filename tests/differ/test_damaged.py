"""Damaged files under `trace diff`: an error of ours or the right verdict, never a crash, never a wrong `same`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from differ import Verdict, diff
from tests.builders import make_trace
from tracer.errors import TraceError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    make_trace(folder / "a.h5", steps=3)
    make_trace(folder / "b.h5", steps=3, fault="lr")
    assert diff(folder / "a.h5", folder / "b.h5").verdict is Verdict.DIVERGED
    return folder / "a.h5", folder / "b.h5"


def verdict(a: Path, b: Path) -> Verdict | None:
    """The verdict, or None for an error that is ours; any other exception fails the test."""
    try:
        return diff(a, b).verdict
    except TraceError:
        return None


def test_a_flipped_byte_never_makes_a_divergence_the_same(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    whole = a.read_bytes()
    path = tmp_path / "flip.h5"
    rng = random.Random(5)
    for offset in [rng.randrange(len(whole)) for _ in range(200)]:
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert verdict(path, b) in (Verdict.DIVERGED, None), f"byte {offset}"
        assert verdict(a, path) in (Verdict.SAME, None), f"byte {offset}"


def test_a_truncated_file_never_has_a_verdict(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, _ = pair
    whole = a.read_bytes()
    path = tmp_path / "cut.h5"
    rng = random.Random(6)
    for offset in [rng.randrange(len(whole)) for _ in range(200)]:
        path.write_bytes(whole[:offset])
        assert verdict(path, a) is None, f"cut at {offset}"
