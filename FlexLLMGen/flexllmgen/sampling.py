"""Choosing the next token from logits: greedy, or drawn with temperature, top-k and top-p.

Random numbers depend on the seed, the step and the sequence's place in the block, not on how the block is cut
into micro-batches: every policy draws the same tokens.
"""

# B sequences of one micro-batch  V vocabulary

from dataclasses import dataclass
from typing import Protocol

import torch

from flexllmgen.errors import UsageError


class Sampling(Protocol):
    """How tokens are chosen, and which end a sequence."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence; 0 is a token like any other."""
        ...

    @property
    def pad_id(self) -> int:
        """What an ended sequence's columns hold."""
        ...

    def pick(self, logits_BV: torch.Tensor, first_sequence: int, token: int) -> torch.Tensor:
        """Token ids [B] for sequences from `first_sequence` of the block on, at step `token`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """The likeliest token; the first of equals."""

    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def pick(self, logits_BV: torch.Tensor, first_sequence: int, token: int) -> torch.Tensor:  # noqa: ARG002
        return logits_BV.argmax(dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Random choice.

    Args:
        temperature: divides the logits; 0 chooses greedily.
        top_k: only the k likeliest tokens; 0 means all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature {self.temperature:g}, top_k {self.top_k}, top_p {self.top_p:g}: "
                "temperature and top_k must not be negative, top_p must be in (0, 1]"
            )

    def pick(self, logits_BV: torch.Tensor, first_sequence: int, token: int) -> torch.Tensor:
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        scores, ids = (logits_BV.float() / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            scores, ids = scores[:, : self.top_k], ids[:, : self.top_k]
        likely = scores.softmax(dim=-1)
        total = likely.cumsum(dim=-1)
        # A token stays if those before it do not reach top_p yet; so the first always stays.
        likely = likely.masked_fill(total - likely >= self.top_p, 0.0)
        total = likely.cumsum(dim=-1)
        drawn = self._uniform(first_sequence, len(logits_BV), token).to(total.device)
        place = torch.searchsorted(total, drawn[:, None] * total[:, -1:], right=True)
        # A draw may round up to the whole: then it is the last token that stays.
        last = (likely > 0).sum(dim=-1, keepdim=True) - 1
        return ids.gather(1, torch.minimum(place, last))[:, 0]

    def _uniform(self, first: int, count: int, token: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + token) % (1 << 63))
        return torch.rand(first + count, generator=generator)[first:]
