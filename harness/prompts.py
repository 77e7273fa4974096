"""The prompts of a run: rows of a dataset, drawn by seed and turned into token ids of one length.

    input_len 6:   pad    . . . 5 6 7      one prompt a row, padded on the left, masked
                   fill   5 6 7 2 8 9      prompts joined by a blank line until the row is full

The draw is a random permutation of the rows; the prompts of a smaller run are the first of a larger
one's with the same seed. Knows nothing of models.
"""

import dataclasses
import hashlib
import itertools
import random
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flexllmgen.errors import UsageError
from harness.prompt_encoding import Encode, choose_encoder, pad_token_id
from harness.prompt_source import Kind, RegisteredDataset, Rows, load_rows, registered_datasets
from harness.prompt_template import CONVERSATIONS, Template, choose_template
from harness.results import DatasetRecord

if TYPE_CHECKING:
    import torch

__all__ = ["Prompt", "PromptSet", "RegisteredDataset", "load_prompts", "registered_datasets"]

SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the run.

    `text` is what was drawn, whole and without a chat template; `token_ids` is what the model is given,
    without padding. `truncated` says that the ids hold only a part of the text.
    """

    prompt_id: str
    text: str
    token_ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The rows of the run, and the record of where they came from.

    The record's `digest` is sha256 over the rows in order, each as its number of ids and then the ids,
    all as little-endian 32-bit numbers: equal digests mean equal input on any machine.
    """

    prompts: tuple[Prompt, ...]
    input_len: int
    pad_token_id: int
    record: DatasetRecord
    warnings: tuple[str, ...]

    def batch(self, start: int, stop: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """Rows `start` to `stop` as (ids_BT, mask_BT), int64, padded on the left to T = input_len.

        ids_BT, mask_BT = prompts.batch(0, 4)  # both of shape (4, 128) where the input length is 128
        """
        assert 0 <= start < stop <= len(self.prompts), (start, stop, len(self.prompts))
        rows = [prompt.token_ids for prompt in self.prompts[start:stop]]
        return left_padded(rows, self.input_len, self.pad_token_id)


def left_padded(
    rows: Sequence[Sequence[int]], length: int, pad_token_id: int
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Rows of ids as (ids_BT, mask_BT), int64, padded on the left to T = length."""
    import torch

    pads = [length - len(row) for row in rows]
    ids_BT = torch.tensor([[pad_token_id] * pad + [*row] for pad, row in zip(pads, rows, strict=True)])
    mask_BT = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)])
    return ids_BT, mask_BT


def load_prompts(
    *,
    dataset: str,
    num_prompts: int,
    input_len: int,
    prompt_mode: Literal["pad", "fill"],
    prompt_template: str | None,
    chat_template: Literal["auto", "on", "off"],
    tokenizer: Any,
    seed: int,
    vocab_size: int | None = None,
) -> PromptSet:
    """Draw `num_prompts` rows of `input_len` tokens from a dataset.

    `tokenizer` is one of transformers, or None for a model without one: then the ids are the text's UTF-8
    bytes modulo `vocab_size`, which must be given, and a warning says so. Prompts that are empty are
    skipped. Where the dataset has too few, they repeat in order under ids that end in "#2", "#3". Both leave
    a warning, and so do prompts that padded rows hold only a part of. `record.prompts_unique` counts the
    rows made without a repeated prompt. The id of a filled row is that of its first prompt and, after "+",
    the end of that of its last.

    A chat template is applied, with the option `auto`, if the tokenizer has one, the dataset holds
    instructions or chats, and the mode is `pad`: a filled row is many prompts, not one conversation.

    Raises:
        UsageError: what `load_rows` refuses; a template that does not fit the columns; a chat template
            that the tokenizer lacks, the mode excludes or `input_len` cannot hold; no usable prompt.

        prompts = load_prompts(
            dataset="humaneval", num_prompts=8, input_len=128, prompt_mode="pad", prompt_template=None,
            chat_template="auto", tokenizer=tokenizer, seed=0,
        )
        prompts.prompts[0].prompt_id  # 'HumanEval/138'
    """
    for option, value in (("--num-prompts", num_prompts), ("--input-len", input_len)):
        if value < 1:
            raise UsageError(f"{option} is {value}; it must be at least 1")
    rows = load_rows(dataset)
    columns = tuple(rows.table.column_names)
    given = prompt_template
    if given is None and rows.registered:
        given = rows.registered.template
    template = choose_template(columns) if given is None else Template(text=given, columns=columns)
    kind = _kind(rows)
    chat = _use_chat(chat_template, tokenizer, kind, prompt_mode)
    encode = choose_encoder(tokenizer, input_len, vocab_size, chat=chat)
    skipped: list[int] = []
    draw = _draw(rows, template, encode, seed, skipped, strip=kind != "completion")
    drawn = [
        _fill(draw, encode, input_len) if prompt_mode == "fill" else next(draw) for _ in range(num_prompts)
    ]
    prompts = _number([row.prompt for row in drawn])
    unique = sum(not row.repeated for row in drawn)
    cut = sum(prompt.truncated for prompt in prompts)
    real_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    warnings = [*rows.warnings]
    if tokenizer is None:
        warnings.append(f"no tokenizer: token ids are the prompts' UTF-8 bytes modulo {vocab_size}")
    if skipped:
        warnings.append(f"{len(skipped)} rows of {rows.name} hold no prompt and were skipped")
    if unique < num_prompts:
        warnings.append(
            f"{rows.name} has too few prompts: {num_prompts - unique} of {num_prompts} repeat some"
        )
    # A filled row is cut wherever it is full; that is no loss.
    if cut and prompt_mode == "pad":
        warnings.append(f"{cut} of {num_prompts} prompts cut to --input-len {input_len} tokens")
    record = DatasetRecord(
        name=rows.name,
        source=rows.source,
        source_type=rows.source_type,
        config=rows.config,
        split=rows.split,
        revision=rows.revision,
        licence=rows.licence,
        fingerprint=rows.table._fingerprint,
        digest=_digest(prompts),
        num_rows=rows.table.num_rows,
        num_prompts=num_prompts,
        prompts_unique=unique,
        prompts_truncated=cut,
        real_tokens=real_tokens,
        padded_tokens=num_prompts * input_len - real_tokens,
        prompt_mode=prompt_mode,
        prompt_template=template.text,
        chat_template=chat,
        prompt_ids=[prompt.prompt_id for prompt in prompts],
    )
    return PromptSet(
        prompts=prompts,
        input_len=input_len,
        pad_token_id=pad_token_id(tokenizer),
        record=record,
        warnings=tuple(warnings),
    )


def _kind(rows: Rows) -> Kind:
    if rows.registered:
        return rows.registered.kind
    said = {"instruction", *CONVERSATIONS}
    return "instruction" if said & set(rows.table.column_names) else "completion"


def _use_chat(option: str, tokenizer: Any, kind: Kind, prompt_mode: str) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if option == "auto":
        return has_template and kind != "completion" and prompt_mode == "pad"
    if option == "on" and not has_template:
        raise UsageError("the model's tokenizer has no chat template; use --chat-template off")
    if option == "on" and prompt_mode == "fill":
        raise UsageError(
            "a filled row is many prompts, not one conversation; "
            "use --chat-template off, or --prompt-mode pad"
        )
    return option == "on"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    prompt: Prompt
    repeated: bool = False


def _draw(
    rows: Rows, template: Template, encode: Encode, seed: int, skipped: list[int], *, strip: bool
) -> Iterator[_Drawn]:
    """The usable rows in the order of the draw, then the same again and again. Notes what it skips."""
    id_column = rows.registered.id_column if rows.registered else None
    if id_column not in rows.table.column_names:
        id_column = None
    table = rows.table.select_columns(
        [*dict.fromkeys([*template.needed, *([id_column] if id_column else [])])]
    )
    used = []
    for index in _permutation(table.num_rows, seed):
        row = table[index]
        text = template.render(row)
        text = text.strip() if strip else text
        token_ids, truncated = encode(text) if text.strip() else ([], False)
        if not token_ids:
            skipped.append(index)
            continue
        prompt_id = str(row[id_column]) if id_column else f"{rows.name}/{index}"
        prompt = Prompt(prompt_id=prompt_id, text=text, token_ids=tuple(token_ids), truncated=truncated)
        used.append(_Drawn(prompt=prompt))
        yield used[-1]
    if not used:
        raise UsageError(f"no row of {rows.name} gives a prompt by {template.text!r}; see --prompt-template")
    for drawn in itertools.cycle(used):
        yield _Drawn(prompt=drawn.prompt, repeated=True)


def _permutation(num_rows: int, seed: int) -> Iterator[int]:
    """The indices in random order, by Fisher and Yates, in memory and time of those taken only.

    `random()` of a seeded `random.Random` is the one sequence that Python keeps from version to version.
    """
    generator = random.Random(seed)
    moved: dict[int, int] = {}
    for place in range(num_rows):
        pick = place + int(generator.random() * (num_rows - place))
        here = moved.pop(place, place)
        yield here if pick == place else moved.get(pick, pick)
        if pick != place:
            moved[pick] = here


def _fill(draw: Iterator[_Drawn], encode: Encode, input_len: int) -> _Drawn:
    """Join prompts until the row is full. Each row begins with a prompt's beginning."""
    parts: list[_Drawn] = []
    token_ids: list[int] = []
    truncated = False
    at_most = 0
    while len(token_ids) < input_len:
        parts.append(next(draw))
        at_most += len(parts[-1].prompt.token_ids) + len(SEPARATOR)
        if at_most >= input_len:
            text = SEPARATOR.join(part.prompt.text for part in parts)
            token_ids, truncated = encode(text)
    first, last = parts[0].prompt.prompt_id, parts[-1].prompt.prompt_id
    shared = first.rpartition("/")[0] + "/"
    prompt_id = first if len(parts) == 1 else f"{first}+{last.removeprefix(shared)}"
    prompt = Prompt(prompt_id=prompt_id, text=text, token_ids=tuple(token_ids), truncated=truncated)
    return _Drawn(prompt=prompt, repeated=any(part.repeated for part in parts))


def _number(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The same prompts, with "#2" and so on after an id that was there before."""
    seen: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        seen[prompt.prompt_id] += 1
        count = seen[prompt.prompt_id]
        suffix = f"#{count}" if count > 1 else ""
        numbered.append(dataclasses.replace(prompt, prompt_id=prompt.prompt_id + suffix))
    return tuple(numbered)


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(struct.pack(f"<{1 + len(prompt.token_ids)}I", len(prompt.token_ids), *prompt.token_ids))
    return digest.hexdigest()
