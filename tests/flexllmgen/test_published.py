"""The published table gives the models it names: loadable configs of the published parameter counts."""

import subprocess
import sys

import pytest

from flexllmgen.errors import UsageError
from flexllmgen.models.published import published_config, published_names

# Distinct parameters in billions, tied embeddings counted once, as the model cards and checkpoints state.
PARAMETERS_BILLION = {
    "facebook/opt-125m": 0.1252,
    "facebook/opt-350m": 0.3312,
    "facebook/opt-1.3b": 1.3158,
    "facebook/opt-2.7b": 2.6516,
    "facebook/opt-6.7b": 6.6585,
    "facebook/opt-13b": 12.853,
    "facebook/opt-30b": 29.975,
    "facebook/opt-66b": 65.72,
    "facebook/opt-175b": 174.6,
    "meta-llama/Llama-2-7b-hf": 6.738,
    "meta-llama/Llama-2-13b-hf": 13.016,
    "meta-llama/Llama-2-70b-hf": 68.977,
    "meta-llama/Meta-Llama-3-8B": 8.030,
    "meta-llama/Meta-Llama-3-70B": 70.554,
    "meta-llama/Llama-3.1-8B": 8.030,
    "meta-llama/Llama-3.1-70B": 70.554,
    "meta-llama/Llama-3.2-1B": 1.2358,
    "meta-llama/Llama-3.2-3B": 3.2128,
    "mistralai/Mistral-7B-v0.1": 7.242,
    "mistralai/Mistral-7B-v0.3": 7.248,
    "mistralai/Mixtral-8x7B-v0.1": 46.703,
    "Qwen/Qwen2.5-0.5B": 0.494,
    "Qwen/Qwen2.5-1.5B": 1.544,
    "Qwen/Qwen2.5-3B": 3.086,
    "Qwen/Qwen2.5-7B": 7.616,
    "Qwen/Qwen2.5-14B": 14.770,
    "Qwen/Qwen2.5-32B": 32.764,
    "Qwen/Qwen2.5-72B": 72.706,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-1.7B": 1.7206,
    "Qwen/Qwen3-4B": 4.0225,
    "Qwen/Qwen3-8B": 8.1907,
    "Qwen/Qwen3-14B": 14.768,
    "Qwen/Qwen3-32B": 32.762,
    "Qwen/Qwen3-30B-A3B": 30.532,
}

ARCHITECTURES = {
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def test_the_table_and_the_counts_name_the_same_models() -> None:
    assert set(published_names()) == set(PARAMETERS_BILLION)


@pytest.mark.parametrize("name", sorted(PARAMETERS_BILLION))
def test_transformers_builds_the_published_number_of_parameters(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    published = published_config(name)
    config = AutoConfig.for_model(**published)
    # Every layer is alike, so two of them give the whole: building all would take minutes for no more proof.
    counts = []
    for num_layers in (1, 2):
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * num_layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert type(model).__name__ == ARCHITECTURES[published["model_type"]] == published["architectures"][0]
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    parameters = counts[0] + (counts[1] - counts[0]) * (published["num_hidden_layers"] - 1)
    assert parameters / 1e9 == pytest.approx(PARAMETERS_BILLION[name], rel=0.001)


@pytest.mark.parametrize("name", sorted(PARAMETERS_BILLION))
def test_transformers_reads_back_every_key(name: str) -> None:
    from transformers import AutoConfig

    published = published_config(name)
    config = AutoConfig.for_model(**published)
    rope = getattr(config, "rope_parameters", None) or {}
    assert rope.get("rope_theta") == published.get("rope_theta")
    scaling = published.get("rope_scaling") or {}
    assert {key: rope.get(key) for key in scaling} == scaling
    # Qwen2 states a window that it does not use; transformers then drops it.
    dropped = {"rope_theta", "rope_scaling", "torch_dtype"}
    if not published.get("use_sliding_window", True):
        dropped.add("sliding_window")
    kept = {key: value for key, value in published.items() if key not in dropped}
    assert {key: getattr(config, key) for key in kept} == kept
    assert str(config.dtype).removeprefix("torch.") == published["torch_dtype"]


def test_details_that_parameter_counts_do_not_show() -> None:
    assert published_config("opt-350m")["do_layer_norm_before"] is False
    assert published_config("opt-350m")["word_embed_proj_dim"] == 512
    assert published_config("mistral-7b-v0.1")["sliding_window"] == 4096
    assert published_config("mistral-7b-v0.3")["sliding_window"] is None
    assert published_config("Llama-3.2-1B")["rope_scaling"]["factor"] == 32.0
    assert published_config("Meta-Llama-3-8B")["rope_scaling"] is None


@pytest.mark.parametrize("name", ["facebook/opt-30b", "opt-30b", "OPT-30B", "Facebook/Opt-30B", " opt-30b "])
def test_a_name_is_found_by_its_last_part_in_any_case(name: str) -> None:
    assert published_config(name)["hidden_size"] == 7168


def test_a_config_is_the_callers_own() -> None:
    published_config("Llama-3.1-8B")["rope_scaling"]["factor"] = 1.0
    assert published_config("Llama-3.1-8B")["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("facebook/opt-31b", "facebook/opt-30b"),
        ("Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("qwen2.5-7b-chat", "Qwen/Qwen2.5-7B"),
    ],
)
def test_an_unknown_name_is_one_line_that_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError) as raised:
        published_config(name)
    assert nearest in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_table_is_read_without_torch_or_transformers() -> None:
    code = (
        "import sys; from flexllmgen.models.published import published_config as c; c('opt-30b');"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
