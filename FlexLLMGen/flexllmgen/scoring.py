"""Scores: how likely a model finds each token of given texts, computed a block at a time by the engine's own loop."""

# B sequences of the block  T positions  V vocabulary  D model

import torch

from flexllmgen.executor import Executor
from flexllmgen.models.decoder import Decoder, Weights

_SCORE_ROWS = 256
"""Rows whose logits are held at once."""


def score_block(
    executor: Executor,
    decoder: Decoder,
    device: torch.device,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    prompt: int,
) -> torch.Tensor:
    """Log-probabilities [B, T - 1] of one block, of which `prompt` positions are computed at once; float32 on the host."""
    targets = ids.to(device).long()
    count, length = targets.shape

    def head(w: Weights, x_BTD: torch.Tensor, first: int, token: int) -> torch.Tensor:
        batch, columns, size = x_BTD.shape
        begin = prompt + token - 1 if token else 0
        end = min(begin + columns, length - 1)  # The last token predicts none that is known.
        rows = x_BTD[:, : end - begin].reshape(-1, size)
        wanted = targets[first : first + batch, begin + 1 : end + 1].reshape(-1)
        found = torch.empty(len(rows), dtype=torch.float32, device=x_BTD.device)
        for start in range(0, len(rows), _SCORE_ROWS):
            stop = start + _SCORE_ROWS
            likely = decoder.logits(w, rows[start:stop]).float().log_softmax(dim=-1)
            found[start:stop] = likely.gather(1, wanted[start:stop, None])[:, 0]
        scores[first : first + batch, begin:end] = found.view(batch, end - begin)
        # What comes next is not chosen but given.
        return targets[first : first + batch, end]

    with torch.inference_mode():
        scores = torch.empty(count, length - 1, dtype=torch.float32, device=device)
        passes = max(1, length - prompt)
        for _ in executor.run(ids[:, :prompt], None if mask is None else mask[:, :prompt], passes, head):
            pass
        return scores.cpu()
