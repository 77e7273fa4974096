"""A mixture's experts computed together: every expert's rows in one grouped product, however unevenly they are spread.

One expert after another costs several kernel launches each and a wait, since the host must learn how many rows each
expert has; for a hundred small experts that takes longer than all their arithmetic. Here rows are sorted by expert and
cut into tiles of one expert's rows each, on the device: the host never waits, and launches as many tiles as there can
be at most. On a CPU, where starting work costs nothing, the decoder goes from expert to expert.
"""

# R rows  K experts of a row  A = R * K assignments  E experts  T tiles  D model  I inner

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

KINDS = ("gate_up", "down")


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sorted assignments cut into tiles.

    Args:
        rows_A: the row of each assignment, sorted by expert.
        places_A: where each assignment went, in the order of rows and of a row's choices.
        expert_T: the expert of each tile; the number of experts for tiles there was no use for.
        first_T, stop_T: assignments of a tile: from `first_T` on, before `stop_T`, and at most the tile's rows.
    """

    rows_A: torch.Tensor
    places_A: torch.Tensor
    expert_T: torch.Tensor
    first_T: torch.Tensor
    stop_T: torch.Tensor


def expert_addresses(
    tensors: Mapping[str, torch.Tensor], num_experts: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Where each expert's weights begin, int64 [E] on the device: `experts.gate_up` and `experts.down`.

    Experts may lie anywhere: some resident, others in a slot.
    """
    return {
        f"experts.{kind}": torch.tensor(
            [tensors[f"experts.{expert}.{kind}"].data_ptr() for expert in range(num_experts)], device=device
        )
        for kind in KINDS
    }


def cut_tiles(experts_RK: torch.Tensor, num_experts: int, tile_rows: int) -> Tiles:
    """Sorts assignments by expert and cuts them into tiles of at most `tile_rows`; without waiting for the device."""
    chosen, flat_A, device = experts_RK.shape[1], experts_RK.flatten(), experts_RK.device
    order_A = flat_A.argsort(stable=True)
    index_A = torch.arange(len(flat_A), device=device)
    places_A = torch.empty_like(order_A).scatter_(0, order_A, index_A)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts_E.scatter_add_(0, flat_A, torch.ones_like(flat_A))
    stops_E = counts_E.cumsum(0)
    tiles_E = (counts_E + (tile_rows - 1)) // tile_rows
    tile_stops_E = tiles_E.cumsum(0)
    # Each expert has at most one tile that is not full.
    index_T = torch.arange(len(flat_A) // tile_rows + min(num_experts, len(flat_A)), device=device)
    expert_T = torch.searchsorted(tile_stops_E, index_T, right=True)
    known_T = expert_T.clamp(max=num_experts - 1)
    turn_T = index_T - (tile_stops_E - tiles_E)[known_T]
    return Tiles(
        rows_A=order_A // chosen,
        places_A=places_A,
        expert_T=expert_T,
        first_T=(stops_E - counts_E)[known_T] + turn_T * tile_rows,
        stop_T=stops_E[known_T],
    )


def tile_rows_for(assignments: int, num_experts: int) -> int:
    """Rows of a tile, about as many as an expert has: more would be wasted, fewer read its weights more often."""
    average = assignments / num_experts
    return next((rows for rows in (16, 32, 64) if average <= rows), 128)


def grouped_experts(
    w: Mapping[str, torch.Tensor],
    x_RD: torch.Tensor,
    weights_RK: torch.Tensor,
    experts_RK: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor],
    num_experts: int,
) -> torch.Tensor:
    """The weighted sum of each row's experts, [R, D], on CUDA.

    Args:
        w: with the tables of `expert_addresses`, and the weights they lead to.
        gate: what makes the inner values of an expert from its first product.
    """
    from flexllmgen.models.experts_triton import grouped_product

    count, chosen = experts_RK.shape
    tile_rows = tile_rows_for(count * chosen, num_experts)
    tiles = cut_tiles(experts_RK, num_experts, tile_rows)
    inner_AI = gate(
        grouped_product(
            x_RD, tiles, w["experts.gate_up"], len(w["experts.0.gate_up"]), tile_rows, gather=True
        )
    )
    out_AD = grouped_product(
        inner_AI, tiles, w["experts.down"], len(w["experts.0.down"]), tile_rows, gather=False
    )
    del inner_AI
    picked_RKD = out_AD[tiles.places_A].view(count, chosen, -1)
    return torch.bmm(weights_RK[:, None].to(x_RD.dtype), picked_RKD)[:, 0]
