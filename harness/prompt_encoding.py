"""How a prompt's text becomes token ids: raw, under a chat template, or as bytes.

A text that is too long keeps its beginning. Under a chat template it is the user's text that is cut, so
that the end of the template, where the assistant begins, survives. Knows nothing of datasets.
"""

import functools
from collections.abc import Callable
from typing import Any

from flexllmgen.errors import UsageError

Encode = Callable[[str], tuple[list[int], bool]]


def pad_token_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's own, or its end of text, or 0; padding is masked anyway."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token_id for token_id in ids if token_id is not None), 0)


def choose_encoder(tokenizer: Any, input_len: int, vocab_size: int | None, *, chat: bool) -> Encode:
    """What turns a text into at most `input_len` token ids, and says whether it had to cut.

    Raises (when called with a text):
        UsageError: `input_len` holds no more than special tokens or the chat template.

    >>> choose_encoder(None, 4, 50272, chat=False)("prompt")
    ([112, 114, 111, 109], True)
    """
    if tokenizer is None:
        assert vocab_size, "without a tokenizer, vocab_size says which ids there are"
        return functools.partial(_encode_bytes, input_len=input_len, vocab_size=vocab_size)
    encode = _encode_chat if chat else _encode_raw
    return functools.partial(encode, tokenizer=tokenizer, input_len=input_len)


def _encode_bytes(text: str, *, input_len: int, vocab_size: int) -> tuple[list[int], bool]:
    token_ids = [byte % vocab_size for byte in text.encode()]
    return token_ids[:input_len], len(token_ids) > input_len


def _encode_raw(text: str, *, tokenizer: Any, input_len: int) -> tuple[list[int], bool]:
    """The ids of a text with the tokenizer's special tokens; a long text keeps its beginning."""
    num_special = tokenizer.num_special_tokens_to_add()
    token_ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(token_ids) <= num_special:
        return [], False
    if len(token_ids) <= input_len:
        return token_ids, False
    if input_len <= num_special:
        raise UsageError(f"--input-len {input_len} has room for special tokens only; they are {num_special}")
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        return tokenizer(text, truncation=True, max_length=input_len, verbose=False)["input_ids"], True
    finally:
        tokenizer.truncation_side = side


def _encode_chat(text: str, *, tokenizer: Any, input_len: int) -> tuple[list[int], bool]:
    """The ids of a conversation's beginning; of a long text, tokens are dropped from the user's end."""
    token_ids = _apply_chat_template(text, tokenizer)
    if len(token_ids) <= input_len:
        return token_ids, False
    user = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    keep = len(user["input_ids"])
    # Cutting can change how the remaining text is split into tokens, hence the repetition.
    while len(token_ids) > input_len and keep > 0:
        keep = max(0, keep - (len(token_ids) - input_len))
        if tokenizer.is_fast:
            kept = text[: user["offset_mapping"][keep - 1][1]] if keep else ""
        else:
            kept = tokenizer.decode(user["input_ids"][:keep])
        token_ids = _apply_chat_template(kept, tokenizer)
    if keep == 0:
        raise UsageError(
            f"--input-len {input_len} leaves no room for the user's text: the chat template alone takes "
            f"{len(token_ids)} tokens; raise it, or use --chat-template off"
        )
    return token_ids, True


def _apply_chat_template(text: str, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    conversation = [{"role": "user", "content": text}]
    try:
        whole = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UsageError(
            f"the chat template refuses a user's text: {error}; use --chat-template off"
        ) from error
    # The template has written the special tokens itself.
    token_ids: list[int] = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    return token_ids
