"""Strategy flexgen: its keys become a policy, its plan the truth, its tokens those of transformers."""

import dataclasses
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from flexllmgen.compressed_size import BITS, GROUP_SIZES
from flexllmgen.errors import CheckpointError, PlanInfeasible, PolicyError, UnsupportedModelError, UsageError
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from harness.measure import Batch, run_pass
from harness.models import load_tokenizer, resolve_model
from harness.prompts import load_prompts
from strategies.base import Machine, ModelSource, PlanRequest
from strategies.flexgen import FlexgenStrategy, create, keys_of, make_policy, unused_keys
from strategies.flexgen_config import Config
from strategies.flexgen_engine import plan_of, policy_details
from strategies.registry import find_strategy

MIXED = {
    "w_gpu_percent": 30,
    "w_cpu_percent": 40,
    "cache_gpu_percent": 50,
    "cache_cpu_percent": 25,
    "act_gpu_percent": 50,
    "act_cpu_percent": 50,
    "num_micro_batches": 2,
}


def config(**changes: Any) -> Config:
    _, defaults = find_strategy("flexgen").load_config()
    return Config(**{**defaults, **changes})


def request_for(source: ModelSource, folder: Path, **changes: Any) -> PlanRequest:
    request = PlanRequest(
        model=source,
        workload=Workload(num_sequences=5, prompt_tokens=12, gen_tokens=6),
        batch_size=2,
        dtype="float32",
        machine=Machine(
            device="cpu",
            gpu_bytes=None,
            cpu_bytes=2**33,
            gpu_capped=False,
            cpu_capped=True,
            offload_dir=folder / "offload",
        ),
        seed=0,
    )
    return dataclasses.replace(request, **changes)


def padded_prompts(count: int, tokens: int, vocab: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, vocab, (count, tokens), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    for row in range(count):
        mask_BT[row, : row % 4] = 0
    ids_BT[mask_BT == 0] = 1
    return Batch(ids_BT=ids_BT, mask_BT=mask_BT)


def transformers_tokens(folder: Path, batch: Batch, tokens: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    with torch.inference_mode():
        out_BT = model.generate(
            batch.ids_BT, attention_mask=batch.mask_BT, max_new_tokens=tokens, do_sample=False
        )
    return [list(row) for row in out_BT[:, batch.ids_BT.shape[1] :].tolist()]


# Keys


def test_the_shipped_defaults_are_the_keys_of_the_model() -> None:
    config_type, defaults = find_strategy("flexgen").load_config()
    assert set(config_type.model_fields) == set(defaults)
    policy = make_policy(config(), batch_size=7)
    assert (policy.micro_batch_size, policy.num_micro_batches) == (7, 1)
    assert policy.weights.gpu == policy.kv_cache.gpu == policy.activations.gpu == 1


def test_keys_become_shares_and_disk_is_the_rest() -> None:
    policy = make_policy(config(**MIXED, micro_batch_size=3), batch_size=7)
    assert policy.block_size == 6
    assert policy.weights.disk == pytest.approx(0.3)
    assert policy.kv_cache.disk == pytest.approx(0.25)
    assert policy.activations.disk == 0


def test_weights_are_compressed_where_a_key_says_so() -> None:
    assert make_policy(config(), batch_size=1).lossless
    assert make_policy(config(weight_bits=8), batch_size=1).lossless
    policy = make_policy(config(compress_weight=True, weight_group_size=128), batch_size=1)
    assert (policy.weight_bits, policy.weight_group_size) == (4, 128)


@pytest.mark.parametrize(("key", "value"), [("weight_bits", 5), ("weight_group_size", 32)])
def test_other_bits_are_refused(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=key):
        config(compress_weight=True, **{key: value})


def test_the_keys_offer_the_bits_and_groups_that_there_are() -> None:
    for kind, key in (("weight", "weight"), ("kv", "cache")):
        assert get_args(Config.model_fields[f"{key}_bits"].annotation) == BITS
        assert get_args(Config.model_fields[f"{key}_group_size"].annotation) == GROUP_SIZES[kind]


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"weight_bits": 8, "weight_group_size": 128},
        {"kv_bits": 4},
        {"cpu_attention": True},
        {"chosen_experts": True},
    ],
)
def test_what_is_recorded_of_a_policy_makes_it_again(choices: dict[str, Any]) -> None:
    policy = Policy(micro_batch_size=3, num_micro_batches=2, overlap=0, **choices)
    details = policy_details(policy)
    assert Policy(**details) == policy
    assert json.loads(json.dumps(details)) == details
    # A lossless record has no bits, so that it equals those of before there were any.
    assert ("weight_bits" in details) == (not policy.lossless)


