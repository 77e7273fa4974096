"""Strategy `accelerate`: Hugging Face's own offloading, as its users run it.

Whole modules are mapped to GPU, host memory and disk (`infer_auto_device_map`), accelerate's hooks
bring them in when they run, and transformers' `generate` decodes greedily. This is the yardstick, so
nothing here is tuned beyond what the two libraries offer.
"""

import errno
import fcntl
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flexllmgen.errors import OffloadDirError, OutOfMemory, PlanInfeasible, UsageError
from flexllmgen.units import gib
from profiling.hardware import available_memory_bytes, free_disk_bytes
from profiling.limit import Traffic, physical_limit
from strategies.accelerate_config import Config
from strategies.accelerate_cost import predict
from strategies.accelerate_engine import AccelerateEngine
from strategies.accelerate_load import WeightSizes, load_pretrained, load_random, meta_model
from strategies.base import Plan, PlanRequest, out_of_memory_reason

log = logging.getLogger(__name__)


def create(config: Config) -> "AccelerateStrategy":
    """The strategy under its configuration."""
    return AccelerateStrategy(config)


class AccelerateStrategy:
    """Plans a device map under the caps, loads by it, generates through transformers."""

    name = "accelerate"

    def __init__(self, config: Config) -> None:
        self.config = config

    def plan(self, request: PlanRequest) -> Plan:
        """Map whole modules to tiers, counting KV cache, activations and the module in transit.

        Raises:
            PlanInfeasible: one module alone does not fit beside KV cache and activations, offloading
                is off and the model does not fit, or the disk is too full.
            UsageError: a key of the configuration cannot work here.
        """
        request = _with_one_memory(request)
        config, machine = self.config, request.machine
        warnings = []
        if config.quantize != "none":
            _check_quantize(request)
        kv_offload = config.enable_kv_offload
        if kv_offload and machine.device == "cpu":
            warnings.append(
                "enable_kv_offload has no effect without a GPU: the KV cache is in host memory already"
            )
            kv_offload = False

        model = meta_model(request.model, request.dtype, config.attn_implementation)
        sizes = WeightSizes.of(model, bits=_BITS[config.quantize])
        kv_bytes = (
            request.batch_size
            * request.workload.max_context
            * kv_bytes_per_token(model.config, request.dtype)
        )
        workspace = _workspace_bytes(model.config, request)
        # With the KV cache offloaded, transformers holds the running layer's and the next one's on the device, and
        # makes a new copy of the running layer's.
        kv_on_device = kv_bytes * 3 // _num_layers(model.config) if kv_offload else kv_bytes
        device_map = _map_modules(
            model, sizes, request, kv_on_device + workspace, kv_bytes if kv_offload else 0, config
        )
        weight_bytes = sizes.by_tier(device_map)
        # A machine that is not this one says what it has.
        elsewhere = machine.disk_bytes is not None
        free = free_disk_bytes(machine.offload_dir) if machine.disk_bytes is None else machine.disk_bytes
        if weight_bytes["disk"] > free:
            raise PlanInfeasible(
                f"{gib(weight_bytes['disk'])} of weights go to disk, {machine.offload_dir} has {gib(free)} free; "
                "free some space, name another --offload-dir, or raise --cpu-mem"
            )
        tier = "gpu" if machine.device == "cuda" else "cpu"
        kv_tiers = {"gpu": 0, "cpu": 0, "disk": 0}
        kv_tiers["cpu" if kv_offload else tier] = kv_bytes
        available = available_memory_bytes()
        if elsewhere and request.profile is not None:
            available = request.profile.capacity.host_available_bytes
        page_cached = 0 < weight_bytes["disk"] < available // 2
        if page_cached:
            warnings.append(
                f"{gib(weight_bytes['disk'])} of weights on disk fit this machine's page cache, through which accelerate "
                "reads: after the first pass they come from memory, whatever --cpu-mem says"
            )
        predicted = limit = None
        # Quantised weights have rates of their own, which nothing here has measured.
        if request.spec is not None and request.profile is not None and config.quantize == "none":
            if elsewhere:
                warnings.append(
                    "no prediction: accelerate's own cost is timed where it runs; the limit holds for that machine"
                )
            else:
                try:
                    predicted = predict(
                        request.spec,
                        model.config,
                        request,
                        weight_bytes,
                        kv_offload=kv_offload,
                        page_cached=page_cached,
                        rates=request.profile.typical,
                    )
                except torch.OutOfMemoryError:
                    warnings.append(
                        "no prediction: to time a layer and the head of this model took more than the GPU's free memory"
                    )
            traffic = Traffic(
                batch_size=request.batch_size,
                weight_bytes=weight_bytes,
                kv_shares={place: kv / kv_bytes for place, kv in kv_tiers.items()},
                dtype_bytes=_itemsize(request.dtype),
                page_cached=page_cached,
            )
            limit = physical_limit(request.spec, request.workload, traffic, request.profile.best)
        return Plan(
            request=request,
            predicted=predicted,
            limit=limit,
            strategy=self.name,
            batch_size=request.batch_size,
            weight_bytes=weight_bytes,
            kv_bytes=kv_tiers,
            workspace_bytes=workspace,
            details={
                "device_map": {name: str(place) for name, place in device_map.items()},
                **({"quantize": config.quantize} if config.quantize != "none" else {}),
            },
            warnings=tuple(warnings),
            lossless=config.quantize == "none",
        )

    @contextmanager
    def build(self, plan: Plan) -> Iterator[AccelerateEngine]:
        """Load as planned. Files under the offload directory belong to this run and go with it.

        Raises:
            OutOfMemory: memory ran out while loading.
            OffloadDirError: the offload directory ran full.
            CheckpointError: the checkpoint is damaged or incomplete.
        """
        request = plan.request
        device_map: dict[str, Any] = {
            name: int(place) if place.isdigit() else place
            for name, place in plan.details["device_map"].items()
        }
        with _own_folder(request.machine.offload_dir) as folder:
            engine = None
            try:
                if request.machine.device == "cuda" and request.machine.gpu_capped:
                    _cap_gpu(request.machine.gpu_bytes)
                load = load_random if request.model.weights == "random" else load_pretrained
                model = load(request, self.config, device_map, folder)
                device = request.machine.device
                kv_offload = device == "cuda" and plan.kv_bytes["cpu"] > 0
                engine = AccelerateEngine(model, plan, device=device, kv_offload=kv_offload, folder=folder)
                yield engine
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(
                    f"the GPU ran out of memory ({out_of_memory_reason(error)}); lower --batch-size, --input-len or --gen-len"
                ) from error
            except (OSError, SafetensorError) as error:
                if (getattr(error, "errno", None) == errno.ENOSPC) or "os error 28" in str(error):
                    raise OffloadDirError(
                        f"no space left in {request.machine.offload_dir}, where {gib(plan.weight_bytes['disk'])} of weights "
                        "go; free some, or name another --offload-dir"
                    ) from error
                raise
            finally:
                if engine is not None:
                    engine.close()


