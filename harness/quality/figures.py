"""Perplexity from log-probabilities, and how far two runs' tokens agree. Knows nothing of where either comes from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexllmgen.errors import OffloadError
from harness.quality.sample import Sample
from strategies.base import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMatch:
    """How far generated tokens agree, position by position.

    Args:
        share: of all tokens, those equal at their position.
        prefix_tokens: tokens before a sequence's first difference, mean over the sequences.
    """

    share: float
    prefix_tokens: float
    sequences: int
    tokens: int


def loss_of(engine: Scores, sample: Sample, *, by_steps: bool) -> float:
    """Mean negative log-likelihood, in nats, of the tokens that a sample scores.

    Args:
        by_steps: predict them one by one from the KV cache, as a generation does; else all at once.

    Raises:
        OffloadError: the model's output is no number.
    """
    ids_BT = sample.ids()
    scores_BT = engine.score(ids_BT, prompt_tokens=sample.prompt_tokens if by_steps else ids_BT.shape[1])
    # Column i predicts token i + 1; those up to the first after the prompt are the prompt's own.
    loss = -scores_BT[:, sample.prompt_tokens :].double().mean().item()
    if not math.isfinite(loss):
        raise OffloadError("the model's log-probabilities are not finite")
    return loss


def perplexity(loss: float) -> float:
    """exp(mean negative log-likelihood).

    >>> perplexity(0.0)
    1.0
    """
    return math.exp(min(loss, 700.0))


def match_tokens(mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> TokenMatch:
    """Compare generated ids, row by row; where one has more rows or tokens, those that both have.

    >>> match_tokens([[1, 2, 3, 4]], [[1, 2, 9, 4]])
    TokenMatch(share=0.75, prefix_tokens=2.0, sequences=1, tokens=4)
    """
    equal = tokens = prefix = 0
    rows = list(zip(mine, theirs, strict=False))
    for one, other in rows:
        same = [a == b for a, b in zip(one, other, strict=False)]
        equal += sum(same)
        tokens += len(same)
        prefix += same.index(False) if False in same else len(same)
    assert tokens, "there is nothing to compare"
    return TokenMatch(
        share=equal / tokens, prefix_tokens=prefix / len(rows), sequences=len(rows), tokens=tokens
    )
