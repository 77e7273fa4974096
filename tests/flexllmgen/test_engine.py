"""Generation, scoring and sampling beyond parity: stops, seeds, ragged blocks, what is read back."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, prompts

from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import PlanInfeasible, PolicyError, UsageError
from flexllmgen.graph import RecordedDecode
from flexllmgen.policy import ON_CPU, ON_DISK, ON_GPU, Placement, Policy
from flexllmgen.sampling import Greedy, SamplingParams
from flexllmgen.spec import OPT_125M
from flexllmgen.workload import Workload

PROMPT, TOKENS = 9, 8
MIXED = Placement(gpu=0.3, cpu=0.4, disk=0.3)
POLICIES = {
    "plain": Policy(micro_batch_size=6),
    "mixed": Policy(
        micro_batch_size=2, num_micro_batches=3, weights=MIXED, kv_cache=MIXED, activations=MIXED
    ),
    "in turn": Policy(micro_batch_size=4, num_micro_batches=2, weights=ON_CPU, kv_cache=ON_DISK, overlap=0),
}


def load(model: TinyModel, policy: Policy, folder: Path, count: int = 6, **options: Any) -> FlexEngine:
    workload = Workload(num_sequences=count, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    return FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device="cpu",
        offload_dir=folder,
        **options,
    )


def columns(
    engine: FlexEngine, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    return torch.stack(list(engine.generate(ids, mask, **options)), dim=1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stop_id_ends_its_sequence_and_the_last_ends_the_block(
    tiny: Any, tmp_path: Path, policy: str
) -> None:
    model = tiny("llama")
    ids, mask = prompts(6, PROMPT, padded=True)
    with load(model, POLICIES[policy], tmp_path) as engine:
        free = columns(engine, ids, mask)
        # Every row's third token is a stop: all rows have ended by the third column, if not before.
        stops = tuple(free[:, 2].tolist())
        got = columns(engine, ids, mask, sampling=Greedy(stop_ids=stops, pad_id=7))
        assert got.shape[1] <= 3
        for row in range(6):
            ends = [at for at in range(got.shape[1]) if int(free[row, at]) in stops]
            assert got[row, : ends[0] + 1].tolist() == free[row, : ends[0] + 1].tolist()
            assert set(got[row, ends[0] + 1 :].tolist()) <= {7}
        # The engine is as good as new after an early end.
        assert torch.equal(columns(engine, ids, mask), free)


def test_token_zero_can_be_a_stop(tiny: Any, tmp_path: Path) -> None:
    model = tiny("opt")
    ids, _ = prompts(2, PROMPT, padded=False)

    class Zeros(Greedy):
        def pick(self, logits_BV: torch.Tensor, first_sequence: int, token: int) -> torch.Tensor:
            return torch.zeros(len(logits_BV), dtype=torch.int64)

    with load(model, Policy(micro_batch_size=2), tmp_path, 2) as engine:
        assert columns(engine, ids, sampling=Zeros(stop_ids=(0,))).shape[1] == 1
        assert columns(engine, ids, sampling=Zeros()).shape[1] == TOKENS


def test_a_consumer_may_stop_early(tiny: Any, tmp_path: Path) -> None:
    ids, mask = prompts(6, PROMPT, padded=True)
    with load(tiny("opt"), POLICIES["mixed"], tmp_path) as engine:
        want = columns(engine, ids, mask)
        for taken in (1, 3):
            stream = engine.generate(ids, mask)
            for _ in range(taken):
                next(stream)
            stream.close()
            assert torch.equal(columns(engine, ids, mask), want)


def test_a_seed_decides_the_draw_and_the_policy_does_not(tiny: Any, tmp_path: Path) -> None:
    model = tiny("qwen2")
    ids, mask = prompts(6, PROMPT, padded=True)
    drawn = {}
    for seed in (1, 2):
        sampling = SamplingParams(temperature=1.3, top_k=20, top_p=0.9, seed=seed)
        for name, policy in POLICIES.items():
            with load(model, policy, tmp_path) as engine:
                drawn[seed, name] = columns(engine, ids, mask, sampling=sampling)
        assert torch.equal(drawn[seed, "plain"], drawn[seed, "mixed"])
        assert torch.equal(drawn[seed, "plain"], drawn[seed, "in turn"])
    assert not torch.equal(drawn[1, "plain"], drawn[2, "plain"])


def test_draws_follow_the_truncated_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).expand(20000, 4)
    likely = logits[0].softmax(-1)
    drawn = SamplingParams(seed=3).pick(logits, 0, 0).bincount(minlength=4) / 20000
    torch.testing.assert_close(drawn, likely, atol=0.02, rtol=0)
    two = SamplingParams(seed=3, top_k=2).pick(logits, 0, 0).bincount(minlength=4) / 20000
    torch.testing.assert_close(
        two, torch.tensor([*(likely[:2] / likely[:2].sum()), 0.0, 0.0]), atol=0.02, rtol=0
    )
    # 0.58 alone does not reach 0.7: the second stays too, the third does not.
    nucleus = SamplingParams(seed=3, top_p=0.7).pick(logits, 0, 0).bincount(minlength=4)
    assert nucleus[2:].sum() == 0
    assert nucleus[1] > 0
    assert SamplingParams(temperature=0).pick(logits, 0, 0).unique().tolist() == [0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["opt-350m", "llama3", "mixtral", "mistral"])
@pytest.mark.parametrize(("length", "prompt"), [(PROMPT, None), (PROMPT + TOKENS, PROMPT), (PROMPT, 7)])
def test_scores_are_log_probabilities(
    tiny: Any, tmp_path: Path, name: str, policy: str, length: int, prompt: int | None
) -> None:
    model = tiny(name)
    ids, mask = prompts(10, PROMPT, padded=True)
    more, _ = prompts(10, length - PROMPT, padded=False, seed=1)
    ids = torch.cat((ids, more), dim=1)
    assert mask is not None
    mask = torch.cat((mask, torch.ones_like(more)), dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = model.model(ids, attention_mask=mask, position_ids=places).logits
    want = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * (mask[:, 1:] & mask[:, :-1])
    with load(model, POLICIES[policy], tmp_path) as engine:
        torch.testing.assert_close(engine.score(ids, mask, prompt_tokens=prompt), want, atol=1e-4, rtol=0)


def test_the_last_block_may_be_ragged(tiny: Any, tmp_path: Path) -> None:
    model = tiny("qwen3")
    ids, mask = prompts(6, PROMPT, padded=True)
    assert mask is not None
    with load(model, POLICIES["mixed"], tmp_path) as engine:
        whole = columns(engine, ids, mask)
        for count in (5, 3, 2, 1):
            assert torch.equal(columns(engine, ids[:count], mask[:count]), whole[:count])


def test_shorter_prompts_and_generations_than_planned_are_served(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama3")
    ids, mask = prompts(6, 5, padded=True)
    want, _ = model.greedy(ids, mask, 4)
    with load(model, POLICIES["mixed"], tmp_path) as engine:
        assert torch.equal(columns(engine, ids, mask, max_new_tokens=4), want)


@pytest.mark.parametrize("weights", [ON_GPU, ON_CPU, MIXED], ids=["device", "host", "mixed"])
@pytest.mark.parametrize("name", ["opt-350m", "llama3", "qwen3"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_recordable_step_computes_the_same(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    micro_batches: int,
    weights: Placement,
) -> None:
    """What CUDA graphs would replay, run as it is: fixed shapes, everything else in buffers."""
    recorded: set[Hashable] = set()

    def run(_: RecordedDecode, key: Hashable, work: Callable[[], None]) -> None:
        recorded.add(key)
        work()

    monkeypatch.setattr(RecordedDecode, "run", run)
    model = tiny(name)
    policy = Policy(micro_batch_size=6 // micro_batches, num_micro_batches=micro_batches, weights=weights)
    with load(model, policy, tmp_path, in_place=False) as engine:
        engine._parts.executor._recording = engine.placement.recording
        for count, length, padded in ((6, PROMPT, False), (6, 7, True), (5, PROMPT, True)):
            ids, mask = prompts(count, length, padded=padded, seed=length)
            want, _ = model.greedy(ids, mask, TOKENS)
            assert torch.equal(columns(engine, ids, mask), want)
    if weights == ON_GPU:
        assert recorded == {"advance", "step"}
    else:
        layers = {key[:2] for key in recorded if isinstance(key, tuple)}
        assert layers == {
            (stage, batch) for stage in range(1, 1 + model.spec.num_layers) for batch in range(micro_batches)
        }


@pytest.mark.parametrize("policy", POLICIES)
def test_skipped_positions_leave_nothing_behind(tiny: Any, tmp_path: Path, policy: str) -> None:
    """What a probe runs: steps at a context that was never computed."""
    model = tiny("llama3")
    ids, mask = prompts(6, PROMPT, padded=True)
    with load(model, POLICIES[policy], tmp_path) as engine:
        want = columns(engine, ids, mask)
        before = engine.stats().disk_read_bytes
        steps = list(engine._generate(ids[:, :1], None, Greedy(), 4, skipped=PROMPT - 1))
        assert len(steps) == 4
        if engine.placement.kv_cache.disk:
            # Three steps read the KV of ten positions and more.
            read = engine.stats().disk_read_bytes - before
            assert read > 3 * engine.placement.kv_cache.disk // engine.placement.max_context * PROMPT
        assert torch.equal(columns(engine, ids, mask), want)


def test_what_is_placed_is_what_is_held(tiny: Any, tmp_path: Path) -> None:
    ids, _ = prompts(6, PROMPT, padded=False)
    with load(tiny("opt"), POLICIES["mixed"], tmp_path) as engine:
        plan, stats = engine.placement, engine.stats()
        assert stats.disk_bytes >= plan.disk_bytes
        assert stats.host_bytes >= plan.weights.cpu + plan.kv_cache.cpu
        columns(engine, ids)
        after = engine.stats()
        # Each of eight passes reads all that lies on disk.
        assert after.disk_read_bytes - stats.disk_read_bytes >= TOKENS * plan.weights.disk
        assert after.disk_write_bytes > 0
    assert not list(tmp_path.glob(".kv*")), "scratch files are gone"


def test_mistakes_are_told(tiny: Any, tmp_path: Path) -> None:
    model = tiny("opt")
    ids, _ = prompts(6, PROMPT, padded=False)
    with load(model, POLICIES["plain"], tmp_path) as engine:
        with pytest.raises(UsageError, match="7 sequences do not fit a block of 6"):
            engine.generate(torch.cat((ids, ids[:1])))
        with pytest.raises(UsageError, match="do not fit a workload of 9 and 8"):
            engine.generate(ids, max_new_tokens=40)
        with pytest.raises(UsageError, match="pad on the left"):
            engine.generate(ids, torch.cat((torch.ones(6, PROMPT - 1), torch.zeros(6, 1)), dim=1))
    with pytest.raises(UsageError, match="closed"):
        engine.generate(ids)
    with pytest.raises(PolicyError, match="offload directory"):
        FlexEngine.load(
            model.spec,
            model.checkpoint,
            POLICIES["mixed"],
            workload=Workload(num_sequences=6, prompt_tokens=9, gen_tokens=8),
            device="cpu",
        )


def test_a_plan_that_does_not_fit_loads_nothing(tmp_path: Path) -> None:
    workload = Workload(num_sequences=4, prompt_tokens=32, gen_tokens=8)
    policy = Policy(micro_batch_size=4, weights=ON_CPU)
    with pytest.raises(PlanInfeasible, match=r"GiB of host memory"):
        FlexEngine.load(
            OPT_125M, RandomCheckpoint(), policy, workload=workload, device="cpu", cpu_bytes=100 << 20
        )


def test_random_weights_do_not_depend_on_the_policy(tmp_path: Path) -> None:
    workload = Workload(num_sequences=2, prompt_tokens=8, gen_tokens=4)
    ids = torch.randint(5, 50000, (2, 8), generator=torch.Generator().manual_seed(0))
    got = []
    for weights in (Placement(gpu=1.0), Placement(gpu=0.2, cpu=0.5, disk=0.3)):
        policy = Policy(micro_batch_size=2, weights=weights)
        with FlexEngine.load(
            OPT_125M, RandomCheckpoint(seed=5), policy, workload=workload, device="cpu", offload_dir=tmp_path
        ) as engine:
            got.append(columns(engine, ids))
    assert torch.equal(*got)
