"""Tensors copied together are those that are taken one by one; a model's names are asked for again when it has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tracer.backends import pytorch_copies
from tracer.backends.pytorch_copies import copy_together, groups_of_plain, take_all
from tracer.backends.pytorch_model import ParameterNames
from tracer.backends.pytorch_tensors import Taken, take

torch: Any = pytest.importorskip("torch", reason="needs the extra `torch`")

# Of torch, about kinds of tensors and modules that it is giving up and that programs still have.
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{kind}") for kind in ("Sparse invariant", "quantize", "jit.script")]


def tensors() -> list[Any]:
    """Of every kind that a run may hold, plain ones of each dtype several times."""
    torch.manual_seed(0)
    plain = torch.randn(4, 6)
    odd = [
        torch.sparse_coo_tensor([[0], [1]], [2.0], (2, 2)),
        torch.zeros(3, device="meta"),
        torch.randn(3, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
        torch.randn(2).to(torch.float8_e4m3fn),
    ]
    found = [torch.nn.Parameter(plain.clone()), plain.T, plain[:, ::2], plain.expand(2, 4, 6), *odd]
    found += [torch.tensor(float(i)) for i in range(3)] + [torch.zeros(0, 5), torch.tensor([-0.0, float("nan")])]
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool):
        found += [(plain * 100).to(dtype), plain.to(dtype).T]
    return [*found, found[0], torch.nn.Parameter(plain, requires_grad=False)]


def describe(taken: Taken) -> tuple[Any, ...]:
    data = None if taken.data is None else (taken.data.tobytes(), taken.data.dtype, taken.data.shape)
    return data, taken.dtype, taken.shape, taken.state


@pytest.mark.parametrize("together", [pytorch_copies.TOGETHER, 200, 1])
def test_what_is_copied_together_is_what_each_is_alone(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(pytorch_copies, "TOGETHER", together)
    given = tensors()
    groups, alone = groups_of_plain(given)
    assert sorted([*alone, *(i for group in groups for i in group)]) == list(range(len(given)))
    assert (len(groups) > 0) is (together > 1)
    generator = torch.get_rng_state()
    assert [describe(taken) for taken in take_all(given)] == [describe(take(tensor)) for tensor in given]
    assert torch.equal(generator, torch.get_rng_state())


def test_a_device_is_asked_once_for_all_tensors_of_a_dtype_and_once_more_for_each_further_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    as_numpy = pytorch_copies.as_numpy
    monkeypatch.setattr(pytorch_copies, "as_numpy", lambda t, name: asked.append(name) or as_numpy(t, name))
    given = [torch.ones(3, 4, dtype=dtype) for _ in range(50) for dtype in (torch.float32, torch.bfloat16)]
    take_all(given)
    assert asked == ["float32", "bfloat16"]
    asked.clear()
    monkeypatch.setattr(pytorch_copies, "TOGETHER", 25 * 48)
    take_all(given)
    assert sorted(asked) == ["bfloat16", "float32", "float32"]


def test_a_copy_is_not_the_tensor_itself() -> None:
    given = [torch.ones(3), torch.ones(2)]
    for taken in (take_all(given), take_all(given[:1])):
        given[0].add_(1)
        assert taken[0].data is not None
        assert taken[0].data.tolist() != given[0].tolist()


@pytest.mark.parametrize(("change", "same"), [(lambda _: None, True), (lambda t: t.view(-1)[1].neg_(), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_sign_of_a_zero_makes_copies_differ_and_equal_nans_do_not(
    change: Callable[[Any], None], same: bool, dtype: Any
) -> None:
    given = [torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([[float("nan"), 0.0]], dtype=dtype)]
    before = take_all(given)
    change(given[1])
    now = copy_together(given)
    assert now.same_bits(before) is same
    assert not now.same_bits([before[0], None])
    assert not now.same_bits([before[0], Taken(np.zeros((2, 1), before[1].data.dtype), before[1].dtype, (2, 1))])


def names(module: Any) -> list[tuple[str, int]]:
    return [(name, id(parameter)) for name, parameter in module.named_parameters()]


def change_in_place(model: Any) -> None:
    model[0]._parameters["weight"] = torch.nn.Parameter(torch.zeros(2, 2))


def exchange(model: Any) -> None:
    model[0], model[1] = model[1], model[0]


def rename(model: Any) -> None:
    model[0]._parameters["scale"] = model[0]._parameters.pop("weight")


def tie(model: Any) -> None:
    model[1].weight = model[0].weight


def replace_until_an_address_returns(model: Any) -> None:
    before = id(model[0].weight)
    for _ in range(1000):
        del model[0].weight
        model[0].weight = torch.nn.Parameter(torch.zeros(2, 2))
        if id(model[0].weight) == before:
            return


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        exchange,
        rename,
        tie,
        replace_until_an_address_returns,
        lambda model: model.append(torch.nn.Linear(2, 2)),
        lambda model: model.pop(0),
        lambda model: model[2].register_module("adapter", torch.nn.Linear(2, 2)),
        lambda model: setattr(model[1], "bias", None),
    ],
)
def test_the_names_of_a_model_that_has_changed_are_new(change: Callable[[Any], object]) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))
    )
    known = ParameterNames()
    known.of(model)
    change(model)
    assert [(name, id(parameter)) for name, parameter in known.of(model)] == names(model)


def test_the_names_of_a_model_that_is_the_same_are_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].itself = [model]
    model[1]._modules["above"] = model  # a circle, which torch walks too
    known = ParameterNames()
    first = known.of(model)
    expected = names(model)
    asked: list[None] = []
    named_parameters = torch.nn.Module.named_parameters
    monkeypatch.setattr(torch.nn.Module, "named_parameters", lambda *a: asked.append(None) or named_parameters(*a))
    assert [(name, id(parameter)) for name, parameter in known.of(model)] == expected
    assert [name for name, _ in first] == [name for name, _ in expected]
    assert not asked


def test_a_scripted_model_is_asked_each_time() -> None:
    model = torch.jit.script(torch.nn.Linear(2, 2))
    known = ParameterNames()
    assert [name for name, _ in known.of(model)] == [name for name, _ in known.of(model)] == ["weight", "bias"]
