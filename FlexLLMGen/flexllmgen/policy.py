"""Policy: how a block of requests is cut into micro-batches, and which share of what lives on which tier."""

from dataclasses import dataclass
from typing import Literal

from flexllmgen.compressed_size import check_bits
from flexllmgen.errors import PolicyError
from flexllmgen.units import DISK_THREADS

Tier = Literal["gpu", "cpu", "disk"]
TIERS: tuple[Tier, ...] = ("gpu", "cpu", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Shares (0..1) of some bytes on the compute device, in host memory and on disk; they sum to one.

    `gpu` means memory of the compute device: without an accelerator, that is host memory too.

    >>> Placement.from_percent(gpu=20, cpu=50)
    Placement(gpu=0.2, cpu=0.5, disk=0.3)
    >>> Placement.from_percent(gpu=70, cpu=50)
    Traceback (most recent call last):
    ...
    flexllmgen.errors.PolicyError: shares of 70 % gpu and 50 % cpu sum to 120 %; lower one so that they sum to \
at most 100 (disk is the rest)
    """

    gpu: float = 0.0
    cpu: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.gpu, self.cpu, self.disk)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise PolicyError(
                f"shares gpu={self.gpu:g}, cpu={self.cpu:g}, disk={self.disk:g} sum to {sum(shares):g}; "
                "make each at least 0 and their sum 1"
            )

    @staticmethod
    def from_percent(gpu: float, cpu: float, name: str = "") -> "Placement":
        """Two percentages; disk is the rest. `name` leads an error's text: what the user calls the two."""
        lead = f"{name}: " if name else ""
        if gpu < 0 or cpu < 0:
            raise PolicyError(f"{lead}shares of {gpu:g} % gpu and {cpu:g} % cpu must not be negative")
        # 32.4 and 67.6 sum to a little more than 100 in binary.
        if gpu + cpu > 100 + 1e-9:
            raise PolicyError(
                f"{lead}shares of {gpu:g} % gpu and {cpu:g} % cpu sum to {gpu + cpu:g} %; "
                "lower one so that they sum to at most 100 (disk is the rest)"
            )
        return Placement(gpu=gpu / 100, cpu=cpu / 100, disk=max(0.0, (100 - gpu - cpu) / 100))


ON_GPU = Placement(gpu=1.0)
ON_CPU = Placement(cpu=1.0)
ON_DISK = Placement(disk=1.0)

_READ = ((8, 64), (8, 128))
"""Bits and groups of the KV that the CPU's attention reads as they are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One way to serve a block of `micro_batch_size` x `num_micro_batches` sequences.

    Args:
        pin_weight: weights in host memory are page-locked, so that copies run at the link's rate.
        overlap: how many loads run ahead of the compute they are for; 0 runs the same steps in turn.
        sep_layer: attention and MLP are loaded as two steps, which halves the slots on the device.
        copy_threads: threads that read and write the disk.
        weight_bits: 8 or 4: the layers' matrices are stored and streamed as integers of so many bits, a scale and a zero
            for each `weight_group_size` of them; None leaves them as they are.
        cpu_attention: a decode step attends to the KV in host memory on the CPU, where it lies, and not on the device.
        kv_bits: 8 or 4: keys and values are kept, on every tier, as integers of so many bits, a scale and a zero for each
            `kv_group_size` (32, 64 or 128) of them; None leaves them as they are.
        chosen_experts: a decode step brings in a mixture's experts when its router has chosen them, and only those; what
            comes before them is loaded ahead as always. A prompt's pass loads whole layers.
        recompute: of the sequences whose KV the policy places in host memory, the share of which the layer's input is kept there
            instead of keys and values. A decode step brings it to the device, which makes keys and values of it anew: of fewer
            bytes (half, where each head has keys of its own) for the products of all cached positions.
        attn_sparsity: share of the cached positions whose values a decode step uses, those of the largest weights; 1 is
            all of them. What lies on other tiers is brought in whole all the same: a position's key and value are one row.

    >>> Policy(micro_batch_size=4, num_micro_batches=3).block_size
    12
    """

    micro_batch_size: int
    num_micro_batches: int = 1
    weights: Placement = ON_GPU
    kv_cache: Placement = ON_GPU
    activations: Placement = ON_GPU
    pin_weight: bool = True
    overlap: int = 1
    sep_layer: bool = False
    copy_threads: int = DISK_THREADS
    weight_bits: int | None = None
    weight_group_size: int = 64
    cpu_attention: bool = False
    kv_bits: int | None = None
    kv_group_size: int = 64
    attn_sparsity: float = 1.0
    chosen_experts: bool = False
    recompute: float = 0.0

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "num_micro_batches", "copy_threads"):
            if getattr(self, name) < 1:
                raise PolicyError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.overlap <= 8:
            raise PolicyError(f"overlap must be between 0 and 8, not {self.overlap}")
        check_bits(self.weight_bits, self.weight_group_size, "weight")
        check_bits(self.kv_bits, self.kv_group_size, "kv")
        if self.cpu_attention and self.activations != ON_GPU:
            raise PolicyError(
                "attention on the CPU needs all hidden states on the device; "
                "give activations a gpu share of 100 % or turn cpu_attention off"
            )
        if not 0 < self.attn_sparsity <= 1:
            raise PolicyError(f"attn_sparsity must be above 0 and at most 1, not {self.attn_sparsity:g}")
        if self.cpu_attention and self.attn_sparsity < 1:
            raise PolicyError(
                "attention on the CPU reads all values; turn off either cpu_attention or attn_sparsity (1)"
            )
        if (
            self.cpu_attention
            and self.kv_bits is not None
            and (self.kv_bits, self.kv_group_size) not in _READ
        ):
            raise PolicyError(
                "attention on the CPU reads keys and values as they are, or in 8 bits and groups of 64 or 128; "
                "change kv_bits (8) and kv_group_size, or turn cpu_attention off"
            )
        if not 0 <= self.recompute <= 1:
            raise PolicyError(f"recompute must be between 0 and 1, not {self.recompute:g}")
        if self.recompute and (self.kv_bits is not None or self.attn_sparsity < 1):
            other = "kv_bits" if self.kv_bits is not None else "attn_sparsity (1)"
            raise PolicyError(
                f"keys and values that are made anew are used as they are; turn off either recompute (0) or {other}"
            )

    @property
    def block_size(self) -> int:
        """Sequences that are in flight together."""
        return self.micro_batch_size * self.num_micro_batches

    @property
    def lossless(self) -> bool:
        """Whether nothing is stored or read with less precision than it has."""
        return self.weight_bits is None and self.kv_bits is None and self.attn_sparsity == 1


def values_used(positions: int, share: float) -> int:
    """Of so many positions that a step attends to, those whose values it uses under an `attn_sparsity` of `share`.

    >>> values_used(10, 0.25), values_used(1, 0.25)
    (2, 1)
    """
    return positions if share == 1 else max(1, round(share * positions))
