"""What strategy `accelerate` should take: the prediction that every run is held against.

accelerate overlaps nothing: a module is fetched, then runs. So the times add up, where the physical
limit takes the largest. The parts are measured here on this machine, in about a second: linear layers at the
rows of prefill and of decode, and what a layer of this architecture costs beside its arithmetic
(Python, hooks, launches), found with a model too small to compute anything.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flexllmgen.spec import ModelSpec
from profiling.compute import best_s, linear_bytes_per_s
from profiling.cost_model import CostEstimate, Phase, cost_of_blocks, sum_phases
from profiling.profile import Rates
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

    @functools.cache
    def linear_rate(rows: int) -> float:
        return linear_bytes_per_s(spec, request.dtype, device, rows=rows, linear=torch.nn.functional.linear)

    def one_pass(batch: int, new_tokens: int, cached: int) -> Phase:
        busy = {
            "compute": compute_bytes / linear_rate(batch * new_tokens),
            "fetching weights": fetch_s,
            "overhead": overhead_s,
        }
        # transformers concatenates the cache at each step: it is read, written and read again.
        kv = batch * spec.kv_bytes(cached, size)
        busy["KV cache"] = 3 * kv / rates.device_bytes_per_s
        if kv_offload and rates.h2d_pageable_bytes_per_s:
            busy["KV cache"] += 2 * kv / rates.h2d_pageable_bytes_per_s
        return Phase(seconds=sum(busy.values()), busy=busy)

    def phases(batch: int) -> tuple[Phase, Phase]:
        prompts, steps = one_pass(batch, workload.prompt_tokens, 0), workload.gen_tokens - 1
        if not steps:
            return prompts, Phase()
        # Each step reads the KV of all positions before it; times grow linearly, so the middle step is the mean.
        step = one_pass(batch, 1, workload.prompt_tokens + steps // 2)
        return prompts, sum_phases([(steps, step)])

    return cost_of_blocks(workload, request.batch_size, phases)


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
            # Of one length each time: kernels are chosen anew for a length that was not met before, and a warm-up met all.
            if surplus := cache.get_seq_length() - 4:
                cache.crop(-surplus)
            model(ids[:, :1], past_key_values=cache, use_cache=True)

        return best_s(run, device)
