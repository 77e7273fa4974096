"""What strategy `accelerate` should take: the prediction that every run is held against.

accelerate overlaps nothing: a module is fetched, then runs. So the times add up, where the physical
limit takes the largest. A model of the same shapes with a few layers is timed on this machine, with as many rows and cached
positions as the workload has (accelerate_layers.py).
"""

from collections.abc import Mapping
from typing import Any

import torch

from flexllmgen.spec import ModelSpec
from profiling.cost_model import CostEstimate, Phase, cost_of_blocks, sum_phases
from profiling.profile import Rates
from strategies.accelerate_layers import FewLayers, PassTimes
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
    fetch_s = _fetch_seconds(weight_bytes, device, rates, page_cached=page_cached)

    def phases(batch: int) -> tuple[Phase, Phase]:
        def one_pass(times: PassTimes, cached: int) -> Phase:
            busy = {
                "compute": spec.num_layers * times.layer_s + times.rest_s,
                "fetching weights": fetch_s,
            }
            if kv_offload and rates.h2d_pageable_bytes_per_s:
                busy["KV cache"] = 2 * batch * spec.kv_bytes(cached, size) / rates.h2d_pageable_bytes_per_s
            return Phase(seconds=sum(busy.values()), busy=busy)

        prompts, steps = one_pass(layers.prompt(batch, workload.prompt_tokens), 0), workload.gen_tokens - 1
        if not steps:
            return prompts, Phase()
        # Each step reads the KV of all positions before it; times grow linearly, so the middle step is the mean.
        cached = workload.prompt_tokens + steps // 2
        return prompts, sum_phases([(steps, one_pass(layers.step(batch, cached), cached))])

    with FewLayers(config, spec, request.dtype, device) as layers:
        return cost_of_blocks(workload, request.batch_size, phases)


def _fetch_seconds(weight_bytes: Mapping[str, int], device: str, rates: Rates, *, page_cached: bool) -> float:
    """Seconds to bring in all offloaded weights once."""
    disk, host = weight_bytes.get("disk", 0), weight_bytes.get("cpu", 0)
    seconds = disk / (rates.cached_file_bytes_per_s if page_cached else rates.disk_read_bytes_per_s)
    if device == "cuda" and rates.h2d_pageable_bytes_per_s:
        seconds += (disk + host) / rates.h2d_pageable_bytes_per_s
    return seconds