def _with_one_memory(request: PlanRequest) -> PlanRequest:
    """Where --gpu-mem emulates a GPU on the CPU, its memory and the host's count as one.

    accelerate has no second device there to copy modules to: it computes where they lie, so that only the sum of the two
    caps can hold. What is beyond it goes to disk, as it does for the other strategies.
    """
    machine = request.machine
    if machine.device != "cpu" or machine.gpu_bytes is None:
        return request
    return replace(
        request,
        machine=replace(
            machine,
            gpu_bytes=None,
            cpu_bytes=machine.gpu_bytes + machine.cpu_bytes,
            gpu_capped=False,
            cpu_capped=machine.gpu_capped or machine.cpu_capped,
        ),
    )


@contextmanager
def _own_folder(offload_dir: Path) -> Iterator[Path]:
    """A new folder under the offload directory, for this run alone; it goes when the context is left.

    A run that is killed leaves its folder, which may be as large as the model: the next one removes it. That
    a folder is in use is told by a lock on a file in it, which ends with its process however that ends.
    """
    offload_dir.mkdir(parents=True, exist_ok=True)
    for left in offload_dir.glob("accelerate-*"):
        with suppress(OSError), (left / _LOCK).open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.info("removing %s, left by a run that was killed", left)
            shutil.rmtree(left, ignore_errors=True)
    # Under a hidden name until it is locked, so that no other run takes it for a leftover.
    name = f"accelerate-{uuid.uuid4().hex[:12]}"
    hidden, folder = offload_dir / f".{name}", offload_dir / name
    hidden.mkdir()
    try:
        with (hidden / _LOCK).open("wb") as lock:
            # Without locks (some network file systems) a leftover stays; that is all.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            hidden.rename(folder)
            yield folder
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


