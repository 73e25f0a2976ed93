"""Projections with a few more columns are those without, and only where they help."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from m2rnn.layers import projection
from m2rnn.layers.projection import is_plain_linear, project_parts
from tests.tolerances import assert_close

SIZES = (5, 1, 4)  # 10 columns, 16 with those that are added


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Quantised(Tensor):
    """A weight of a class of its own, as torchao's quantised ones are."""


class Doubled(nn.Linear):
    """Stands for an adapter, which does more than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    monkeypatch.setattr(projection, "MANY_ROWS", 6)
    recorded = mock.Mock(side_effect=projection._project_aligned)
    monkeypatch.setattr(projection, "_project_aligned", recorded)
    return recorded


def test_added_columns_change_no_value_and_no_gradient() -> None:
    weight = torch.randn(10, 7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    ours, theirs = projection._project_aligned(weight, x, SIZES), (x @ weight.T).split(SIZES, -1)
    cotangents = [torch.randn_like(part) for part in theirs]
    assert len(ours) == 3
    assert ours[0].stride(-2) == 16
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, torch.float64, "output")
    # without the middle part, whose gradient is zero
    for parts in (slice(None), slice(0, 3, 2)):
        found, expected = (
            torch.autograd.grad(y[parts], [x, weight], cotangents[parts], retain_graph=True) for y in (ours, theirs)
        )
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, torch.float64, "gradient")


@pytest.mark.parametrize("rows", [5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "bias", "hook", "backward hook", "subclass", "quantised"])
def test_columns_are_added_for_many_rows_in_half_precision(
    aligned: mock.Mock, kind: str, dtype: torch.dtype, rows: int
) -> None:
    linear = (Doubled if kind == "subclass" else nn.Linear)(7, 10, bias=kind == "bias").to(dtype)
    if kind == "hook":
        linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    if kind == "backward hook":
        linear.register_full_backward_hook(lambda module, inputs, outputs: None)
    if kind == "quantised":
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    x = torch.randn(1, rows, 7, dtype=dtype)
    found = project_parts(linear, x.as_subclass(OnGpu), SIZES)
    expected = linear(x).split(SIZES, -1)
    for a, b in zip(found, expected, strict=True):
        assert_close(a.as_subclass(Tensor), b, dtype, "output")
    assert aligned.called == (kind == "plain" and dtype == torch.bfloat16 and rows == 6)
    aligned.reset_mock()
    project_parts(linear, x, SIZES)
    assert not aligned.called  # on the CPU


def test_compiler_sees_through_the_choice() -> None:
    linear = nn.Linear(7, 10, bias=False)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor) -> Tensor:
        return x if is_plain_linear(linear) and projection.product_dtype(x) == torch.float32 else -x

    x = torch.randn(2, 7)
    assert torch.equal(compiled(x), x)
