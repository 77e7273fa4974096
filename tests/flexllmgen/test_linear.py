"""linear is torch's, whatever the order it computes in."""

from __future__ import annotations

import pytest
import torch

from flexllmgen.models.linear import FEW_ROWS, NARROW, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (FEW_ROWS.stop - 1, 1), (FEW_ROWS.stop, 1), (2, 9)])
def test_linear_is_that_of_torch(shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 48).to(dtype), torch.randn(80, 48).to(dtype)
    bias = torch.randn(80).to(dtype) if biased else None
    out = linear(x, weight, bias)
    assert out.is_contiguous()
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("width", [16, NARROW, NARROW + 16])
@pytest.mark.parametrize("broken", [False, True])
def test_one_row_is_that_of_torch(width: int, broken: bool) -> None:
    """Also where the weights are infinite in places: the row of zeros beside it is not seen."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, width), torch.randn(80, width) / width, torch.randn(80)
    if broken:
        weight[3, 5] = torch.inf
    for other in (None, bias):
        out = linear(x, weight, other)
        assert out.is_contiguous()
        torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, other))


def test_inputs_need_not_be_contiguous() -> None:
    x, weight = torch.randn(4, 5, 48)[:, -1], torch.randn(80, 48)
    torch.testing.assert_close(linear(x, weight), x @ weight.t())