_LOCK = ".lock"
_BITS: Mapping[str, int | None] = {"none": None, "int8": 8, "int4": 4}


def kv_bytes_per_token(config: Any, dtype: str) -> int:
    """Bytes of KV cache for one position of one sequence over all layers, of any decoder transformers knows.

    2 (K and V) x layers x KV heads x head size x bytes per number.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * _num_layers(config) * kv_heads * head_size * _itemsize(dtype))


def _num_layers(config: Any) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _workspace_bytes(config: Any, request: PlanRequest) -> int:
    """What prefill of one batch needs beside weights and KV: activations of a layer, logits of a position.

    Counted: the residual stream twice, Q, K, V and the attention output, the MLP's two intermediates, and
    logits in the compute type and in float32. On a GPU also what measured runs showed beside them: cuBLAS's own
    workspace, and a tenth of the memory that the caching allocator holds in pieces too small to use.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden)
    rows = request.batch_size * request.workload.prompt_tokens
    size = _itemsize(request.dtype)
    needed = rows * (6 * hidden + 2 * inner) * size + request.batch_size * int(text.vocab_size) * (size + 4)
    if request.machine.device == "cuda":
        assert request.machine.gpu_bytes is not None
        needed += (96 << 20) + request.machine.gpu_bytes // 10
    return needed


def _map_modules(
    model: Any, sizes: WeightSizes, request: PlanRequest, device_extra: int, host_extra: int, config: Config
) -> dict[str, Any]:
    machine = request.machine
    on_gpu = machine.device == "cuda"
    device: int | str = 0 if on_gpu else "cpu"
    cap = machine.gpu_bytes if on_gpu else machine.cpu_bytes
    assert cap is not None
    cap_option = "--gpu-mem" if on_gpu else "--cpu-mem"
    where = "GPU" if on_gpu else "host memory"
    total = sizes.total
    if total + device_extra <= cap:
        return {"": device}
    ways_out = "lower --batch-size, --input-len or --gen-len" + (
        f", or raise {cap_option}" if (machine.gpu_capped if on_gpu else machine.cpu_capped) else ""
    )
    if not config.enable_offload:
        raise PlanInfeasible(
            f"weights {gib(total)} + KV cache and activations {gib(device_extra)} exceed the {where}'s {gib(cap)}, "
            f"and enable_offload is off; {ways_out}, or --set enable_offload=true"
        )
    largest_name, largest = sizes.largest_block
    if largest + device_extra > cap:
        raise PlanInfeasible(
            f"the largest single module ({largest_name}, {gib(largest)}) + KV cache and activations "
            f"{gib(device_extra)} exceed the {where}'s {gib(cap)}; {ways_out}"
        )
    return sizes.spread(
        model,
        device=device,
        device_bytes=cap - device_extra,
        host_bytes=max(machine.cpu_bytes - host_extra, 0) if on_gpu else None,
    )


def _check_quantize(request: PlanRequest) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UsageError(
            "quantize needs the package bitsandbytes: pip install bitsandbytes, or --set quantize=none"
        ) from None
    if request.model.weights == "random":
        raise UsageError("quantize works on a checkpoint, not with --weights random; --set quantize=none")


def _cap_gpu(gpu_bytes: int | None) -> None:
    """Let torch's allocator refuse what a smaller GPU would refuse."""
    assert gpu_bytes is not None
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_bytes / total))
