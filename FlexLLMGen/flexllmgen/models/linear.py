"""Linear layers: torch's, in the order that the processor runs faster."""

# R rows  D width in  O width out

import torch
import torch.nn.functional as F

FEW_ROWS = range(2, 9)
"""Rows for which torch's CPU product in float32 runs far below the rate at which memory gives it the weights."""
NARROW = 1024
"""Up to this width of the input the same is true of one row."""


def linear(x: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., D] times the weight's transpose, plus the bias: [..., O].

    A decode step of a few sequences on the CPU is computed as weight x inputs: the same sums, 1.1 to 6 times as
    fast (two cores, float32, 2 to 8 rows), because the library then splits the long side of the product. One row
    that is narrow is computed beside a row of zeros: 1.2 to 2.9 times as fast where it is 576 wide, 1.4 to 2.1 at 768;
    from 1,536 on there is no gain.
    """
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    alone = rows == 1 and width <= NARROW
    if x.device.type != "cpu" or x.dtype != torch.float32 or not (alone or rows in FEW_ROWS):
        return F.linear(x, weight_OD, bias_O)
    x_RD = x.reshape(rows, width)
    if alone:
        x_RD = torch.cat([x_RD, x.new_zeros(1, width)])
    out_OR = weight_OD @ x_RD.t() if bias_O is None else torch.addmm(bias_O[:, None], weight_OD, x_RD.t())
    return out_OR[:, :rows].t().contiguous().view(*x.shape[:-1], -1)
