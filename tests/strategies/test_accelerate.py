"""Strategy accelerate: the plan's numbers, the placement they become, and the engine behind them."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllmgen.errors import PlanInfeasible, UsageError
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from harness.models import resolve_model
from strategies.accelerate import AccelerateStrategy, create, kv_bytes_per_token
from strategies.accelerate_config import Config
from strategies.accelerate_layers import PassTimes
from strategies.accelerate_load import WeightSizes, meta_model, model_config, no_split_classes, tier_of
from strategies.base import Machine, ModelSource, PlanRequest

TIED = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 300,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FAMILIES = {"llama, tied": TIED, "llama": {**TIED, "tie_word_embeddings": False}, "opt": OPT}

# What a plan sets aside on a GPU for the libraries, at this size of GPU.
ROOM_FOR_CUDA = (96 << 20) * 10 // 9

Request = Callable[..., PlanRequest]


def config(**changes: Any) -> Config:
    values = {
        "enable_offload": True,
        "enable_kv_offload": False,
        "quantize": "none",
        "attn_implementation": "auto",
    }
    return Config(**{**values, **changes})


def source_of(family: str) -> ModelSource:
    return ModelSource(name=family, path=None, config=FAMILIES[family], weights="random")


@pytest.fixture
def request_for(tmp_path: Path) -> Request:
    """A request on a machine without a GPU; `cpu_bytes` caps its memory."""

    def make(
        source: ModelSource,
        *,
        cpu_bytes: int = 2**33,
        batch_size: int = 2,
        dtype: str = "float32",
        seed: int = 0,
    ) -> PlanRequest:
        return PlanRequest(
            model=source,
            workload=Workload(num_sequences=4, prompt_tokens=12, gen_tokens=5),
            batch_size=batch_size,
            dtype=dtype,
            machine=Machine(
                device="cpu",
                gpu_bytes=None,
                cpu_bytes=cpu_bytes,
                gpu_capped=False,
                cpu_capped=True,
                offload_dir=tmp_path / "offload",
            ),
            seed=seed,
        )

    return make


def on_emulated_gpu(request: PlanRequest, gpu_bytes: int, cpu_bytes: int) -> PlanRequest:
    """The same request on the CPU under both caps."""
    machine = dataclasses.replace(request.machine, gpu_bytes=gpu_bytes, gpu_capped=True, cpu_bytes=cpu_bytes)
    return dataclasses.replace(request, machine=machine)


def on_gpu(request: PlanRequest, gpu_bytes: int, cpu_bytes: int = 2**33) -> PlanRequest:
    """The same request for a machine with a GPU; planning needs none."""
    machine = dataclasses.replace(
        request.machine, device="cuda", gpu_bytes=gpu_bytes, gpu_capped=True, cpu_bytes=cpu_bytes
    )
    return dataclasses.replace(request, machine=machine)


def test_on_the_cpu_both_caps_hold_as_one(request_for: Request) -> None:
    one = create(config()).plan(request_for(source_of("llama"), cpu_bytes=300_000))
    two = create(config()).plan(
        on_emulated_gpu(request_for(source_of("llama")), gpu_bytes=100_000, cpu_bytes=200_000)
    )
    assert one.weight_bytes["disk"] > 0
    assert (two.weight_bytes, two.details, two.warnings) == (one.weight_bytes, one.details, one.warnings)
    assert sum(two.peak_bytes[tier] for tier in ("gpu", "cpu")) <= 300_000
    assert two.as_dict()["cpu_cap_bytes"] == 300_000
    with pytest.raises(PlanInfeasible):
        create(config()).plan(
            on_emulated_gpu(request_for(source_of("llama")), gpu_bytes=30_000, cpu_bytes=30_000)
        )


# Prediction


class _Timed:
    """Layers of known times; a prompt of so many rows takes a hundredth of a second each."""

    def __init__(self, _config: Any, spec: ModelSpec, dtype: str, device: str) -> None:
        assert (spec.num_layers, dtype, device) == (3, "float32", "cpu")

    def __enter__(self) -> "_Timed":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prompt(self, batch: int, tokens: int) -> PassTimes:
        return PassTimes(layer_s=0.01 * batch * tokens, rest_s=0.5)

    def step(self, batch: int, cached: int) -> PassTimes:
        assert cached == 12 + 2
        return PassTimes(layer_s=0.02 * batch, rest_s=0.25)


def predictable(request: PlanRequest, profile: Any) -> PlanRequest:
    spec = ModelSpec.from_hf_config(request.model.config)
    return dataclasses.replace(request, spec=spec, profile=profile)


def test_a_prediction_adds_up_layers_rest_and_what_is_fetched(
    request_for: Request, laptop_profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.accelerate_cost.FewLayers", _Timed)
    request = predictable(request_for(source_of("llama"), cpu_bytes=300_000), laptop_profile)
    plan = create(config()).plan(request)
    assert plan.predicted is not None
    # Four sequences in batches of two, prompts of 12 tokens, 5 generated; read through the page cache.
    fetch_s = plan.weight_bytes["disk"] / laptop_profile.typical.cached_file_bytes_per_s
    assert fetch_s > 0
    assert plan.predicted.prefill_s == pytest.approx(2 * (3 * 0.24 + 0.5 + fetch_s))
    assert plan.predicted.decode_s == pytest.approx(2 * 4 * (3 * 0.04 + 0.25 + fetch_s))
    assert plan.predicted.decode_busy_s["fetching weights"] == pytest.approx(8 * fetch_s)


def test_where_a_layer_cannot_be_timed_there_is_no_prediction(
    request_for: Request, laptop_profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("strategies.accelerate_cost.FewLayers", full)
    plan = create(config()).plan(predictable(request_for(source_of("llama")), laptop_profile))
    assert plan.predicted is None
    assert plan.limit is not None
    assert any("no prediction" in warning for warning in plan.warnings)


# Sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_parameters(family: str) -> None:
    model = meta_model(source_of(family), "float32", "auto")
    assert all(weight.device.type == "meta" for weight in model.parameters())
    sizes = WeightSizes.of(model, bits=None)
    assert sizes.total == sum(weight.numel() * 4 for weight in model.parameters())
    assert (
        WeightSizes.of(meta_model(source_of(family), "bfloat16", "auto"), bits=None).total * 2 == sizes.total
    )
    layer = sum(weight.nbytes for name, weight in model.named_parameters() if "layers.0." in name)
    assert sizes.largest_block[1] >= layer


def test_tied_weights_count_once() -> None:
    tied = WeightSizes.of(meta_model(source_of("llama, tied"), "float32", "auto"), bits=None)
    untied = WeightSizes.of(meta_model(source_of("llama"), "float32", "auto"), bits=None)
    assert untied.total - tied.total == 300 * 64 * 4


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_narrow_and_the_rest_is_not(bits: int) -> None:
    model = meta_model(source_of("llama"), "float32", "auto")
    sizes = WeightSizes.of(model, bits=bits)
    linear = "model.layers.0.mlp.up_proj.weight"
    assert sizes.weights[linear] == 64 * 128 * bits // 8
    assert sizes.weights["model.embed_tokens.weight"] == 300 * 64 * 4
    assert sizes.weights["lm_head.weight"] == 300 * 64 * 4


def test_bytes_by_tier_follow_the_longest_name_in_the_map() -> None:
    model = meta_model(source_of("llama"), "float32", "auto")
    sizes = WeightSizes.of(model, bits=None)
    tiers = sizes.by_tier({"": "cpu", "model.layers.1": "disk", "model.layers.1.mlp": 0})
    mlp = 3 * 64 * 128 * 4
    layer = sum(size for name, size in sizes.weights.items() if "layers.1." in name)
    assert tiers == {"gpu": mlp, "cpu": sizes.total - layer, "disk": layer - mlp}
    assert [tier_of(place) for place in (0, "cpu", "disk", 1)] == ["gpu", "cpu", "disk", "gpu"]


def test_kv_cache_bytes() -> None:
    """2 x layers x KV heads x head size x bytes; OPT-125m's figure is that of FlexGen's paper's formula."""
    from flexllmgen.models.published import published_config

    opt = model_config(
        ModelSource(name="m", path=None, config=published_config("facebook/opt-125m"), weights="random")
    )
    assert kv_bytes_per_token(opt, "float16") == 2 * 12 * 12 * 64 * 2
    assert kv_bytes_per_token(model_config(source_of("llama")), "float32") == 2 * 3 * 2 * 16 * 4


