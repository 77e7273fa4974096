"""The protocol every strategy keeps, and what flows through it.

    ModelSource + Workload + Limits -> Strategy.plan -> Plan -> Strategy.build -> Engine -> token columns

Knows nothing of prompts' text, of clocks, or of how a run is recorded.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from flexllmgen.workload import Workload
from profiling.cost_model import CostEstimate

if TYPE_CHECKING:
    import torch

    from flexllmgen.spec import ModelSpec
    from profiling.profile import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model as resolved: where its weights lie, or that they are drawn at random.

    Args:
        name: as the user named it.
        path: local folder with config (and weights, unless random); None where only `config` is known.
        config: the Hugging Face config as a plain dictionary.
        revision: the commit of a hub snapshot.
    """

    name: str
    path: Path | None
    config: Mapping[str, Any]
    weights: Literal["pretrained", "random"]
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What of the hardware a plan may use; memory in bytes, None where there is no such device.

    `gpu_bytes` and `cpu_bytes` are caps: what the user allowed, else what is free. `disk_bytes` is given for a
    machine that is not this one; here the offload directory is looked at.
    """

    device: Literal["cuda", "cpu"]
    gpu_bytes: int | None
    cpu_bytes: int
    gpu_capped: bool
    cpu_capped: bool
    offload_dir: Path
    disk_bytes: int | None = None

    @property
    def shares_memory(self) -> bool:
        """Without a GPU, and without --gpu-mem to emulate one, both memory tiers lie in the same memory."""
        return self.device == "cpu" and self.gpu_bytes is None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything a strategy may look at to plan a run.

    `spec` is None for an architecture whose dimensions we do not know; nothing can be predicted then. `allow_lossy` lets a
    strategy that searches choose plans that change what is generated; what its own keys ask for needs no leave.
    """

    model: ModelSource
    workload: Workload
    batch_size: int
    dtype: str
    machine: Machine
    seed: int
    spec: "ModelSpec | None" = None
    profile: "HardwareProfile | None" = None
    allow_lossy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a strategy is going to do; made and shown before a weight is loaded.

    Args:
        batch_size: sequences that one call of `Engine.generate` takes; a strategy may have chosen others than were asked for.
        weight_bytes: planned bytes of weights by tier: gpu, cpu, disk.
        kv_bytes: planned bytes of KV cache by tier, at full context, of one batch.
        workspace_bytes: bytes for activations and buffers on the compute device.
        details: what only this strategy has (a device map, a policy), JSON-ready.
        predicted: what the strategy's own model of itself says the run will take.
        limit: what the machine's measured rates allow at best for this plan.
        lossless: whether the plan generates what the plain model does; a run of one that does not measures by how much.
    """

    request: PlanRequest
    strategy: str
    batch_size: int
    weight_bytes: Mapping[str, int]
    kv_bytes: Mapping[str, int]
    workspace_bytes: int
    details: Mapping[str, Any] = field(default_factory=dict)
    predicted: CostEstimate | None = None
    limit: CostEstimate | None = None
    warnings: tuple[str, ...] = ()
    lossless: bool = True

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The most that each tier is to hold: as predicted, else weights, KV cache and workspace."""
        if self.predicted is not None and self.predicted.peak_bytes:
            return dict(self.predicted.peak_bytes)
        peak = {
            tier: self.weight_bytes.get(tier, 0) + self.kv_bytes.get(tier, 0)
            for tier in ("gpu", "cpu", "disk")
        }
        peak["gpu" if self.request.machine.device == "cuda" else "cpu"] += self.workspace_bytes
        return peak

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready view, as recorded in plan.json."""
        request = self.request
        return {
            "strategy": self.strategy,
            "model": request.model.name,
            "model_path": None if request.model.path is None else str(request.model.path),
            "dtype": request.dtype,
            "device": request.machine.device,
            "gpu_cap_bytes": request.machine.gpu_bytes,
            "cpu_cap_bytes": request.machine.cpu_bytes,
            "num_sequences": request.workload.num_sequences,
            "prompt_tokens": request.workload.prompt_tokens,
            "gen_tokens": request.workload.gen_tokens,
            "batch_size": self.batch_size,
            "batch_size_asked": request.batch_size,
            "lossless": self.lossless,
            "weight_bytes": dict(self.weight_bytes),
            "kv_bytes": dict(self.kv_bytes),
            "workspace_bytes": self.workspace_bytes,
            "predicted": None if self.predicted is None else asdict(self.predicted),
            "limit": None if self.limit is None else asdict(self.limit),
            **self.details,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What was really placed where, read back from the loaded model; bytes by tier.

    `offload_files_bytes` are bytes in files under the offload directory; `pinned_bytes` is page-locked
    host memory; `counters` are figures that go to the metrics; `details` go to plan.json.
    """

    weight_bytes: Mapping[str, int]
    offload_files_bytes: int
    pinned_bytes: int
    counters: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A loaded model. Holds no clock: it yields, and who consumes may time.

    `plan` is what it runs: the plan it was built from, unless the strategy learnt better while loading.
    """

    plan: Plan

    def generate(
        self, ids_BT: "torch.Tensor", mask_BT: "torch.Tensor", gen_tokens: int
    ) -> "Iterator[torch.Tensor]":
        """Yield `gen_tokens` columns of token ids, int64 of shape (B,), each when it is on the host."""
        ...

    def placed(self) -> Placed:
        """What lies where now, read back from the model."""
        ...


@runtime_checkable
class CountsTraffic(Protocol):
    """An engine that counts what it moves; not every one can."""

    def moved_bytes(self) -> Mapping[str, int]:
        """Bytes over each link since loading began, as moved_h2d_bytes and the like; from any thread, at any time."""
        ...


@runtime_checkable
class Scores(Protocol):
    """An engine that can say how likely it finds a text; not every one can."""

    def score(self, ids_BT: "torch.Tensor", *, prompt_tokens: int) -> "torch.Tensor":
        """Log-probabilities of each token after the first, float32 of shape (B, T - 1), B being any number.

        `prompt_tokens` are read at once, the others one a step, as when they are generated.
        """
        ...


class Strategy(Protocol):
    """A way to run a model that does not fit its GPU."""

    name: str

    def plan(self, request: PlanRequest) -> Plan:
        """Decide what lies where, loading no weight.

        Raises:
            PlanInfeasible: it cannot fit; the message has the numbers and the way out.
        """
        ...

    def build(self, plan: Plan) -> AbstractContextManager[Engine]:
        """Load the model as planned; leaving the context frees memory, threads and temporary files."""
        ...


def out_of_memory_reason(error: Exception) -> str:
    """What torch could not allocate, without its paragraph of advice.

    >>> out_of_memory_reason(Exception("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."))
    'CUDA out of memory. Tried to allocate 2.00 GiB'
    """
    return ". ".join(str(error).split(". ")[:2])
