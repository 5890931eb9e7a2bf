"""Packing a row: tensors that are measured together are measured as each alone, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from tracer import packing
from tracer.dtypes import DTYPES, float32_to_bf16, is_float
from tracer.packing import TOGETHER, measure, pack_plan, statistics
from tracer.schema import SKETCH_BUCKETS, Fingerprint, Record, State

SHAPES = [(), (1,), (3,), (8, 64), (64, 8), (7, 13), (0, 4), (TOGETHER,), (TOGETHER + 1,), (100, 101)]


def arrays(dtype: str) -> Iterator[np.ndarray]:
    """Of each shape three: numbers, zeros of both signs, and (a float) some that are not finite or too large to square."""
    generator = np.random.default_rng(3)
    for shape in SHAPES:
        numbers = (generator.standard_normal(shape) * 100).astype(np.float32)
        odd = numbers.copy()
        if odd.size > 2:
            odd.reshape(-1)[:3] = (np.nan, -np.inf, 3e38)
        for values in (numbers, np.where(numbers > 0, np.float32(0), np.float32(-0.0)), odd):
            if dtype == "bfloat16":
                yield float32_to_bf16(values).reshape(shape)
            elif is_float(dtype):
                with np.errstate(over="ignore"):
                    yield values.astype(DTYPES[dtype])
            else:
                yield numbers.astype(np.int8).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("at_once", [packing.BLOCK, 2 * TOGETHER])
def test_a_tensor_measured_with_others_says_what_it_says_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: str, at_once: int
) -> None:
    monkeypatch.setattr(packing, "BLOCK", at_once)
    # Twice, so that there are several of each size; some are views of another layout.
    data = [*arrays(dtype), *arrays(dtype)]
    data = [np.asfortranarray(values) if i % 3 == 2 else values for i, values in enumerate(data)]
    records = [Record(str(i), values, dtype, values.shape) for i, values in enumerate(data)]
    slots, widths = pack_plan(records)
    packed = {name: np.zeros(width, DTYPES[kind]) for name, (kind, width) in widths.items()}
    tables = measure(records, slots, packed)
    for i, values in enumerate(data):
        alone = np.ascontiguousarray(values).reshape(-1)
        assert tables.digest[i].tobytes() == xxhash.xxh3_128_digest(alone.tobytes())
        np.testing.assert_array_equal(tables.stats[i], statistics(alone, dtype), err_msg=str(values.shape))
        is_zero = values.size > 0 and tables.stats[i, 6] == values.size
        assert tables.state[i] == (State.ZERO if is_zero else State.VALUE)
        slot = slots[i]
        if slot.dataset:
            assert packed[slot.dataset][slot.offset : slot.offset + slot.size].tobytes() == alone.tobytes()


def test_a_record_without_data_between_others_keeps_its_place_empty() -> None:
    ones = np.ones(4, np.float32)
    records = [
        Record("a", ones, "float32", (4,)),
        Record("none", None, "float32", (4,), state=State.NONE),
        Record("b", 2 * ones, "float32", (4,)),
        Record("frozen", 3 * ones, "float32", (4,), stored=False),
    ]
    slots, _ = pack_plan(records)
    row = np.zeros(12, np.float32)
    tables = measure(records, slots, {"float32": row})
    assert row.tolist() == [1] * 4 + [0] * 4 + [2] * 4
    assert tables.state.tolist() == [State.VALUE, State.NONE, State.VALUE, State.VALUE]
    assert tables.stats[:, 2].tolist() == [1, 0, 2, 3]
    assert tables.digest[1].tobytes() == bytes(16)


def test_a_fingerprint_with_as_many_zeros_as_its_sketch_has_numbers_is_not_zero() -> None:
    stats = np.array([1.0, 0.0, 1.0, 0.1, 0.0, 0.0, SKETCH_BUCKETS])
    kept = Fingerprint(bytes(range(16)), stats, np.ones(SKETCH_BUCKETS, np.float32))
    records = [Record("w", None, "float32", (500,), stored=False, fingerprint=kept)]
    slots, _ = pack_plan(records)
    tables = measure(records, slots, {"sketch": np.zeros(SKETCH_BUCKETS, np.float32)})
    assert tables.state.tolist() == [State.VALUE]
    assert tables.digest[0].tobytes() == kept.digest
    np.testing.assert_array_equal(tables.stats[0], stats)