# Plans


def test_what_fits_stays_whole(request_for: Request) -> None:
    plan = create(config()).plan(request_for(source_of("llama")))
    assert plan.details["device_map"] == {"": "cpu"}
    assert plan.weight_bytes["disk"] == plan.weight_bytes["gpu"] == 0
    assert plan.kv_bytes == {"gpu": 0, "cpu": 2 * 17 * 768, "disk": 0}


def test_the_caps_hold_for_whatever_they_are(request_for: Request) -> None:
    """Host memory holds what the plan says, KV cache and workspace included, or the plan is refused."""
    source = source_of("llama")
    total = create(config()).plan(request_for(source)).weight_bytes["cpu"]
    outcomes = set()
    for cap in range(100_000, total + 200_000, 37_000):
        request = request_for(source, cpu_bytes=cap)
        try:
            plan = create(config()).plan(request)
        except PlanInfeasible:
            outcomes.add("refused")
            continue
        assert plan.weight_bytes["cpu"] + plan.kv_bytes["cpu"] + plan.workspace_bytes <= cap
        assert sum(plan.weight_bytes.values()) == total
        outcomes.add("split" if plan.weight_bytes["disk"] else "whole")
    assert outcomes == {"refused", "split", "whole"}


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="accelerate maps nothing to a GPU that is not there"
)
def test_a_gpu_plan_uses_three_tiers(request_for: Request) -> None:
    gpu_bytes = ROOM_FOR_CUDA + 500_000
    request = on_gpu(request_for(source_of("llama")), gpu_bytes=gpu_bytes, cpu_bytes=150_000)
    plan = create(config()).plan(request)
    assert all(size > 0 for size in plan.weight_bytes.values())
    assert plan.weight_bytes["cpu"] <= 150_000
    assert plan.kv_bytes["gpu"] > 0
    assert plan.weight_bytes["gpu"] + plan.kv_bytes["gpu"] + plan.workspace_bytes <= gpu_bytes


