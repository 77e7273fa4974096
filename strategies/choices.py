"""What a search chooses among: variants, cuts into micro-batches, kinds of program; and the limits it keeps to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexllmgen.placement import PlacementPlan, fillable_bytes
from flexllmgen.policy import Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from flexllmgen.workspace import CHUNK_TOKENS
from profiling.layer_times import LayerTimes
from profiling.profile import HardwareProfile

_MICRO_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes that a policy may take. With `shared` the first two tiers lie in the same memory of `cpu_bytes`.

    `gpu_bytes` is None where only that memory sets a limit.
    """

    gpu_bytes: int | None
    cpu_bytes: int
    disk_bytes: int
    shared: bool = False

    @property
    def fillable_gpu_bytes(self) -> int | None:
        """What is planned to be filled of `gpu_bytes`: a little is left free."""
        return None if self.gpu_bytes is None else fillable_bytes(self.gpu_bytes)

    def fits(self, plan: PlacementPlan) -> bool:
        """Whether the engine would load this placement, with a little of the device's memory left free."""
        host = plan.cpu_bytes + (plan.gpu_bytes if self.shared else 0)
        return (
            (self.fillable_gpu_bytes is None or plan.gpu_bytes <= self.fillable_gpu_bytes)
            and host <= self.cpu_bytes
            and plan.disk_bytes <= self.disk_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What of a policy is neither shares nor cut: where it attends, what it compresses, which experts its steps bring in."""

    cpu_attention: bool = False
    weight_bits: int | None = None
    kv_bits: int | None = None
    chosen_experts: bool = False

    @staticmethod
    def of(policy: Policy) -> "Variant":
        return Variant(
            cpu_attention=policy.cpu_attention,
            weight_bits=policy.weight_bits,
            kv_bits=policy.kv_bits,
            chosen_experts=policy.chosen_experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The integer choices."""

    size: int
    count: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Kind:
    """What a program may use beside the two memories."""

    disk: bool
    hidden_elsewhere: bool


# The plain kinds first: what they come to rules most of the others out.
KINDS = (Kind(False, False), Kind(False, True), Kind(True, False), Kind(True, True))


def kinds_of(variant: Variant) -> Iterator[Kind]:
    """The kinds of program that a variant has; the plain ones first."""
    # Where the CPU attends, hidden states stay on the device.
    return (kind for kind in KINDS if not (kind.hidden_elsewhere and variant.cpu_attention))


def all_variants(
    spec: ModelSpec, profile: HardwareProfile, times: LayerTimes, bits: int | None
) -> Iterator[Variant]:
    """What is searched; the ones that move least first, since what they come to rules out most of the others."""
    accelerated = profile.device != "cpu"
    for weight_bits in (bits, None) if bits else (None,):
        for kv_bits, cpu_attention in _kept_and_read(times, bits):
            # Without an accelerator the CPU attends anyway.
            if cpu_attention and not accelerated:
                continue
            # Experts by choice are for small blocks, and whole layers bound more of those.
            for chosen_experts in (False, True) if accelerated and spec.num_experts else (False,):
                yield Variant(
                    cpu_attention=cpu_attention,
                    weight_bits=weight_bits,
                    kv_bits=kv_bits,
                    chosen_experts=chosen_experts,
                )


def _kept_and_read(times: LayerTimes, bits: int | None) -> Iterator[tuple[int | None, bool]]:
    """Bits of the KV, and whether the CPU attends to what lies in host memory: as it is, or in 8 bits."""
    if bits:
        yield bits, False
        if times.cpu_attention_codes_bytes_per_s:
            yield 8, True
    yield None, True
    yield None, False


def all_cuts(workload: Workload, wanted: int | None, *, capped: bool) -> Iterator[Cut]:
    """The integer choices for a workload; with `wanted`, only blocks of so many sequences.

    Args:
        capped: the device's memory has a limit of its own; without one prefill is never cut smaller.
    """
    total = workload.num_sequences
    sizes = {size for size in _MICRO_BATCHES if size <= total}
    sizes |= {-(-total // count) for count in _COUNTS}
    if wanted is not None:
        sizes = {-(-wanted // count) for count in _COUNTS}
    for size in sorted(sizes):
        for count in _COUNTS:
            block = size * count
            # A last micro-batch may be ragged, but none may be empty; nor may a block be larger than wanted.
            if block - size >= total or (wanted is not None and min(block, total) != wanted):
                continue
            rows = size * workload.prompt_tokens
            # Of those that hold the whole micro-batch one is enough.
            smaller = [chunk for chunk in CHUNK_TOKENS if chunk < rows]
            whole = [chunk for chunk in CHUNK_TOKENS if chunk >= rows][-1:]
            for chunk in [*whole, *smaller] if capped else CHUNK_TOKENS[:1]:
                yield Cut(size=size, count=count, chunk=chunk)


def cuts_beside(cut: Cut, cuts: Sequence[Cut]) -> list[Cut]:
    """Cuts of about the same block in other micro-batches, and the same with another chunk."""
    block, near = cut.size * cut.count, []
    for other in cuts:
        near_block = alike(other.size * other.count, block) and 0.4 <= other.size / cut.size <= 2.5
        if other != cut and near_block and (other.chunk == cut.chunk or other.size == cut.size):
            near.append(other)
    return near


def alike(block: int, other: int) -> bool:
    return 0.75 <= block / other <= 1.34