def test_shares_over_a_hundred_are_refused_by_name() -> None:
    with pytest.raises(PolicyError, match=r"cache_gpu_percent, cache_cpu_percent: .*120 %"):
        make_policy(config(cache_gpu_percent=70, cache_cpu_percent=50), batch_size=1)


# Plan


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"compress_cache": True}, "--set cache_bits=8"),
        ({"compress_cache": True, "cache_bits": 8, "cache_group_size": 32}, "--set cache_group_size=64"),
        ({"attn_sparsity": 0.5}, "--set attn_sparsity=1"),
        ({"act_gpu_percent": 50, "act_cpu_percent": 50}, "--set act_gpu_percent=100"),
    ],
)
def test_keys_that_rule_each_other_out_are_named(changes: dict[str, Any], way: str) -> None:
    with pytest.raises(PolicyError, match=f"{way}, or --set cpu_cache_compute=false"):
        make_policy(config(cpu_cache_compute=True, **changes), 4)


@pytest.mark.parametrize("group_size", [64, 128])
def test_the_cpu_attends_to_a_cache_of_8_bits(group_size: int) -> None:
    kept = {"compress_cache": True, "cache_bits": 8, "cache_group_size": group_size}
    policy = make_policy(config(cpu_cache_compute=True, **kept), 4)
    assert (policy.cpu_attention, policy.kv_bits, policy.kv_group_size) == (True, 8, group_size)


THIRD = Placement(gpu=0.123457, cpu=0.544321, disk=0.332222)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(micro_batch_size=3),
        Policy(
            micro_batch_size=2,
            num_micro_batches=5,
            weights=THIRD,
            overlap=0,
            sep_layer=True,
            pin_weight=False,
        ),
        Policy(
            micro_batch_size=2, kv_cache=Placement(gpu=0.149091, cpu=0.850909), kv_bits=8, cpu_attention=True
        ),
        Policy(micro_batch_size=2, kv_cache=ON_CPU, recompute=0.4, copy_threads=2, chosen_experts=True),
        Policy(micro_batch_size=2, weight_bits=8, weight_group_size=128, kv_bits=4, kv_group_size=32),
        Policy(micro_batch_size=2, activations=THIRD, attn_sparsity=0.25),
    ],
)
def test_the_keys_of_a_policy_make_it_again(policy: Policy) -> None:
    again = make_policy(config(**keys_of(policy)), batch_size=7)
    for kind in ("weights", "kv_cache", "activations"):
        mine, theirs = getattr(again, kind), getattr(policy, kind)
        assert (mine.gpu, mine.cpu, mine.disk) == pytest.approx((theirs.gpu, theirs.cpu, theirs.disk))
        again = dataclasses.replace(again, **{kind: theirs})
    assert again == policy


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"cpu_cache_compute": True}, ["cpu_cache_compute has no effect: no KV cache lies in host memory"]),
        ({"cpu_cache_compute": True, "cache_gpu_percent": 0, "cache_cpu_percent": 100}, []),
        ({"recompute": 0.5}, ["recompute has no effect"]),
        (
            {"weight_bits": 8, "cache_group_size": 32},
            ["--set compress_weight=true", "--set compress_cache=true"],
        ),
        ({"compress_cache": True, "cache_bits": 8}, []),
    ],
)
def test_a_key_without_effect_is_told_of(changes: dict[str, Any], expected: list[str]) -> None:
    warnings = list(unused_keys(config(**changes)))
    assert len(warnings) == len(expected)
    assert all(part in text for part, text in zip(expected, warnings, strict=True))


def test_the_switches_know_their_keys_defaults() -> None:
    _, defaults = find_strategy("flexgen").load_config()
    assert not list(unused_keys(Config(**defaults)))


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"compress_cache": True}, "--set compress_cache=false"),
        ({"attn_sparsity": 0.5}, "--set attn_sparsity=1"),
    ],
)
def test_what_makes_keys_anew_uses_them_as_they_are(changes: dict[str, Any], way: str) -> None:
    assert make_policy(config(recompute=0.5), 4).recompute == 0.5
    with pytest.raises(PolicyError, match=f"{way}, or --set recompute=0"):
        make_policy(config(recompute=0.5, **changes), 4)


