"""Every family, placement and cut gives transformers' tokens, and its logits to 1e-4."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, TinyModel, prompts

from flexllmgen.engine import FlexEngine
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.workload import Workload

SEQUENCES, PROMPT, TOKENS = 6, 9, 6
MIXED = Placement(gpu=0.3, cpu=0.4, disk=0.3)

PLACEMENTS: dict[str, dict[str, Placement]] = {
    "device": {},
    "host": {"weights": ON_CPU, "kv_cache": ON_CPU, "activations": ON_CPU},
    "disk": {"weights": ON_DISK, "kv_cache": ON_DISK, "activations": ON_DISK},
    "mixed-weights": {"weights": MIXED},
    "mixed-kv": {"kv_cache": MIXED},
    "mixed-activations": {"activations": MIXED},
    "mixed-all": {"weights": MIXED, "kv_cache": MIXED, "activations": MIXED},
}


@dataclass
class Recorder:
    """Greedy, keeping the logits it saw."""

    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    seen: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def pick(self, logits_BV: torch.Tensor, first_sequence: int, token: int) -> torch.Tensor:
        self.seen[token, first_sequence] = logits_BV.clone()
        return logits_BV.argmax(dim=-1)

    def logits(self) -> torch.Tensor:
        tokens = sorted({token for token, _ in self.seen})
        rows = [
            torch.cat([self.seen[key] for key in sorted(self.seen) if key[0] == token]) for token in tokens
        ]
        return torch.stack(rows, dim=1)


def check(model: TinyModel, policy: Policy, tmp_path: Path, *, padded: bool, **load: Any) -> None:
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    want, want_logits = model.greedy(ids, mask, TOKENS)
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    recorder = Recorder()
    with FlexEngine.load(
        model.spec, model.checkpoint, policy, workload=workload, device="cpu", offload_dir=tmp_path, **load
    ) as engine:
        got = torch.stack(list(engine.generate(ids, mask, sampling=recorder)), dim=1)
    torch.testing.assert_close(recorder.logits(), want_logits, atol=1e-4, rtol=0)
    assert torch.equal(got, want)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", TINY)
def test_tokens_and_logits_are_those_of_transformers(
    tiny: Any, tmp_path: Path, name: str, placement: str, micro_batches: int, padded: bool
) -> None:
    policy = Policy(
        micro_batch_size=SEQUENCES // micro_batches, num_micro_batches=micro_batches, **PLACEMENTS[placement]
    )
    check(tiny(name), policy, tmp_path, padded=padded)


@pytest.mark.parametrize("overlap", [0, 1, 2, 3])
@pytest.mark.parametrize("sep_layer", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["opt-350m", "llama3", "mixtral"])
def test_depth_halves_and_copies_change_nothing(
    tiny: Any, tmp_path: Path, name: str, in_place: bool, sep_layer: bool, overlap: int
) -> None:
    policy = Policy(
        micro_batch_size=2,
        num_micro_batches=3,
        overlap=overlap,
        sep_layer=sep_layer,
        **PLACEMENTS["mixed-all"],
    )
    check(tiny(name), policy, tmp_path, padded=True, in_place=in_place)


@pytest.mark.parametrize("placement", ["host", "mixed-all"])
def test_a_copying_cpu_stands_in_for_an_accelerator(tiny: Any, tmp_path: Path, placement: str) -> None:
    for micro_batches in (1, 2):
        policy = Policy(
            micro_batch_size=SEQUENCES // micro_batches,
            num_micro_batches=micro_batches,
            **PLACEMENTS[placement],
        )
        check(tiny("qwen3"), policy, tmp_path, padded=True, in_place=False)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    "kv_cache", [ON_CPU, Placement(gpu=0.5, cpu=0.5), MIXED], ids=["host", "half", "mixed"]
)
@pytest.mark.parametrize("name", ["opt", "opt-350m", "llama3", "mistral", "qwen3-moe"])
def test_attention_where_the_kv_lies(
    tiny: Any, tmp_path: Path, name: str, kv_cache: Placement, padded: bool
) -> None:
    for micro_batch, overlap, sep_layer in ((6, 1, False), (2, 0, False), (2, 2, True), (4, 1, False)):
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=-(-SEQUENCES // micro_batch),
            overlap=overlap,
            sep_layer=sep_layer,
            weights=MIXED,
            kv_cache=kv_cache,
            cpu_attention=True,
        )
        check(tiny(name), policy, tmp_path, padded=padded, in_place=False)
