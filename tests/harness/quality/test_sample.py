"""The sample: windows that any run of the same shape gets, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexllmgen.errors import UsageError
from harness.quality import sample
from harness.quality.figures import match_tokens
from harness.quality.sample import cut_windows, draw_sample, window_shape
from harness.quality.words import changes_kv, loss_tags, losses


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Words:
    """A tokenizer of single characters, with or without a token that begins a text."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*([self.bos_token_id] if self.bos_token_id else []), *map(ord, text)]}


@pytest.mark.parametrize("input_len", [3, 4, 24, 128, 512, 8000])
def test_a_window_has_room_in_the_runs_engine(input_len: int) -> None:
    prompt, length = window_shape(input_len)
    assert 1 <= prompt < length - 1
    assert length <= min(input_len, sample.MAX_WINDOW_TOKENS)


@pytest.mark.parametrize("input_len", [1, 2])
def test_too_short_a_run_has_no_window(input_len: int) -> None:
    with pytest.raises(UsageError, match="too short"):
        window_shape(input_len)


def test_windows_follow_one_another_and_begin_as_texts_do() -> None:
    text = "abcdefghijkl"
    plain = cut_windows(Words(None), text, 3, 4)
    assert ["".join(map(chr, window)) for window in plain] == ["abcd", "efgh", "ijkl"]
    begun = cut_windows(Words(7), text, 3, 5)
    assert [window[0] for window in begun] == [7, 7, 7]
    assert ["".join(map(chr, window[1:])) for window in begun] == ["abcd", "efgh", "ijkl"]
    # A short text gives fewer; one that fills none is refused.
    assert len(cut_windows(Words(None), text, 9, 5)) == 2
    with pytest.raises(UsageError, match="a window takes 13"):
        cut_windows(Words(None), text, 1, 13)


def test_runs_of_a_shape_have_the_same_sample(tiny_tokenizer: Any) -> None:
    one, same = (draw_sample(tiny_tokenizer, input_len=40, batch_size=2) for _ in range(2))
    assert one == same
    assert (one.text, one.split) == ("humaneval", "test")
    assert len(one.windows) == 8
    fewer = draw_sample(tiny_tokenizer, input_len=40, batch_size=1)
    assert fewer.windows == one.windows[:4]
    assert fewer.digest != one.digest
    assert one.scored_tokens == 8 * one.scored


def test_wikitext_goes_first_where_it_can_be_had(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def rows(name: str) -> Any:
        asked.append(name)
        table = {"text": ["", " = Title = \n", "A paragraph of some length. " * 9]}
        return SimpleNamespace(name=name, split="test", revision="abc", table=table)

    monkeypatch.setattr(sample, "load_rows", rows)
    drawn = draw_sample(tiny_tokenizer, input_len=20, batch_size=1)
    assert (asked, drawn.text, drawn.revision) == (["wikitext"], "wikitext", "abc")
    begun = tiny_tokenizer.decode(drawn.windows[0])
    assert begun.startswith(" = Title = \n\nA parag")


def test_without_any_text_all_reasons_are_told(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise UsageError(f"no {name}")

    monkeypatch.setattr(sample, "load_rows", refuse)
    with pytest.raises(UsageError, match="no wikitext; no humaneval"):
        draw_sample(tiny_tokenizer, input_len=20, batch_size=1)


def test_tokens_are_compared_by_position() -> None:
    found = match_tokens([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [9, 5, 6], [0, 0, 0]])
    assert (found.share, found.prefix_tokens, found.sequences, found.tokens) == (5 / 6, 1.5, 2, 6)


def test_only_what_changes_the_kv_is_scored_step_by_step() -> None:
    assert not changes_kv({"policy": {"weight_bits": 4, "kv_bits": None}})
    assert not changes_kv({"quantize": "int4"})
    assert changes_kv({"policy": {"kv_bits": 8}})
    assert changes_kv({"policy": {"attn_sparsity": 0.1}})
    assert changes_kv({})  # A strategy that says nothing of it.


def test_a_lossy_plan_reads_in_words() -> None:
    policy = {
        "weight_bits": 8,
        "weight_group_size": 128,
        "kv_bits": 4,
        "kv_group_size": 64,
        "attn_sparsity": 0.1,
    }
    plan = {"lossless": False, "policy": policy}
    assert losses(plan) == (
        "weights in 8 bits (groups of 128), KV cache in 4 bits (groups of 64), attention reads 10% of the values"
    )
    assert loss_tags(plan) == {"lossy": "true", "weight_bits": "8", "kv_bits": "4", "attn_sparsity": "0.1"}
    # A record of before is of a lossless run, whatever its policy holds.
    assert (losses({"policy": {}}), loss_tags({"policy": {}})) == ("", {})