def test_a_plan_knows_the_inputs_that_are_kept(tiny_model: Path, tmp_path: Path, laptop_profile: Any) -> None:
    source = resolve_model(str(tiny_model), weights="pretrained")
    spec = dataclasses.replace(ModelSpec.from_hf_config(source.config), num_kv_heads=4)
    placement = plan_placement(
        spec,
        Policy(micro_batch_size=4, kv_cache=Placement(gpu=0.25, cpu=0.75), recompute=0.5),
        request_for(source, tmp_path).workload,
        4,
        in_place=True,
    )
    plan = plan_of(
        request_for(source, tmp_path, spec=spec, profile=laptop_profile), placement, strategy="flexgen"
    )
    assert plan.details["policy"]["recompute"] == 0.5
    assert plan.lossless
    assert plan.predicted is not None
    assert plan.limit is not None
    assert plan.predicted.generation_tok_s <= plan.limit.generation_tok_s


def test_the_plan_places_the_shares_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_model), weights="pretrained")
    plan = create(config(**MIXED)).plan(request_for(source, tmp_path))
    total = ModelSpec.from_hf_config(source.config).weight_bytes(4)
    assert sum(plan.weight_bytes.values()) == pytest.approx(total, rel=0.01)
    assert plan.weight_bytes["gpu"] / total == pytest.approx(0.3, abs=0.01)
    assert plan.weight_bytes["disk"] / total == pytest.approx(0.3, abs=0.01)
    assert plan.details["shares"]["weights"]["cpu"] == pytest.approx(40, abs=1)
    assert plan.batch_size == 4
    assert plan.predicted is None


def test_the_prediction_stays_under_the_limit(tiny_model: Path, tmp_path: Path, laptop_profile: Any) -> None:
    source = resolve_model(str(tiny_model), weights="pretrained")
    spec = ModelSpec.from_hf_config(source.config)
    plan = create(config(**MIXED)).plan(request_for(source, tmp_path, spec=spec, profile=laptop_profile))
    assert plan.predicted is not None
    assert plan.limit is not None
    assert 0 < plan.predicted.generation_tok_s <= plan.limit.generation_tok_s
    assert plan.limit.decode_bound == "disk"


def test_a_plan_counts_compressed_bytes(tiny_model: Path, tmp_path: Path, laptop_profile: Any) -> None:
    source = resolve_model(str(tiny_model), weights="pretrained")
    spec = ModelSpec.from_hf_config(source.config)
    request = request_for(source, tmp_path, spec=spec, profile=laptop_profile)
    plain, lossy = (
        create(config(**MIXED, compress_weight=compressed)).plan(request) for compressed in (False, True)
    )
    layers = spec.num_layers * spec.layer_weight_bytes(4)
    assert 0 < sum(lossy.weight_bytes.values()) < sum(plain.weight_bytes.values()) - 0.6 * layers
    assert plain.limit is not None
    assert lossy.limit is not None
    assert lossy.limit.decode_busy_s["disk"] < plain.limit.decode_busy_s["disk"]


def refusal(request: PlanRequest, machine: dict[str, Any], **keys: Any) -> str:
    """What a plan for another machine is refused with."""
    other = dataclasses.replace(request, machine=dataclasses.replace(request.machine, **machine))
    with pytest.raises(PlanInfeasible) as caught:
        create(config(**keys)).plan(other)
    return str(caught.value)


def test_too_little_memory_names_the_keys_that_help(tiny_model: Path, tmp_path: Path) -> None:
    request = request_for(resolve_model(str(tiny_model), weights="pretrained"), tmp_path)
    message = refusal(request, {"cpu_bytes": 200_000})
    assert re.search(r"needs .* of memory \(weights .*\), has 195\.3 KiB; lower --set w_gpu_percent", message)
    assert "raise --cpu-mem" in message
    assert "GPU" not in message
    assert "--cpu-mem" not in refusal(request, {"cpu_bytes": 200_000, "cpu_capped": False})
    both = refusal(request, {"cpu_bytes": 200_000}, w_gpu_percent=50, w_cpu_percent=50)
    assert "lower --set w_gpu_percent, --set w_cpu_percent" in both
    assert "also" not in both, "one memory, one need"


def test_too_little_memory_for_the_buffers_names_what_makes_them_smaller(
    tiny_model: Path, tmp_path: Path
) -> None:
    request = request_for(resolve_model(str(tiny_model), weights="pretrained"), tmp_path)
    on_disk = dict.fromkeys(("w_gpu_percent", "cache_gpu_percent", "act_gpu_percent"), 0)
    message = refusal(request, {"cpu_bytes": 50_000}, **on_disk)
    assert re.search(r"\(buffers .*; lower --set overlap", message)
    assert "sep_layer=true" in message
    last = refusal(request, {"cpu_bytes": 50_000}, **on_disk, overlap=0, sep_layer=True)
    assert "overlap" not in last