def test_an_offloaded_kv_cache_is_the_hosts(request_for: Request) -> None:
    request = on_gpu(request_for(source_of("llama")), gpu_bytes=2 * ROOM_FOR_CUDA)
    plan = create(config(enable_kv_offload=True)).plan(request)
    assert plan.kv_bytes == {"gpu": 0, "cpu": 2 * 17 * 768, "disk": 0}
    on_cpu = create(config(enable_kv_offload=True)).plan(request_for(source_of("llama")))
    assert any("enable_kv_offload" in warning for warning in on_cpu.warnings)


def test_one_layer_too_large_is_refused_with_the_numbers(request_for: Request) -> None:
    with pytest.raises(PlanInfeasible) as caught:
        create(config()).plan(request_for(source_of("llama"), cpu_bytes=60_000))
    message = str(caught.value)
    assert "58.6 KiB" in message, "the limit"
    assert "model.layers.0, 144.5 KiB" in message, "the need: 36864 + 128 numbers of 4 bytes"
    assert "--cpu-mem" in message
    assert "--batch-size" in message
    assert caught.value.exit_code == 5


def test_offloading_switched_off(request_for: Request) -> None:
    with pytest.raises(PlanInfeasible, match="enable_offload=true"):
        create(config(enable_offload=False)).plan(request_for(source_of("llama"), cpu_bytes=300_000))


def test_a_full_disk_is_refused(request_for: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.accelerate.free_disk_bytes", lambda path: 1000)
    with pytest.raises(PlanInfeasible, match="--offload-dir"):
        create(config()).plan(request_for(source_of("llama"), cpu_bytes=300_000))


def test_quantising_needs_its_package(request_for: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install"):
        create(config(quantize="int8")).plan(request_for(source_of("llama")))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "no-such-type"}, "model_type 'no-such-type'"),
        ({"model_type": "vit"}, "m"),
    ],
)
def test_what_is_no_language_model(request_for: Request, fields: dict[str, Any], expected: str) -> None:
    source = ModelSource(name="m", path=None, config=fields, weights="random")
    with pytest.raises(UsageError, match=expected) as caught:
        create(config()).plan(request_for(source))
    assert "\n" not in str(caught.value)


# Engines


