"""Dequantiser: what turns the compressed tensors of one stage back into numbers, in memory that all stages share.

Experts whose codes lie at equal distances are turned back together: one launch for each would take longer than its work.
"""

# E experts  R rows  N numbers of a row

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from flexllmgen.compression import dequantise, split_compressed
from flexllmgen.images import PackedTensor, expert_of


@dataclass(frozen=True, slots=True)
class _Work:
    """Tensors of one shape: their bytes [E, bytes], or one's [bytes], and where their numbers go."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int
    out: torch.Tensor


class Dequantiser:
    """Add a stage's compressed tensors, then run it once for each pass of the stage.

    Where only some experts are used, what is not of experts is run first, and each of them when it is there.

    Args:
        memory: uint8, for the numbers of any stage.
        dtype: of the numbers.
    """

    def __init__(self, memory: torch.Tensor, dtype: torch.dtype) -> None:
        self._memory, self._dtype = memory, dtype
        self._added: dict[tuple[bool, str], list[tuple[PackedTensor, torch.Tensor, torch.Tensor]]] = {}
        self._experts: dict[int, list[tuple[PackedTensor, torch.Tensor, torch.Tensor]]] = {}
        self._works: list[_Work] | None = None
        self._works_but_experts: list[_Work] | None = None
        self._works_of: dict[int, list[_Work]] = {}

    def add(self, name: str, tensor: PackedTensor, raw: torch.Tensor) -> torch.Tensor:
        """Takes a tensor's bytes; gives the view of where its numbers will be."""
        start = tensor.dense_offset
        dense = self._memory[start : start + tensor.dense_bytes].view(self._dtype).view(tensor.shape)
        # Of experts the last part of the name says which of their matrices it is.
        kind = name.rpartition(".")[2] if name.startswith("experts.") else name
        expert = expert_of(name)
        self._added.setdefault((expert is not None, kind), []).append((tensor, raw, dense))
        if expert is not None:
            self._experts.setdefault(expert, []).append((tensor, raw, dense))
        return dense

    def run(self) -> None:
        """Writes the numbers of all tensors, on the device's current stream."""
        if self._works is None:
            self._works = [work for alike in self._added.values() for work in _works(alike)]
        _run(self._works)

    def run_but_experts(self) -> None:
        """Writes the numbers of all tensors that are not of experts."""
        if self._works_but_experts is None:
            others = [alike for (of_experts, _), alike in self._added.items() if not of_experts]
            self._works_but_experts = [work for alike in others for work in _works(alike)]
        _run(self._works_but_experts)

    def run_experts(self, experts: Iterable[int]) -> None:
        """Writes the numbers of some experts."""
        for expert in experts:
            if expert not in self._works_of:
                self._works_of[expert] = [
                    work for each in self._experts.get(expert, []) for work in _works([each])
                ]
            _run(self._works_of[expert])


def _run(works: Iterable[_Work]) -> None:
    for work in works:
        dequantise(work.codes, work.scale, work.zero, work.bits, work.group_size, work.out)


def _works(alike: list[tuple[PackedTensor, torch.Tensor, torch.Tensor]]) -> Iterator[_Work]:
    tensor = alike[0][0]
    assert tensor.bits is not None
    first = 0
    for raws in _stacked([raw for _, raw, _ in alike]):
        targets = [dense for _, _, dense in alike[first : first + len(raws)]]
        (out,) = _stacked(targets)
        first += len(raws)
        if len(raws) == 1:
            raws, out = raws[0], out[0]
        codes, scale, zero = split_compressed(raws, tensor.shape, tensor.bits, tensor.group_size)
        yield _Work(codes, scale, zero, tensor.bits, tensor.group_size, out)


def _stacked(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Views of neighbours at equal distances in the same memory as one tensor [neighbours, ...].

    A run ends where the memory does: some experts may lie on the device, and others in a slot.
    """
    first = 0
    while first < len(tensors):
        tensor, step, count = tensors[first], 0, 1
        for each in tensors[first + 1 :]:
            # In another memory the distance means nothing.
            alike = each.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            distance = int(each.storage_offset() - tensor.storage_offset())
            step = step or distance
            if not alike or step <= 0 or distance != count * step:
                break
            count += 1
        yield tensor.as_strided((count, *tensor.shape), (max(step, tensor.numel()), *tensor.stride()))
        first += count