def test_an_emulated_gpu_is_called_the_compute_device(tiny_model: Path, tmp_path: Path) -> None:
    request = request_for(resolve_model(str(tiny_model), weights="pretrained"), tmp_path)
    small = {"gpu_bytes": 100_000, "gpu_capped": True}
    message = refusal(request, small)
    assert re.search(
        r"on the compute device \(.*has 97\.7 KiB; lower --set w_gpu_percent.*raise --gpu-mem", message
    )
    assert "GPU" not in message
    assert "on the GPU" in refusal(request, {**small, "device": "cuda"})


def test_kv_cache_and_workspace_name_the_batch_that_sets_them(tiny_model: Path, tmp_path: Path) -> None:
    request = request_for(
        resolve_model(str(tiny_model), weights="pretrained"),
        tmp_path,
        batch_size=64,
        workload=Workload(num_sequences=64, prompt_tokens=64, gen_tokens=6),
    )
    emulated = {"gpu_bytes": 100_000, "gpu_capped": True}
    message = refusal(request, emulated, w_gpu_percent=0, w_cpu_percent=100)
    assert "cache_gpu_percent" in message
    assert "--batch-size" in message
    assert "w_gpu_percent" not in message, "it is at zero already"
    own = refusal(request, emulated, w_gpu_percent=0, micro_batch_size=32)
    assert "--set micro_batch_size" in own
    assert "num_micro_batches" not in own, "it is one already"
    assert "--set num_micro_batches" in refusal(
        request, emulated, w_gpu_percent=0, micro_batch_size=32, num_micro_batches=2
    )


def test_a_full_disk_names_the_folder_and_the_option(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.flexgen_engine.free_disk_bytes", lambda path: 1000)
    request = request_for(resolve_model(str(tiny_model), weights="pretrained"), tmp_path)
    message = refusal(request, {}, w_gpu_percent=50)
    assert f"in {tmp_path / 'offload'}" in message
    assert "--offload-dir" in message
    assert "--set path" in refusal(request, {}, w_gpu_percent=50, path=str(tmp_path / "own"))


def test_weights_packed_by_an_earlier_run_need_no_free_disk(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(resolve_model(str(tiny_model), weights="pretrained"), tmp_path)
    strategy = FlexgenStrategy(config(w_gpu_percent=50))
    with strategy.build(strategy.plan(request)):
        pass
    monkeypatch.setattr("strategies.flexgen_engine.free_disk_bytes", lambda path: 1000)
    assert strategy.plan(request).weight_bytes["disk"] > 1000


def test_an_unsupported_architecture_names_the_way_out(tmp_path: Path) -> None:
    source = ModelSource(name="gpt2", path=None, config={"model_type": "gpt2"}, weights="random")
    with pytest.raises(UnsupportedModelError, match="-s accelerate"):
        create(config()).plan(request_for(source, tmp_path))


def test_a_config_without_its_dimensions_is_one_line(tmp_path: Path) -> None:
    no_size = ModelSource(name="mine", path=None, config={"model_type": "llama"}, weights="random")
    with pytest.raises(UnsupportedModelError, match=r"mine lacks 'hidden_size'.*config\.json"):
        create(config()).plan(request_for(no_size, tmp_path))
    odd = dataclasses.replace(no_size, config={"model_type": "llama", "hidden_size": "wide"})
    with pytest.raises(UnsupportedModelError, match=r"mine .*'wide'.*config\.json"):
        create(config()).plan(request_for(odd, tmp_path))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.1.mlp.up_proj.weight", None),
        ("model.norm.weight", torch.tensor(1.0)),
        ("model.extra.weight", torch.ones(2)),
    ],
    ids=["missing", "a single number", "unexpected"],
)
def test_a_checkpoint_that_is_not_the_models_is_refused_before_loading(
    name: str, tensor: torch.Tensor | None, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(folder), weights="pretrained")
    with pytest.raises(CheckpointError, match=re.escape(name) + r".*config\.json"):
        create(config()).plan(request_for(source, tmp_path))


