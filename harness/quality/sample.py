"""The text that perplexity is measured on: fixed windows of real text, recorded by digest.

    |<- prompt_tokens ->|.|<- scored ->|

WikiText-2's test split where the hub answers or the cache has it, else HumanEval's prompts and solutions, which an
installed package carries. Windows follow one another from the text's beginning. Where a policy changes the KV cache or what
is read of it, the scored tokens are predicted by decode steps, so that this counts as in a generation; else a window is read
at once, which gives the same. Runs with the same tokenizer, input length and batch size have the same sample. Knows nothing
of engines.
"""

# B windows  T their tokens

import hashlib
import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexllmgen.errors import UsageError
from harness.prompt_source import Rows, load_rows

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SEPARATOR = "\n\n"
SCORED_STEPS = 32
MAX_WINDOWS = 16
WINDOWS_PER_SEQUENCE = 4
"""Of one batch; with MAX_WINDOWS this bounds a measurement to 128 decode steps, whatever the batch size."""
MAX_WINDOW_TOKENS = 1024
_CHARACTERS_PER_TOKEN = 16
"""Of text that is tokenised for each token needed; twice that of English."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Windows of token ids, all of one length; the last `scored` of each are what perplexity is over.

    Args:
        text: the dataset's alias; `split` and `revision` say which part and state of it.
        digest: sha256 over the windows' ids and the prompt's length; equal digests mean equal samples.
    """

    text: str
    split: str | None
    revision: str | None
    windows: tuple[tuple[int, ...], ...]
    prompt_tokens: int
    digest: str

    @property
    def scored(self) -> int:
        """Tokens of a window that count: those that decode steps predict; the first one after the prompt is the prompt's."""
        return len(self.windows[0]) - self.prompt_tokens - 1

    @property
    def scored_tokens(self) -> int:
        """The same of all windows."""
        return self.scored * len(self.windows)

    def ids(self) -> "torch.Tensor":
        """The windows, int64 of shape (B, T)."""
        import torch

        return torch.tensor(self.windows)


def draw_sample(tokenizer: Any, *, input_len: int, batch_size: int) -> Sample:
    """The sample of a run with prompts of this length.

    Raises:
        UsageError: the run is too short for a window, or no text can be read.
    """
    prompt_tokens, length = window_shape(input_len)
    wanted = min(MAX_WINDOWS, WINDOWS_PER_SEQUENCE * batch_size)
    rows, text = read_text()
    windows = cut_windows(tokenizer, text, wanted, length)
    return Sample(
        text=rows.name,
        split=rows.split,
        revision=rows.revision,
        windows=windows,
        prompt_tokens=prompt_tokens,
        digest=digest_of(windows, prompt_tokens),
    )


def window_shape(input_len: int) -> tuple[int, int]:
    """Tokens of a window that are its prompt, and all of them; a window is no longer than the run's prompts.

    >>> window_shape(128), window_shape(24)
    ((95, 128), (11, 24))

    Raises:
        UsageError: there is no room for a prompt and a step.
    """
    length = min(input_len, MAX_WINDOW_TOKENS)
    prompt = length - min(SCORED_STEPS, length // 2) - 1
    if prompt < 1:
        raise UsageError(f"--input-len {input_len} is too short a window to measure perplexity on")
    return prompt, length


def cut_windows(tokenizer: Any, text: str, count: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Up to `count` windows of `length` ids; each begins with the token that the tokenizer begins texts with, if any.

    Raises:
        UsageError: the text does not fill one.
    """
    ids: list[int] = tokenizer(text[: count * length * _CHARACTERS_PER_TOKEN], verbose=False)["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)
    start = ids[:1] if ids and ids[0] == bos else []
    ids = ids[len(start) :]
    step = length - len(start)
    windows = tuple(
        (*start, *ids[first : first + step]) for first in range(0, min(count, len(ids) // step) * step, step)
    )
    if not windows:
        raise UsageError(f"the text has {len(ids)} tokens, a window takes {length}")
    return windows


def read_text() -> tuple[Rows, str]:
    """The first text that can be read.

    Raises:
        UsageError: none can.
    """
    readers: tuple[tuple[str, Callable[[Any], Sequence[str]]], ...] = (
        ("wikitext", lambda table: table["text"]),
        (
            "humaneval",
            lambda table: [
                prompt + solution
                for prompt, solution in zip(table["prompt"], table["canonical_solution"], strict=True)
            ],
        ),
    )
    reasons = []
    for name, parts in readers:
        try:
            rows = load_rows(name)
        except UsageError as error:
            log.info("perplexity is not measured on %s: %s", name, error)
            reasons.append(str(error))
            continue
        return rows, SEPARATOR.join(part.strip("\n") for part in parts(rows.table) if part.strip())
    raise UsageError(f"there is no text to measure perplexity on: {'; '.join(reasons)}")


def digest_of(windows: Sequence[Sequence[int]], prompt_tokens: int) -> str:
    """sha256 over the prompt's length and each window's number of ids and ids, little-endian 32-bit numbers."""
    digest = hashlib.sha256(struct.pack("<I", prompt_tokens))
    for window in windows:
        digest.update(struct.pack(f"<{1 + len(window)}I", len(window), *window))
    return digest.hexdigest()
