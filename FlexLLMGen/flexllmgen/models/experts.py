"""Experts computed together: every expert's rows as one batch of a batched product, padded to the fullest.

One expert after another costs several kernel launches each, which for a hundred small experts take longer than all
their arithmetic. Padding wastes products instead; where one expert has far more rows than the others, too many, and
the caller goes from expert to expert.
"""

# R rows  K experts of a row  E experts  C rows of the fullest expert  D model  I inner

from collections.abc import Callable, Iterator, Mapping

import torch

_PADDED, _PADDED_ROWS = 2, 32
"""Padded rows are at most so many times the real ones, or so many for each expert."""
_KINDS = ("gate_up", "down")


def stack_experts(tensors: Mapping[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """Views of neighbouring experts' weights as one tensor [experts, out, in]: `experts.down[0]`, `[1]` and so on.

    A run ends where the memory does: some experts may lie on the device, and others in a slot.
    """
    stacks: dict[str, torch.Tensor] = {}
    for kind in _KINDS:
        mine = [tensors[f"experts.{expert}.{kind}"] for expert in range(num_experts)]
        for index, (first, count) in enumerate(_runs(mine)):
            tensor = mine[first]
            step = mine[first + 1].storage_offset() - tensor.storage_offset() if count > 1 else tensor.numel()
            stacks[f"experts.{kind}[{index}]"] = tensor.as_strided(
                (count, *tensor.shape), (step, *tensor.stride())
            )
    return stacks


def grouped_experts(
    w: Mapping[str, torch.Tensor],
    x_RD: torch.Tensor,
    weights_RK: torch.Tensor,
    experts_RK: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor],
    num_experts: int,
) -> torch.Tensor | None:
    """The weighted sum of each row's experts, [R, D]; None where the rows are too unevenly spread.

    The host waits once, to learn how many rows the fullest expert has.

    Args:
        w: with the stacks of `stack_experts`.
        gate: what makes the inner values of an expert from its first product.
    """
    (count, chosen), size = experts_RK.shape, x_RD.shape[1]
    flat = experts_RK.flatten()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts_E.scatter_add_(0, flat, torch.ones_like(flat))
    fullest = int(counts_E.max())
    if num_experts * fullest > max(_PADDED * count * chosen, _PADDED_ROWS * num_experts):
        return None
    order = flat.argsort(stable=True)
    expert = flat[order]
    # Where each assignment lies among the padded rows: its expert's first row, and its turn there.
    turn = torch.arange(len(flat), device=flat.device) - (counts_E.cumsum(0) - counts_E)[expert]
    sorted_places = expert * fullest + turn
    places = torch.empty_like(sorted_places).scatter_(0, order, sorted_places)
    padded = x_RD.new_zeros(num_experts * fullest, size)
    padded.index_copy_(0, sorted_places, x_RD[order // chosen])
    inner_ECI = gate(_products(w, "gate_up", padded.view(num_experts, fullest, size)))
    del padded
    out_ECD = _products(w, "down", inner_ECI)
    del inner_ECI
    picked_RKD = out_ECD.view(-1, size)[places].view(count, chosen, size)
    return (picked_RKD * weights_RK[..., None].to(x_RD.dtype)).sum(dim=1)


def _products(w: Mapping[str, torch.Tensor], kind: str, x_ECD: torch.Tensor) -> torch.Tensor:
    outputs, first, index = [], 0, 0
    while first < len(x_ECD):
        stack = w[f"experts.{kind}[{index}]"]
        outputs.append(torch.bmm(x_ECD[first : first + len(stack)], stack.transpose(1, 2)))
        first, index = first + len(stack), index + 1
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _runs(tensors: list[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """(first, count) of tensors that lie in the same memory at equal distances."""
    first = 0
    while first < len(tensors):
        count = 1
        here = tensors[first].untyped_storage().data_ptr()
        offsets = [tensors[first].storage_offset()]
        for tensor in tensors[first + 1 :]:
            at = tensor.storage_offset()
            alike = tensor.untyped_storage().data_ptr() == here and at > offsets[-1]
            if not alike or (count > 1 and at - offsets[-1] != offsets[1] - offsets[0]):
                break
            offsets.append(at)
            count += 1
        yield first, count
        first += count
