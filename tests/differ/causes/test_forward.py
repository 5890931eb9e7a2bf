"""Causes in module outputs: a factor from a module on, a difference that begins at a position or grows with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from differ import DiffResult, diff
from tests.builders import F32, record
from tests.differ.causes.plant import causes, mirrored
from tracer.schema import WHOLE_STEP, Phase, Row
from tracer.writer import TraceWriter

ROWS, LENGTH, WIDTH = 2, 32, 640
MODULES = ("model.embed_tokens", "model.layers.0", "lm_head")

Change = Callable[[np.ndarray], np.ndarray]
ROOT = float(np.sqrt(640.0))


@pytest.mark.parametrize(
    ("factor", "matches"), [(25.25 / ROOT, "the root of the width (640) rounded to bfloat16"), (1.01, ""), (0.5, "")]
)
def test_a_scaled_output_is_named_with_its_module_and_factor(factor: float, matches: str, tmp_path: Path) -> None:
    result = _pair(tmp_path, lambda output: output * F32(factor))

    (cause,) = causes(result, "forward.scale")
    assert (cause.step, cause.phase, cause.names) == (1, "forward", (MODULES[0],))
    assert cause.parameters is not None
    assert cause.parameters["factor"] == pytest.approx(factor, rel=1e-5)
    assert cause.parameters["matches"] == matches
    assert not causes(result, "forward.position")


def test_the_factor_is_inverse_with_a_and_b_in_each_others_place(tmp_path: Path) -> None:
    _pair(tmp_path, lambda output: output * F32(2))

    (cause,) = causes(mirrored(tmp_path), "forward.scale")
    assert cause.parameters is not None
    assert cause.parameters["factor"] == 0.5


@pytest.mark.parametrize("start", [2, 20])
def test_a_difference_from_a_position_on_is_named_with_the_position(start: int, tmp_path: Path) -> None:
    def change(output: np.ndarray) -> np.ndarray:
        changed = output.copy()
        changed[:, start:] = np.random.default_rng(7).normal(size=changed[:, start:].shape)
        return changed

    result = _pair(tmp_path, change)

    (cause,) = causes(result, "forward.position")
    assert cause.parameters == {"kind": "from", "position": start}
    assert not causes(result, "forward.scale")


@pytest.mark.parametrize("angle", [1e-3, 1e-2])
def test_a_rotation_whose_error_grows_with_the_position_is_named(angle: float, tmp_path: Path) -> None:
    def rotate(output: np.ndarray) -> np.ndarray:
        phase = angle * np.arange(LENGTH)[None, :, None]
        left, right = output[..., : WIDTH // 2], output[..., WIDTH // 2 :]
        turned = (left * np.cos(phase) - right * np.sin(phase), left * np.sin(phase) + right * np.cos(phase))
        return np.concatenate(turned, axis=-1).astype(F32)

    result = _pair(tmp_path, rotate)

    (cause,) = causes(result, "forward.position")
    assert cause.parameters is not None
    assert cause.parameters["kind"] == "grows"
    assert cause.parameters["slope"] == pytest.approx(angle, rel=0.02)


def attention(values: np.ndarray, *, rate: float = 1.0, score: float = 1.0) -> np.ndarray:
    """Causal self-attention of [B, L, features] with rotary angles: positions times `rate`, scores times `score`."""
    half = values.shape[-1] // 2
    angles = rate * np.arange(LENGTH)[:, None] * 1e4 ** (-np.arange(half) / half)

    def turned(given: np.ndarray) -> np.ndarray:
        left, right = given[..., :half].astype(np.float64), given[..., half:].astype(np.float64)
        parts = left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)
        return np.concatenate(parts, axis=-1)

    queries, keys = turned(values), turned(np.roll(values, 5, axis=-1))
    scores = score * np.einsum("bif,bjf->bij", queries, keys) / np.sqrt(values.shape[-1])
    scores = np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ values).astype(F32)


def attended(folder: Path, *, rate: float = 1.0, score: float = 1.0) -> DiffResult:
    _write(folder / "a.h5", attention)
    _write(folder / "b.h5", lambda values: attention(values, rate=rate, score=score))
    return diff(folder / "a.h5", folder / "b.h5")


@pytest.mark.parametrize("rate", [1.0002, 1.001, 1.01, 0.99])
def test_other_angles_inside_an_attention_are_a_note_at_its_output(rate: float, tmp_path: Path) -> None:
    result = attended(tmp_path, rate=rate)

    assert result.findings
    assert not [cause for cause in result.causes if cause.id.startswith("forward")]
    (note,) = [note for note in result.notes if note.id == "forward.position"]
    assert note.explains is None
    assert note.parameters is not None
    assert note.parameters["kind"] == "grows"
    assert 0.65 <= note.parameters["power"] <= 2.0


@pytest.mark.parametrize("score", [1.01, 1.5, 0.7])
def test_scores_that_are_scaled_do_not_grow_with_the_position(score: float, tmp_path: Path) -> None:
    result = attended(tmp_path, score=score)

    assert result.findings
    assert not [each for each in (*result.causes, *result.notes) if each.id.startswith("forward")]


def test_noise_in_an_output_is_neither(tmp_path: Path) -> None:
    def noisy(output: np.ndarray) -> np.ndarray:
        return (output + 0.01 * np.random.default_rng(7).normal(size=output.shape)).astype(F32)

    result = _pair(tmp_path, noisy)

    assert result.findings
    assert not [cause for cause in result.causes if cause.id.startswith("forward")]


def test_equal_outputs_have_no_cause(tmp_path: Path) -> None:
    assert _pair(tmp_path, lambda output: output).causes == ()


def _pair(folder: Path, change: Change) -> DiffResult:
    _write(folder / "a.h5", lambda output: output)
    _write(folder / "b.h5", change)
    return diff(folder / "a.h5", folder / "b.h5")


def _write(path: Path, change: Change) -> None:
    """One step of a model whose first module is changed; the others add to what they get."""
    draw = np.random.default_rng(5)
    ids = draw.integers(0, 9, size=(ROWS, LENGTH))
    output = change(draw.normal(size=(ROWS, LENGTH, WIDTH)).astype(F32))
    rows = output.reshape(-1, WIDTH)
    where = np.argwhere(np.ones((ROWS, LENGTH)))
    outputs = [record(name, (rows + F32(i)).astype(F32) if i else rows) for i, name in enumerate(MODULES)]
    writer = TraceWriter(path, env={}, declared={}, overwrite=True)
    weight = record("model.embed_tokens.weight", np.ones((4, 4), F32))
    writer.write_step(0, [Row(Phase.INIT, 0, WHOLE_STEP, (weight,))], {"model.dtype": "float32"})
    writer.write_step(
        1,
        [
            Row(Phase.BATCH, 1, 0, (record("input_ids", ids),)),
            Row(Phase.FORWARD, 1, 0, (record("positions", where), *outputs)),
        ],
    )
    writer.finish()
