"""What lossy settings cost the built-in model, beside FlexGen's rule at the same bits; and that the rule is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quality
import torch
from tiny_models import TinyModel, make_tiny

from flexllmgen.spec import ModelSpec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


def tiny_text() -> quality.Text:
    ids = torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(0))
    return quality.Text(windows=ids, prompts=ids[:2, :12], scored=11, gen_tokens=4)


def test_the_rule_rounds_each_group_between_its_least_and_greatest() -> None:
    x = torch.linspace(-1, 2, 3 * 64).view(3, 64)
    got = quality.rounded(x, 4, 1)
    # 15 steps of a group's own span, so that nothing is off by more than half of one.
    spans = (x.amax(1) - x.amin(1)) / 15
    assert ((got - x).abs().amax(1) <= 0.51 * spans + 1e-3).all()
    assert all(len(row.unique()) == 16 for row in got)
    # Along the other dimension each column is a group of its own, of three numbers.
    assert (quality.rounded(x, 4, 0) - x).abs().max() <= 0.51 * (x[2] - x[0]).max() / 15 + 1e-3


@pytest.mark.parametrize("what", ["rule_weight_bits", "rule_kv_bits"])
def test_the_rule_with_many_bits_changes_nothing_and_with_few_does(tiny: TinyModel, what: str) -> None:
    text = tiny_text()

    def loss(**bits: int) -> float:
        setting = quality.Setting(name="", policy={}, **bits)
        return quality.measure(setting, tiny.spec, tiny.folder, text, device="cpu", dtype="float32")[0]

    plain = loss()
    assert loss(**{what: 14}) == pytest.approx(plain, abs=2e-3)
    assert abs(loss(**{what: 3}) - plain) > 5e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_rounded_once_are_those_turned_back_at_each_pass(tiny: TinyModel, bits: int) -> None:
    setting = quality.Setting(name="", policy={"weight_bits": bits, "kv_bits": 8})

    def measured(*, once: bool) -> tuple[float, Any]:
        return quality.measure(
            setting, tiny.spec, tiny.folder, tiny_text(), device="cpu", dtype="float32", rounded_once=once
        )

    assert measured(once=True) == measured(once=False)
    plain = quality.Setting(name="", policy={"kv_bits": 8})
    there = quality.measure(plain, tiny.spec, tiny.folder, tiny_text(), device="cpu", dtype="float32")
    assert there[0] != measured(once=True)[0]


def test_the_rules_cache_leaves_the_prompt_to_itself(tiny: TinyModel) -> None:
    """Of its scores, those within the prompt are the plain model's; later ones are not."""
    from flexllmgen.engine import FlexEngine
    from flexllmgen.policy import Policy
    from flexllmgen.workload import Workload

    text = tiny_text()
    workload = Workload(num_sequences=3, prompt_tokens=24, gen_tokens=1)
    with FlexEngine.load(
        tiny.spec, tiny.checkpoint, Policy(micro_batch_size=3), workload=workload, device="cpu"
    ) as engine:
        plain = engine.score(text.windows)
        with quality.rule_attention(3, text.prompt_tokens):
            ruled = engine.score(text.windows)
        assert torch.equal(engine.score(text.windows), plain)
    torch.testing.assert_close(
        ruled[:, : text.prompt_tokens], plain[:, : text.prompt_tokens], atol=1e-5, rtol=0
    )
    assert (ruled[:, text.prompt_tokens :] - plain[:, text.prompt_tokens :]).abs().max() > 1e-2


WANTED = (
    "lossless",
    "weights 8 bit",
    "weights 4 bit",
    "FlexGen's rule, weights 4 bit",
    "KV 8 bit",
    "KV 4 bit",
    "FlexGen's rule, KV 4 bit",
)


def test_lossy_settings_of_the_builtin_model(builtin_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits: perplexity within 1 %. 4 bits: no worse than FlexGen's rule."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = ModelSpec.from_hf_config(json.loads((builtin_model / "config.json").read_text()), "builtin")
    text, told = quality.draw_text(builtin_model, 4, 96, 32, 1, 1)
    assert told["scored_tokens"] == 4 * 32
    chosen = [row for row in quality.settings() if row.name in WANTED]
    rows: list[dict[str, Any]] = quality.run(
        chosen, spec, builtin_model, text, device="cpu", dtype="float32", tell=print
    )
    over = {row["setting"]: row["over_lossless"] for row in rows}
    assert set(over) == set(WANTED)
    assert abs(over["weights 8 bit"]) < 0.01
    assert abs(over["KV 8 bit"]) < 0.01
    assert over["weights 4 bit"] <= over["FlexGen's rule, weights 4 bit"]
    assert over["KV 4 bit"] <= over["FlexGen's rule, KV 4 bit"]
