"""Bytes beside what is placed: a row of the KV cache as it is kept, and what computing takes. Pure: counted, not measured."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from flexllmgen.compressed_size import compressed_bytes
from flexllmgen.policy import Policy, Tier
from flexllmgen.spec import ModelSpec
from flexllmgen.units import PAGE, round_up
from flexllmgen.workload import Workload

CHUNK_TOKENS = (8192, 4096, 2048, 1024, 1)
"""Positions that prefill may compute at once: the first that fits is taken, whole sequences at the least."""
KV_SCRATCH_BYTES = 128 << 20
"""Compressed KV is turned back for so many sequences at once as come to this, for one at the least."""

Recording = Literal["none", "layers", "step"]
"""What of a decode step is recorded: nothing, each layer's work for a micro-batch, or all of it."""
RECORDED_BYTES: Mapping[Recording, int] = {"none": 0, "layers": 96 << 20, "step": 256 << 20}
"""What is recorded has memory of its own; a layer's work takes less than a step of all layers."""


def recorded_part(
    spec: ModelSpec,
    policy: Policy,
    context: int,
    *,
    accelerated: bool,
    streamed_weights: bool,
    streamed_others: bool,
) -> Recording:
    """What of a decode step a CUDA device replays from a graph; `context` is the positions there is room for.

    A graph cannot attend to a window that moves, nor to as many rows as a length says: where they are turned back or chosen.
    With KV or hidden states on the link, that sets the pace, and each graph starts and ends later than its kernels alone would.
    """
    windowed = any(0 < window < context for window in spec.sliding_windows)
    if not accelerated or streamed_others or windowed or spec.num_experts:
        return "none"
    if policy.kv_bits or policy.attn_sparsity < 1:
        return "none"
    return "layers" if streamed_weights else "step"


def row_bytes(spec: ModelSpec, policy: Policy, sequences: int, dtype_bytes: int, *, tier: Tier) -> int:
    """Bytes of one position's keys and values of `sequences` sequences in one layer, as a tier keeps them.

    On disk they are whole pages.
    """
    if policy.kv_bits is None:
        num_bytes = 2 * spec.kv_size * sequences * dtype_bytes
    else:
        num_bytes = compressed_bytes((sequences, 2, spec.kv_size), policy.kv_bits, policy.kv_group_size)
    return round_up(num_bytes, PAGE) if tier == "disk" else num_bytes


class Exchange(NamedTuple):
    """Bytes of a layer and sequence that is attended to on the CPU: its query, key and value go down, the outcome comes up."""

    query: int
    key_value: int
    outcome: int

    @property
    def down(self) -> int:
        return self.query + self.key_value


def exchange_row(spec: ModelSpec, dtype_bytes: int, policy: Policy | None = None) -> Exchange:
    """What goes down and up for attention on the CPU; keys and values as the policy keeps them, without one as they are.

    >>> from flexllmgen.spec import OPT_125M
    >>> exchange_row(OPT_125M, dtype_bytes=2)
    Exchange(query=1536, key_value=3072, outcome=1536)
    """
    query = spec.query_size * dtype_bytes
    kept = 2 * spec.kv_size * dtype_bytes
    if policy is not None:
        kept = row_bytes(spec, policy, 1, dtype_bytes, tier="gpu")
    return Exchange(query=query, key_value=kept, outcome=query)


def kv_scratch(
    spec: ModelSpec, policy: Policy, workload: Workload, dtype_bytes: int, largest_part: int
) -> tuple[int, int]:
    """Sequences whose compressed KV is turned back at once, and the bytes of that and of the keys' centres.

    `largest_part` is the most sequences of a micro-batch on one tier.
    """
    if policy.kv_bits is None:
        return 0, 0
    position = 2 * spec.kv_size * dtype_bytes
    each = round_up(workload.max_context, 8) * position
    sequences = min(largest_part, max(1, KV_SCRATCH_BYTES // each))
    block = min(policy.block_size, workload.num_sequences)
    return sequences, sequences * each + spec.num_layers * block * position // 2


def recompute_scratch(
    spec: ModelSpec, policy: Policy, workload: Workload, dtype_bytes: int, largest_part: int
) -> tuple[int, int]:
    """Sequences whose keys and values are made anew at once, and the bytes that this takes.

    `largest_part` is the most sequences of a micro-batch whose layer's input is kept.
    """
    if not largest_part:
        return 0, 0
    room = round_up(workload.max_context, 8)
    each = room * 2 * spec.kv_size * dtype_bytes
    sequences = min(largest_part, max(1, KV_SCRATCH_BYTES // each))
    # Inputs as rows of one product, its output, and keys while they are normalised and rotated.
    elements = sequences * room * (spec.hidden_size + 2 * spec.kv_size)
    if spec.traits.positions == "rotary":
        elements += sequences * room * 4 * spec.kv_size
        # Rotations of every position, and what they are made from.
        elements += 2 * min(policy.block_size, workload.num_sequences) * room * spec.head_dim
    return sequences, int(elements * dtype_bytes * 1.25)


def workspace_bytes(
    spec: ModelSpec,
    policy: Policy,
    workload: Workload,
    dtype_bytes: int,
    chunk_tokens: int,
    accelerated: bool,
) -> int:
    """Bytes that computing takes at its peak: counted from the decoder's temporaries."""
    batch, prompt = min(policy.micro_batch_size, workload.num_sequences), workload.prompt_tokens
    rows = min(max(chunk_tokens, prompt), batch * prompt)
    sequences = max(1, rows // prompt)
    inner = spec.intermediate_size * (3 if spec.traits.gated else 2)
    # Attention: the norm, q/k/v as one, rotated copies of q and k (expanded to all heads where a mask is),
    # output.
    attention = 2 * spec.hidden_size + 5 * spec.query_size + 6 * spec.kv_size
    if policy.kv_bits:
        attention += spec.kv_size  # Keys as they are quantised.
    mlp = 2 * spec.hidden_size + inner
    if spec.num_experts:
        # A row for each of a token's experts: taken together, computed and put back.
        chosen = max(4 * spec.hidden_size, spec.hidden_size + 3 * spec.intermediate_size)
        mlp += chosen * spec.experts_per_token + 4 * spec.num_experts
    context = round_up(workload.max_context, 8)
    mask = sequences * prompt * prompt * 2 + batch * context * 2
    fp32 = 2 if dtype_bytes == 2 else 1
    logits = batch * spec.vocab_size * (1 + 2 * fp32)
    # A sparse step's scores in fp32, and its keys and values taken together.
    sparse = batch * context * (6 * spec.num_heads + 2 * spec.kv_size) if policy.attn_sparsity < 1 else 0
    rope = 2 * min(policy.block_size, workload.num_sequences) * prompt * spec.head_dim
    # A step computes a whole micro-batch at once, however small a prompt's chunks are.
    elements = (
        max(rows, batch) * max(attention, mlp) + mask + logits + rope + sparse + 2 * batch * spec.hidden_size
    )
    # What the caching allocator loses to rounding and to blocks of other sizes; matrix libraries' workspace.
    return int(elements * dtype_bytes * 1.25) + ((160 << 20) if accelerated else 0)
