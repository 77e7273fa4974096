"""Loads one policy in our engine, runs a few steps of one block, and says what was measured beside what was predicted.

What planner_case.py and record_case.py share: random weights and prompts, host memory that layers may share, the machine's
profile, and one policy's measurement. Of a workload one block is run after a warm-up of one micro-batch, and of long
generations only some decode steps: the rest is projected from their median, and predictions are of the very same
steps, projected alike. Blocks being alike, a workload's throughput is that of its block (a ragged last one counts as predicted).
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

from peers.case import DEVICE, random_prompts

import flexllmgen.parts
from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import OffloadError
from flexllmgen.fits import check_fits
from flexllmgen.memory.arena import HostArena, Region
from flexllmgen.models.published import published_config
from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.splits import micro_batch_sizes
from flexllmgen.units import PAGE, GiB, round_up
from flexllmgen.workload import Workload
from profiling.calibration import Calibration, calibrate, corrected
from profiling.cost_model import engine_cost
from profiling.hardware import available_memory_bytes, free_disk_bytes, read_hardware
from profiling.layer_times import layer_times_for
from profiling.profile import HardwareProfile
from profiling.profiler import take_profile
from profiling.simulation import simulate_block
from strategies.autoflex import REPLAN_GAIN
from strategies.base import Machine, ModelSource, PlanRequest
from strategies.choices import Limits
from strategies.flexgen_engine import plan_of
from strategies.search import Found, find_policy


class AliasedArena(HostArena):
    """Regions of about the same size take turns in `alias_bytes` of memory: more than any cache holds."""

    alias_bytes = 0

    def __init__(self, *, register: bool) -> None:
        super().__init__(register=register)
        self._rings: dict[int, list[Region]] = {}
        self._asked: dict[int, int] = {}
        self.asked_bytes = 0

    def reserve(self, num_bytes: int, *, pinned: bool = True) -> Region:
        room = round_up(num_bytes, 1 << 20)
        ring = self._rings.setdefault(room, [])
        turn = self._asked[room] = self._asked.get(room, -1) + 1
        self.asked_bytes += round_up(num_bytes, PAGE)
        if not num_bytes or len(ring) * room < self.alias_bytes:
            ring.append(super().reserve(room if num_bytes else 0, pinned=pinned))
        return Region(ring[turn % len(ring)].offset, num_bytes)


def share_layers(alias_mib: int) -> None:
    """From now on engines of this process share host memory among layers; 0 leaves every byte its own."""
    if alias_mib:
        AliasedArena.alias_bytes = alias_mib << 20
        flexllmgen.parts.HostArena = AliasedArena  # type: ignore[misc]


def published_spec(model: str, layers: int = 0) -> ModelSpec:
    """A published model's dimensions; with `layers`, of only so many."""
    config = published_config(model)
    if layers:
        config["num_hidden_layers"] = layers
    return ModelSpec.from_hf_config(config, model)


def measured_profile(
    spec: ModelSpec, *, dtype: torch.dtype, offload_dir: Path, profiles: Path
) -> tuple[HardwareProfile, dict[str, Any]]:
    """This machine's profile with the model's layer times, and a line about it for the record."""
    offload_dir.mkdir(parents=True, exist_ok=True)
    began = time.time()
    profile, warnings = take_profile(
        read_hardware(offload_dir),
        spec,
        device=DEVICE,
        dtype=str(dtype).removeprefix("torch."),
        offload_dir=offload_dir,
        cache=profiles,
    )
    rates = {name: round(each.median / 1e9, 2) for name, each in profile.measurements.items()}
    took = round(time.time() - began, 1)
    return profile, {"model": spec.name, "profile_s": took, "warnings": warnings, "rates_1e9": rates}


def machine_limits(gpu_gib: float, cpu_gib: float, offload_dir: Path) -> Limits:
    """What a policy may take; 0 GiB is all that is there."""
    return Limits(
        gpu_bytes=int(gpu_gib * GiB) or None,
        cpu_bytes=int(cpu_gib * GiB) or available_memory_bytes() * 9 // 10,
        disk_bytes=free_disk_bytes(offload_dir) * 9 // 10,
        shared=DEVICE == "cpu" and not gpu_gib,
    )


def policy_of(fields: Mapping[str, Any]) -> Policy:
    """The policy that `dataclasses.asdict` described."""
    shares = ("weights", "kv_cache", "activations")
    return Policy(**{key: Placement(**value) if key in shares else value for key, value in fields.items()})


