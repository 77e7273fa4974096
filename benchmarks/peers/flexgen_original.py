"""FlexGen 0.1.8 from the package index, with its dummy weights. OPT only, float16."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peers.case import Case, cap_device_memory, figures


@contextlib.contextmanager
def shared_host_memory(alias_mib: int) -> Iterator[None]:
    """While weights are made, those of one shape take turns in so much host memory, and are written once."""
    from flexgen import flex_opt
    from flexgen.pytorch_backend import DeviceType, TorchDevice, TorchTensor

    if not alias_mib:
        yield
        return
    allocate, load = TorchDevice.allocate, TorchTensor.load_from_np
    rings: dict[Any, list[Any]] = {}
    turns: dict[Any, Iterator[int]] = {}
    written: set[int] = set()

    def shared(self: Any, shape: Any, dtype: Any, pin_memory: Any = None, name: Any = None) -> Any:
        size = math.prod(shape) * 2
        if self.device_type != DeviceType.CPU or size < 1 << 20:
            return allocate(self, shape, dtype, pin_memory=pin_memory, name=name)
        key = (tuple(shape), str(dtype))
        ring, turn = rings.setdefault(key, []), next(turns.setdefault(key, itertools.count()))
        # Shapes are few: together their turns are past every cache.
        most = max(2, (alias_mib << 20) // (4 * size))
        if len(ring) < most:
            ring.append(allocate(self, shape, dtype, pin_memory=pin_memory, name=name).data)
        return TorchTensor.create_from_torch(ring[turn % len(ring)], self, name=name)

    def once(self: Any, array: Any) -> None:
        if self.device.device_type == DeviceType.CPU:
            if self.data.data_ptr() in written:
                return
            written.add(self.data.data_ptr())
        load(self, array)

    ones = flex_opt.np.ones
    TorchDevice.allocate, TorchTensor.load_from_np = shared, once
    # A broadcast one stands for an array that is only copied from.
    flex_opt.np.ones = lambda shape, dtype: flex_opt.np.broadcast_to(flex_opt.np.array(1, dtype), shape)
    try:
        yield
    finally:
        TorchDevice.allocate, TorchTensor.load_from_np = allocate, load
        flex_opt.np.ones = ones


def run(case: Case) -> dict[str, Any]:
    """Figures of one generation of `batch` x `batches` sequences."""
    from flexgen.flex_opt import CompressionConfig, OptLM, Policy
    from flexgen.opt_config import get_opt_config
    from flexgen.timer import timers
    from flexgen.utils import ExecutionEnv

    cap_device_memory(case.gpu_gib)
    Path(case.offload_dir).mkdir(parents=True, exist_ok=True)
    env = ExecutionEnv.create(case.offload_dir)
    plain: dict[str, Any] = {"num_bits": 4, "group_size": 64, "symmetric": False}
    policy = Policy(
        case.batch,
        case.batches,
        *case.percent,
        overlap=True,
        sep_layer=True,
        pin_weight=True,
        cpu_cache_compute=False,
        attn_sparsity=1.0,
        compress_weight=case.bits == 4,
        comp_weight_config=CompressionConfig(group_dim=0, **plain),
        compress_cache=case.bits == 4,
        comp_cache_config=CompressionConfig(group_dim=2, **plain),
    )
    start = time.perf_counter()
    config = get_opt_config(f"facebook/{case.model.rpartition('/')[2]}")
    with shared_host_memory(case.alias_mib):
        model = OptLM(config, env, "_DUMMY_", policy)
    load_s = time.perf_counter() - start
    sequences = case.batch * case.batches
    prompts = case.prompts(sequences).numpy()
    model.generate(prompts[:, :16], max_new_tokens=1)
    torch.cuda.reset_peak_memory_stats()
    timers("generate").reset()
    columns = min(case.gen, 1 + case.steps)
    model.generate(prompts, max_new_tokens=case.gen, cut_gen_len=columns if columns < case.gen else None)
    stamps = list(itertools.accumulate(timers("generate").costs))
    return figures(case, sequences, 0.0, stamps) | {
        "load_s": round(load_s, 1),
        "cut": f"{case.batch}x{case.batches}",
        "policy": f"{' '.join(map(str, case.percent))}{', 4-bit weights and KV' if case.bits == 4 else ''}",
    }