def test_pickles_are_sent_to_accelerate(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    source = resolve_model(str(folder), weights="pretrained", allow_pickle=True)
    with pytest.raises(UsageError, match="-s accelerate"):
        create(config()).plan(request_for(source, tmp_path))


# Engine


@pytest.mark.parametrize("capped", [True, False])
def test_a_gpu_is_loaded_under_the_limit_it_was_planned_for(
    capped: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine cuts prefill by it: under another limit it would hold more than was planned."""
    given = {}

    def load(*_: Any, **options: Any) -> Any:
        given.update(options)
        return nullcontext()

    monkeypatch.setattr("strategies.flexgen_engine.FlexEngine.load", load)
    request = request_for(resolve_model(str(tiny_model), weights="pretrained"), tmp_path)
    machine = dataclasses.replace(request.machine, device="cuda", gpu_bytes=2**33, gpu_capped=capped)
    strategy = create(config())
    with strategy.build(strategy.plan(dataclasses.replace(request, machine=machine))):
        assert given["gpu_bytes"] == 2**33


@pytest.mark.parametrize("changes", [{}, MIXED, {**MIXED, "overlap": 0}, {**MIXED, "sep_layer": True}])
def test_ragged_blocks_give_the_tokens_of_transformers(
    changes: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    source = resolve_model(str(tiny_model), weights="pretrained")
    request = request_for(source, tmp_path)
    strategy = FlexgenStrategy(config(**changes))
    plan = strategy.plan(request)
    whole = padded_prompts(5, 12, 259)
    starts = range(0, 5, plan.batch_size)
    batches = [
        Batch(
            ids_BT=whole.ids_BT[start : start + plan.batch_size],
            mask_BT=whole.mask_BT[start : start + plan.batch_size],
        )
        for start in starts
    ]
    with strategy.build(plan) as engine:
        measured = run_pass(engine, batches, 6)
        placed = engine.placed()
    assert measured.output_ids == transformers_tokens(tiny_model, whole, 6)
    assert placed.weight_bytes == dict(plan.weight_bytes)
    assert (placed.offload_files_bytes > 0) == (plan.weight_bytes["disk"] > 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_weights_generate_the_same_wherever_they_lie(
    bits: int, tiny_model: Path, tmp_path: Path
) -> None:
    source = resolve_model(str(tiny_model), weights="pretrained")
    batch, tokens = padded_prompts(2, 12, 259), []
    for changes in ({}, MIXED, {"w_gpu_percent": 0}):
        strategy = FlexgenStrategy(
            config(**changes, compress_weight=True, weight_bits=bits, micro_batch_size=2)
        )
        plan = strategy.plan(request_for(source, tmp_path))
        with strategy.build(plan) as engine:
            tokens.append(run_pass(engine, [batch], 6).output_ids)
            assert engine.placed().weight_bytes == dict(plan.weight_bytes)
    assert tokens[0] == tokens[1] == tokens[2]
    kept = {path.parent.name.split("-")[0] for path in (tmp_path / "offload").glob("*/layer-0.bin")}
    assert kept == {"quantised", "weights"}


@pytest.mark.slow
def test_the_builtin_model_on_64_real_prompts_with_disk(tmp_path: Path) -> None:
    """Identical tokens: 64 HumanEval prompts, 32 tokens, shares on all three tiers."""
    source = resolve_model("builtin", weights="pretrained")
    assert source.path is not None
    prompts = load_prompts(
        dataset="humaneval",
        num_prompts=64,
        input_len=96,
        prompt_mode="pad",
        prompt_template=None,
        chat_template="auto",
        tokenizer=load_tokenizer(source),
        seed=0,
    )
    ids_BT, mask_BT = prompts.batch(0, 64)
    request = request_for(
        source, tmp_path, batch_size=16, workload=Workload(num_sequences=64, prompt_tokens=96, gen_tokens=32)
    )
    strategy = FlexgenStrategy(config(**MIXED))
    plan = strategy.plan(request)
    blocks = [
        Batch(
            ids_BT=ids_BT[start : start + plan.batch_size], mask_BT=mask_BT[start : start + plan.batch_size]
        )
        for start in range(0, 64, plan.batch_size)
    ]
    with strategy.build(plan) as engine:
        measured = run_pass(engine, blocks, 32)
        assert engine.placed().counters["moved_disk_read_bytes"] > 0
    assert measured.output_ids == transformers_tokens(source.path, Batch(ids_BT=ids_BT, mask_BT=mask_BT), 32)


def test_a_compressed_cache_is_asked_for_by_its_keys() -> None:
    keys = {"cache_bits": 8, "cache_group_size": 32}
    assert make_policy(config(**keys), 2).kv_bits is None
    policy = make_policy(config(compress_cache=True, **keys), 2)
    assert (policy.kv_bits, policy.kv_group_size, policy.lossless) == (8, 32, False)


def test_the_disk_is_read_by_as_many_threads_as_asked() -> None:
    policy = make_policy(config(num_copy_threads=1, w_gpu_percent=0, w_cpu_percent=0), 2)
    assert policy.copy_threads == 1
    with pytest.raises(ValidationError):
        config(num_copy_threads=0)
