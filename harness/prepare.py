"""Before a run: from options to a model, prompts, a machine and a plan. Loads no weight, leaves no folder.

Everything a user can get wrong is found here. Knows nothing of how the run is measured or recorded.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from flexllmgen.errors import OffloadError, UsageError
from flexllmgen.spec import ModelSpec
from flexllmgen.units import gib
from flexllmgen.workload import Workload
from harness.builtin import BUILTIN, builtin_path
from harness.config import EvalConfig, cache_dir
from harness.job import EventWriter, Job
from harness.models import load_tokenizer, max_positions, resolve_model
from harness.prompts import PromptSet, load_prompts
from profiling.hardware import Hardware, available_memory_bytes, check_writable, read_hardware
from profiling.sampler import reset_peak_rss
from strategies.base import Machine, ModelSource, Plan, PlanRequest, Strategy
from strategies.registry import find_strategy

if TYPE_CHECKING:
    from profiling.profile import HardwareProfile

log = logging.getLogger(__name__)

_GPU_RESERVE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is settled before a weight is loaded."""

    strategy: Strategy
    plan: Plan
    plan_s: float
    prompts: PromptSet
    tokenizer: Any
    hardware: Hardware
    profile: "HardwareProfile"
    warnings: list[str]


def prepare(job: Job, events: EventWriter) -> Prepared:
    """Settle everything before a weight is loaded; tell by events what takes long.

    Raises:
        OffloadError: whatever the user can mend: names, sizes, files, a plan that does not fit.
    """
    config = job.common
    check_writable(config.offload_dir, "--offload-dir")
    if not job.dry_run:
        check_writable(config.results_dir, "--results-dir")
    first = config.model == BUILTIN and not builtin_path().exists()
    events.send("phase", name="unpack the built-in model (once)" if first else "prepare")
    source = resolve_model(
        config.model,
        weights=config.weights,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    # Only now: a mistyped model is told before torch and transformers are imported, which takes seconds.
    quiet_transformers()
    check_context(config, source)
    tokenizer = load_tokenizer(source)
    prompts = load_prompts(
        dataset=config.dataset,
        num_prompts=config.num_prompts,
        input_len=config.input_len,
        prompt_mode=config.prompt_mode,
        prompt_template=config.prompt_template,
        chat_template=config.chat_template,
        tokenizer=tokenizer,
        vocab_size=vocab_size(source),
        seed=config.seed,
    )
    machine, warnings = choose_machine(config)
    entry = find_strategy(config.strategy)
    config_type, _ = entry.load_config()
    strategy = entry.create(config_type.model_validate(job.strategy_config))
    request = make_request(config, source, machine)
    hardware = read_hardware(config.offload_dir)
    profile, profile_warnings = local_profile(
        request, hardware, lambda phase: events.send("phase", name=phase)
    )
    events.send("phase", name="plan")
    started = time.perf_counter()
    request = replace(request, profile=profile)
    plan = strategy.plan(request)
    plan_s = time.perf_counter() - started
    if config.warmup == 0:
        warnings.append("--warmup 0: the first repeat is a cold one")
    return Prepared(
        strategy=strategy,
        plan=plan,
        plan_s=plan_s,
        prompts=prompts,
        tokenizer=tokenizer,
        hardware=hardware,
        profile=profile,
        warnings=[*warnings, *profile_warnings, *prompts.warnings, *plan.warnings],
    )


def check_context(config: EvalConfig, source: ModelSource) -> None:
    """Refuse rows longer than the model was made for.

    Raises:
        UsageError: prompt and generated tokens are more positions than it has.
    """
    limit = max_positions(source.config)
    if limit is not None and config.context > limit:
        raise UsageError(
            f"--input-len {config.input_len} + --gen-len {config.gen_len} = {config.context} positions, "
            f"{config.model} has {limit}; lower one of them"
        )


def make_request(config: EvalConfig, source: ModelSource, machine: Machine) -> PlanRequest:
    """What a strategy is asked to plan; the machine's profile is still to be put in."""
    return PlanRequest(
        model=source,
        workload=Workload(
            num_sequences=config.num_prompts, prompt_tokens=config.input_len, gen_tokens=config.gen_len
        ),
        batch_size=min(config.batch_size, config.num_prompts),
        dtype=choose_dtype(config.dtype, source, machine.device),
        machine=machine,
        seed=config.seed,
        spec=known_spec(source),
        allow_lossy=config.allow_lossy,
    )


def quiet_transformers() -> None:
    """Send transformers' messages to the log, where it would write to standard error by itself."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()


def choose_device(wanted: str) -> Literal["cuda", "cpu"]:
    """The device that computes: as asked; auto is CUDA where there is one.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise UsageError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or a torch built for CUDA"
        )
    return "cuda" if has_cuda and wanted != "cpu" else "cpu"


