"""What strategy `accelerate` should take: the prediction that every run is held against.

accelerate overlaps nothing: a module is fetched, then runs. So the times add up, where the physical
limit takes the largest. The parts are measured here on this machine, in about a second: linear layers at the
rows of prefill and of decode, and what a layer of this architecture costs beside its arithmetic
(Python, hooks, launches), found with a model too small to compute anything.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flexllmgen.spec import ModelSpec
from profiling.compute import best_s, linear_bytes_per_s
from profiling.cost_model import CostEstimate
from profiling.rates import Rates
from strategies.base import PlanRequest


def predict(
    spec: ModelSpec,
    config: Any,
    request: PlanRequest,
    weight_bytes: Mapping[str, int],
    *,
    kv_offload: bool,
    page_cached: bool,
    rates: Rates,
) -> CostEstimate:
    """Predicted seconds for the whole workload, each batch after the other."""
    workload, device = request.workload, request.machine.device
    size = int(getattr(torch, request.dtype).itemsize)
    compute_bytes = sum(weight_bytes.values()) * spec.active_parameters / spec.num_parameters
    fetch_s = _fetch_seconds(weight_bytes, device, rates, page_cached=page_cached)
    overhead_s = spec.num_layers * layer_overhead_s(config, request.dtype, device)
    prefill_s = decode_s = 0.0
    remaining = workload.num_sequences
    speeds: dict[int, tuple[float, float]] = {}
    while remaining > 0:
        batch = min(request.batch_size, remaining)
        remaining -= batch
        if batch not in speeds:
            speeds[batch] = (
                linear_bytes_per_s(spec, request.dtype, device, rows=batch * workload.prompt_tokens),
                linear_bytes_per_s(spec, request.dtype, device, rows=batch),
            )
        prefill_rate, decode_rate = speeds[batch]
        prefill_s += compute_bytes / prefill_rate + fetch_s + overhead_s
        steps = workload.gen_tokens - 1
        kv = batch * spec.kv_bytes(workload.prompt_tokens + steps // 2, size)
        # transformers concatenates the cache at each step: it is read, written and read again.
        kv_s = 3 * kv / rates.device_bytes_per_s
        if kv_offload and rates.h2d_pageable_bytes_per_s:
            kv_s += 2 * kv / rates.h2d_pageable_bytes_per_s
        decode_s += steps * (compute_bytes / decode_rate + fetch_s + overhead_s + kv_s)
    parts = {"compute": compute_bytes / decode_rate, "fetching weights": fetch_s, "overhead": overhead_s}
    bound = max(parts, key=lambda name: parts[name])
    return CostEstimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        generation_tok_s=workload.output_tokens / (prefill_s + decode_s),
        prefill_bound="fetching weights" if fetch_s > compute_bytes / prefill_rate else "compute",
        decode_bound=bound,
    )


def _fetch_seconds(weight_bytes: Mapping[str, int], device: str, rates: Rates, *, page_cached: bool) -> float:
    """Seconds to bring in all offloaded weights once."""
    disk, host = weight_bytes.get("disk", 0), weight_bytes.get("cpu", 0)
    seconds = disk / (rates.cached_file_bytes_per_s if page_cached else rates.disk_read_bytes_per_s)
    if device == "cuda" and rates.h2d_pageable_bytes_per_s:
        seconds += (disk + host) / rates.h2d_pageable_bytes_per_s
    return seconds


def layer_overhead_s(config: Any, dtype: str, device: str) -> float:
    """Seconds a decoder layer takes in a decode step beside its arithmetic.

    The difference between tiny models of six and two layers of the same architecture.
    """
    return max(0.0, (_tiny_step_s(config, 6, dtype, device) - _tiny_step_s(config, 2, dtype, device)) / 4)


def _tiny_step_s(config: Any, layers: int, dtype: str, device: str) -> float:
    tiny = copy.deepcopy(config)
    text = tiny.get_text_config()
    heads = 2
    small = {
        "num_hidden_layers": layers,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "ffn_dim": 32,
        "word_embed_proj_dim": 32,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 16,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    for name, value in small.items():
        if hasattr(text, name):
            setattr(text, name, value)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = list(kinds)[:layers]
    model = AutoModelForCausalLM.from_config(tiny, dtype=getattr(torch, dtype)).to(device).eval()
    ids = torch.ones(1, 4, dtype=torch.long, device=device)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values

        def run() -> None:
            model(ids[:, :1], past_key_values=cache, use_cache=True)

        return best_s(run, device)