def generate(strategy: AccelerateStrategy, request: PlanRequest, tokens: int = 5) -> tuple[Any, Any, Any]:
    """Tokens of two padded rows, what was planned, and what was placed."""
    ids_BT = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    plan = strategy.plan(request)
    with strategy.build(plan) as engine:
        columns = list(engine.generate(ids_BT, mask_BT, tokens))
        placed = engine.placed()
    assert all(column.shape == (2,) and column.dtype == torch.int64 for column in columns)
    return torch.stack(columns, dim=1).tolist(), plan, placed


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_the_same_wherever_they_are_put(request_for: Request, family: str) -> None:
    strategy = create(config())
    source = source_of(family)
    total = strategy.plan(request_for(source)).weight_bytes["cpu"]
    tokens = []
    for cap in (2**33, total * 3 // 4):
        got, plan, placed = generate(strategy, request_for(source, cpu_bytes=cap))
        assert placed.weight_bytes == plan.weight_bytes
        assert (placed.weight_bytes["disk"] > 0) == (cap < total)
        assert placed.offload_files_bytes >= placed.weight_bytes["disk"]
        tokens.append(got)
    assert tokens[0] == tokens[1]


def test_another_seed_draws_other_weights(request_for: Request) -> None:
    strategy, source = create(config()), source_of("llama")
    drawn = []
    for seed in (0, 0, 1):
        with strategy.build(strategy.plan(request_for(source, seed=seed))) as engine:
            drawn.append(engine.model.model.layers[1].mlp.up_proj.weight.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std().item() == pytest.approx(0.02, rel=0.1)


def test_layers_differ_from_each_other(request_for: Request) -> None:
    strategy = create(config())
    with strategy.build(strategy.plan(request_for(source_of("llama")))) as engine:
        one, two = (engine.model.model.layers[layer].mlp.up_proj.weight for layer in (0, 1))
        assert not torch.equal(one, two)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_run_leaves_nothing_on_disk(request_for: Request, tiny_model: Path, weights: Any) -> None:
    source = resolve_model(str(tiny_model), weights=weights)
    request = request_for(source, cpu_bytes=450_000)
    strategy = create(config())
    plan = strategy.plan(request)
    folder = request.machine.offload_dir
    with strategy.build(plan) as engine:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        assert engine.placed().offload_files_bytes == sum(path.stat().st_size for path in files)
    assert list(folder.iterdir()) == []
    with pytest.raises(RuntimeError, match="mine"), strategy.build(plan):
        raise RuntimeError("mine")
    assert list(folder.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_what_another_uses_is_not(request_for: Request) -> None:
    strategy = create(config())
    request = request_for(source_of("llama"))
    folder = request.machine.offload_dir
    left = folder / "accelerate-of-a-killed-run"
    left.mkdir(parents=True)
    (left / ".lock").touch()
    (left / "weights.safetensors").write_bytes(b"x" * 1000)
    (folder / "accelerate-of-someone-else").mkdir()
    with strategy.build(strategy.plan(request)):
        (used,) = [path for path in folder.iterdir() if path.name != "accelerate-of-someone-else"]
        assert used != left
        with strategy.build(strategy.plan(request)):
            assert used.exists(), "another run uses it"
    assert [path.name for path in folder.iterdir()] == ["accelerate-of-someone-else"]


def test_a_half_precision_checkpoint_is_converted_once(
    request_for: Request, tiny_model: Path, tmp_path: Path
) -> None:
    """On disk lies the compute type: as many bytes as planned, and no conversion in the timed part."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).save_pretrained(tmp_path / "half")
    source = resolve_model(str(tmp_path / "half"), weights="pretrained")
    got, plan, placed = generate(create(config()), request_for(source, cpu_bytes=450_000))
    assert placed.weight_bytes == plan.weight_bytes
    assert plan.weight_bytes["disk"] <= placed.offload_files_bytes < plan.weight_bytes["disk"] * 1.2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    ids_BT = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    out = model.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert got == out[:, 12:].tolist()


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "disk"])
def test_scores_are_the_plain_models(request_for: Request, tiny_model: Path, *, folder: bool) -> None:
    source = resolve_model(str(tiny_model), weights="pretrained")
    request = request_for(source, cpu_bytes=450_000 if folder else 2**33)
    ids_BT = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    strategy = create(config())
    plan = strategy.plan(request)
    assert plan.lossless
    with strategy.build(plan) as engine:
        got = engine.score(ids_BT, prompt_tokens=4)
    with torch.inference_mode():
        likely = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(
            ids_BT
        ).logits.log_softmax(-1)
    want = likely[:, :-1].gather(2, ids_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_consumer_that_leaves_stops_the_engine(request_for: Request) -> None:
    """Nothing is computed after the consumer has gone, and the next call works."""
    strategy = create(config())
    plan = strategy.plan(request_for(source_of("llama")))
    ids_BT = torch.randint(3, 250, (2, 12))
    before = threading.active_count()
    with strategy.build(plan) as engine:
        steps = 0
        forward = engine.model.forward

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            return forward(*arguments, **options)

        engine.model.forward = counted
        columns = engine.generate(ids_BT, torch.ones_like(ids_BT), 100)
        next(columns)
        columns.close()
        assert steps < 100
        assert len(list(engine.generate(ids_BT, torch.ones_like(ids_BT), 3))) == 3
    assert threading.active_count() <= before


def test_what_goes_wrong_while_generating_reaches_the_consumer(request_for: Request) -> None:
    strategy = create(config())
    with strategy.build(strategy.plan(request_for(source_of("llama")))) as engine:

        def broken(*arguments: Any, **options: Any) -> Any:
            raise ValueError("broken")

        engine.model.forward = broken
        ids_BT = torch.randint(3, 250, (2, 12))
        with pytest.raises(ValueError, match="broken"):
            list(engine.generate(ids_BT, torch.ones_like(ids_BT), 3))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used(request_for: Request, attention: str) -> None:
    model = meta_model(source_of("llama"), "float32", attention)
    assert model.config._attn_implementation == attention
    assert no_split_classes(model) == ["LlamaDecoderLayer"]