def predicted_s(plan: PlacementPlan, block: int, steps: int, profile: HardwareProfile) -> tuple[float, float]:
    """Seconds of the prompt's pass and of a step, for the very steps that are measured."""
    layers = layer_times_for(plan.spec, profile.layers)
    assert layers is not None
    passes = simulate_block(
        plan,
        layers,
        profile.typical,
        micro_batches=micro_batch_sizes(block, plan.policy),
        contexts=[plan.workload.prompt_tokens + step for step in range(1, steps + 1)],
    )
    return passes.seconds[0], statistics.median(passes.seconds[2:] or passes.seconds[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRun:
    """A model and workload on this machine; `steps` decode steps of a policy are run."""

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload
    limits: Limits
    dtype: torch.dtype
    steps: int
    offload_dir: Path

    def search(self, profile: HardwareProfile, *, batch_size: int = 8, allow_lossy: bool = False) -> Found:
        """The policy that autoflex finds at these rates."""
        return find_policy(
            self.spec,
            profile,
            self.workload,
            self.limits,
            dtype_bytes=self.dtype.itemsize,
            batch_size=batch_size,
            allow_lossy=allow_lossy,
        )

    def replanned(
        self, policy: Policy, result: dict[str, Any], *, allow_lossy: bool = False
    ) -> tuple[PolicyRun, Policy] | None:
        """What autoflex loads instead after the calibration of a run, at the rates then known; None where it stays with it."""
        if "calibration" not in result:
            return None
        plan = self.place(policy)
        profile = corrected(self.profile, Calibration(**result["calibration"]), plan)
        cost = engine_cost(plan, profile)
        assert cost is not None
        best = self.search(profile, allow_lossy=allow_lossy).best
        gain = cost.seconds / best.seconds
        if gain <= REPLAN_GAIN or best.policy == policy:
            return None
        return dataclasses.replace(self, profile=profile), best.policy

    def place(self, policy: Policy) -> PlacementPlan:
        """What lies where under a policy."""
        return plan_placement(
            self.spec,
            policy,
            self.workload,
            self.dtype.itemsize,
            in_place=DEVICE == "cpu",
            gpu_cap_bytes=self.limits.gpu_bytes,
        )

    def run(self, policy: Policy, *, probed: bool) -> dict[str, Any]:
        plan = self.place(policy)
        shares = [round(100 * share, 1) for kind in (policy.weights, policy.kv_cache, policy.activations)
                  for share in (kind.gpu, kind.cpu, kind.disk)]  # fmt: skip
        result: dict[str, Any] = {
            "cut": f"{policy.micro_batch_size}x{policy.num_micro_batches}",
            "overlap": policy.overlap,
            "sep_layer": policy.sep_layer,
            "shares": shares,
            "cpu_attention": policy.cpu_attention,
            "recompute": policy.recompute,
        }
        try:
            check_fits(plan, gpu_bytes=self.limits.gpu_bytes, cpu_bytes=self.limits.cpu_bytes)
            return {**result, **self.measured(policy, plan, probed=probed)}
        except OffloadError as error:
            return {**result, "error": str(error).splitlines()[0][:200]}
        except torch.OutOfMemoryError as error:
            return {**result, "error": "OUT OF MEMORY " + str(error)[:150]}
        finally:
            gc.collect()

    def measured(self, policy: Policy, plan: PlacementPlan, *, probed: bool) -> dict[str, Any]:
        block = min(policy.block_size, self.workload.num_sequences)
        ids = random_prompts(self.spec.vocab_size, block, self.workload.prompt_tokens)
        began = time.time()
        with FlexEngine.load(
            self.spec,
            RandomCheckpoint(seed=0),
            policy,
            workload=self.workload,
            device=DEVICE,
            dtype=self.dtype,
            offload_dir=self.offload_dir,
            gpu_bytes=self.limits.gpu_bytes,
            cpu_bytes=self.limits.cpu_bytes,
        ) as engine:
            load_s = time.time() - began
            for _ in engine.generate(ids[: policy.micro_batch_size], max_new_tokens=1):
                pass
            began = time.time()
            probe = engine.probe() if probed else None
            probe_s = time.time() - began
            steps = min(self.steps, self.workload.gen_tokens - 1)
            times = [time.perf_counter()]
            times += [time.perf_counter() for _ in engine.generate(ids, max_new_tokens=1 + steps)]
            stats = engine.stats()
            asked = getattr(engine._parts.arena, "asked_bytes", stats.host_bytes)
            used = torch.cuda.mem_get_info() if DEVICE == "cuda" else (0, 0)
        prefill, gaps = times[1] - times[0], [b - a for a, b in itertools.pairwise(times[1:])]
        step = statistics.median(gaps[1:] or gaps)
        # The first step records what the others replay, and finds loads that ran while the prompt did.
        calibration = Calibration() if probe is None else calibrate(plan, self.profile, probe)
        predicted = predicted_s(plan, block, steps, self.profile)
        calibrated = predicted_s(plan, block, steps, corrected(self.profile, calibration, plan))
        decode = self.workload.gen_tokens - 1
        tokens = block * self.workload.gen_tokens * self.ragged(policy, plan)
        measured = tokens / (prefill + decode * step)
        limit, bound = self.limit(plan, tokens, block, steps)
        guess = tokens / (predicted[0] + decode * predicted[1])
        cost = engine_cost(plan, self.profile)
        assert cost is not None
        return {
            "tok_s": round(measured, 2),
            "predicted_tok_s": round(guess, 2),
            "error": None,
            "prediction_error": round(guess / measured - 1, 3),
            "calibrated_error": round(tokens / (calibrated[0] + decode * calibrated[1]) / measured - 1, 3),
            "calibration": {name: round(x, 3) for name, x in dataclasses.asdict(calibration).items()},
            "limit_tok_s": round(limit, 2),
            "limit_bound": bound,
            "sequences": block,
            "steps": steps,
            "projected": steps < decode,
            "prefill_s": [round(prefill, 3), round(predicted[0], 3)],
            "step_s": [round(step, 4), round(predicted[1], 4)],
            "bound": cost.decode_bound,
            "planned_gpu_gib": round(plan.gpu_bytes / GiB, 3),
            "peak_gpu_gib": round(stats.device_reserved_peak_bytes / GiB, 3),
            "planned_host_gib": round(plan.cpu_bytes / GiB, 3),
            "host_gib": round(asked / GiB, 3),
            "gpu_used_gib": round((used[1] - used[0]) / GiB, 3),
            "probe_s": round(probe_s, 1),
            "gaps_s": [round(gap, 4) for gap in gaps[:3]],
            "load_s": round(load_s, 1),
        }

    def limit(self, plan: PlacementPlan, tokens: float, block: int, steps: int) -> tuple[float, str]:
        """The most tokens a second that the machine's rates allow for this placement, and what binds its decode steps.

        Of the very steps that are run; what is compressed counts as compressed.
        """
        request = PlanRequest(
            model=ModelSource(name=self.spec.name, path=None, config={}, weights="random"),
            workload=dataclasses.replace(self.workload, num_sequences=block, gen_tokens=1 + steps),
            batch_size=block,
            dtype=str(self.dtype).removeprefix("torch."),
            machine=Machine(
                device="cuda" if DEVICE == "cuda" else "cpu",
                gpu_bytes=self.limits.gpu_bytes,
                cpu_bytes=self.limits.cpu_bytes,
                gpu_capped=self.limits.gpu_bytes is not None,
                cpu_capped=False,
                offload_dir=self.offload_dir,
            ),
            seed=0,
            spec=self.spec,
            profile=self.profile,
        )
        best = plan_of(request, plan, strategy="autoflex").limit
        assert best is not None
        decode = self.workload.gen_tokens - 1
        return tokens / (best.prefill_s + decode * best.decode_s / max(1, steps)), best.decode_bound

    def ragged(self, policy: Policy, plan: PlacementPlan) -> float:
        """Throughput of all blocks over that of the full ones, as predicted: 1 where they come out even."""
        if (
            self.workload.num_sequences % policy.block_size == 0
            or policy.block_size > self.workload.num_sequences
        ):
            return 1.0
        full = dataclasses.replace(self.workload, num_sequences=policy.block_size)
        costs = [engine_cost(each, self.profile) for each in (plan, dataclasses.replace(plan, workload=full))]
        assert costs[0] is not None
        assert costs[1] is not None
        return costs[0].generation_tok_s / costs[1].generation_tok_s
