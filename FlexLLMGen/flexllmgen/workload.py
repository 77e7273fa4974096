"""The requests of one run: how many sequences, how long. A policy may split them, never change them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of an engine, whichever strategy serves it.

    Args:
        num_sequences: sequences to generate for, over all batches.
        prompt_tokens: tokens of each prompt row, padding included.
        gen_tokens: tokens to generate for each sequence (exactly; EOS does not end a speed run).

    >>> Workload(num_sequences=8, prompt_tokens=128, gen_tokens=32).output_tokens
    256
    """

    num_sequences: int
    prompt_tokens: int
    gen_tokens: int

    def __post_init__(self) -> None:
        for name in ("num_sequences", "prompt_tokens", "gen_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def output_tokens(self) -> int:
        """Tokens generated over all sequences."""
        return self.num_sequences * self.gen_tokens

    @property
    def max_context(self) -> int:
        """Positions a sequence occupies when its last token is generated."""
        return self.prompt_tokens + self.gen_tokens