def choose_machine(config: EvalConfig) -> tuple[Machine, list[str]]:
    """The device and the caps a plan may use.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    import torch

    device = choose_device(config.device)
    free, total = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
    return cap_machine(
        config,
        device=device,
        gpu_free_bytes=free,
        gpu_total_bytes=total,
        host_available_bytes=available_memory_bytes(),
    )


def machine_of(profile: "HardwareProfile", config: EvalConfig) -> tuple[Machine, list[str]]:
    """The machine of a profile, as far as a plan may use it. Nothing of this one is looked at.

    Raises:
        UsageError: the profile is of another device than was asked for.
    """
    if config.device not in ("auto", profile.device):
        raise UsageError(
            f"--device {config.device}: the profile is of {profile.device}; leave --device out, or take one with "
            f"`harness profile --device {config.device}`"
        )
    return cap_machine(
        config,
        device="cuda" if profile.device == "cuda" else "cpu",
        gpu_free_bytes=profile.capacity.gpu_free_bytes,
        gpu_total_bytes=profile.capacity.gpu_total_bytes,
        host_available_bytes=profile.capacity.host_available_bytes,
        disk_bytes=profile.capacity.disk_free_bytes,
    )


def cap_machine(
    config: EvalConfig,
    *,
    device: Literal["cuda", "cpu"],
    gpu_free_bytes: int,
    gpu_total_bytes: int,
    host_available_bytes: int,
    disk_bytes: int | None = None,
) -> tuple[Machine, list[str]]:
    """What the user's caps leave of a machine, and a warning for each cap that is more than it has."""
    warnings: list[str] = []
    gpu_bytes = config.gpu_mem
    # A tenth is left to the system and to the process itself.
    available = host_available_bytes * 9 // 10
    if device == "cuda":
        # Without a cap, some is left to kernels that are loaded later, past the allocator.
        gpu_bytes = min(config.gpu_mem or gpu_free_bytes - _GPU_RESERVE_BYTES, gpu_free_bytes)
        if config.gpu_mem and config.gpu_mem > gpu_free_bytes:
            warnings.append(
                f"--gpu-mem is more than the {gpu_free_bytes / 2**30:.1f} GiB free of {gpu_total_bytes / 2**30:.1f}; "
                "the free memory counts"
            )
    elif gpu_bytes is not None:
        # What stands in for a GPU's memory is this machine's own.
        if gpu_bytes > available:
            warnings.append(f"--gpu-mem is more than the {gib(available)} that can be had here, which count")
        gpu_bytes = min(gpu_bytes, available)
        available -= gpu_bytes
    if config.cpu_mem and config.cpu_mem > available:
        warnings.append(f"--cpu-mem is more than the {gib(available)} that can be had, which count")
    machine = Machine(
        device=device,
        gpu_bytes=gpu_bytes,
        cpu_bytes=min(config.cpu_mem or available, available),
        gpu_capped=config.gpu_mem is not None,
        cpu_capped=config.cpu_mem is not None,
        offload_dir=config.offload_dir.expanduser().absolute(),
        disk_bytes=disk_bytes,
    )
    return machine, warnings


def choose_dtype(wanted: str, source: ModelSource, device: str) -> str:
    """The number format: as asked; auto is the checkpoint's on CUDA and float32 on CPU."""
    if wanted != "auto":
        return wanted
    if device == "cpu":
        return "float32"
    text = source.config.get("text_config") or source.config
    kept = str(
        source.config.get("dtype") or source.config.get("torch_dtype") or text.get("dtype") or "float16"
    )
    return kept.removeprefix("torch.")


def vocab_size(source: ModelSource) -> int:
    """Size of the model's vocabulary, by its config."""
    text = source.config.get("text_config") or source.config
    return int(text["vocab_size"])


def known_spec(source: ModelSource) -> ModelSpec | None:
    """The model's dimensions, or None for an architecture that nothing can be predicted for."""
    try:
        return ModelSpec.from_hf_config(source.config, source.name)
    except OffloadError as error:
        log.info("no prediction and no limit: %s", error)
        return None


def local_profile(
    request: PlanRequest, hardware: Hardware, tell: Callable[[str], None]
) -> "tuple[HardwareProfile, list[str]]":
    """This machine's profile, measured where none is kept, and warnings; `tell` is called with what takes time then."""
    from profiling.profiler import BUILDING, LAYERS, forced, take_profile

    told = ""

    def on_progress(part: str, *_: object) -> None:
        nonlocal told
        phase = {BUILDING: part, LAYERS: "time layers of the model (once a week)"}.get(
            part, "profile the machine (once a week)"
        )
        if phase != told:
            tell(phase)
            told = phase

    profile, warnings = take_profile(
        hardware,
        request.spec,
        device=request.machine.device,
        dtype=request.dtype,
        offload_dir=request.machine.offload_dir,
        cache=cache_dir() / "profiles",
        refresh=forced(os.environ),
        on_progress=on_progress,
    )
    if told:  # Else a run's peak of memory would depend on whether the profile was there.
        reset_peak_rss()
    if profile.busy:
        warnings.append(
            f"the machine was busy when it was profiled: {len(profile.noisy)} of {len(profile.measurements)} rates vary "
            "by over 15 %, and predictions rest on them; FORCE_RERUN_PROFILER=1 measures again"
        )
    return profile, warnings
