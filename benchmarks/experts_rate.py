"""How fast a mixture's experts are computed together on a GPU, at a model's shapes, beside one dense product of the same work.

    python benchmarks/experts_rate.py --model Mixtral-8x7B-v0.1

One line for each number of rows: milliseconds of a layer's experts, TFLOP/s and GB/s of the weights of the experts that
were chosen; and TFLOP/s of a dense product of as many rows as there are assignments, which reads its weights once.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from dequantise_rate import timed_s

from flexllmgen.models.experts import expert_addresses, grouped_experts
from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec


def experts_of(spec: ModelSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights of a layer's experts, one after another in memory, and where each begins."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    weights = {}
    for kind, shape in (("gate_up", (2 * inner, hidden)), ("down", (hidden, inner))):
        table = 0.02 * torch.randn(spec.num_experts, *shape, device="cuda", dtype=dtype)
        weights |= {f"experts.{expert}.{kind}": table[expert] for expert in range(spec.num_experts)}
    return weights | expert_addresses(weights, spec.num_experts, torch.device("cuda"))


def gated(inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def measure(spec: ModelSpec, weights: dict[str, torch.Tensor], rows: int, dtype: torch.dtype) -> str:
    """One line of figures for so many rows, each sent to experts at random."""
    chosen, hidden, inner = spec.experts_per_token, spec.hidden_size, spec.intermediate_size
    x = torch.randn(rows, hidden, device="cuda", dtype=dtype)
    shares, experts = torch.rand(rows, spec.num_experts, device="cuda").topk(chosen, dim=-1)
    shares = (shares / shares.sum(dim=-1, keepdim=True)).to(dtype)

    def together() -> torch.Tensor:
        return grouped_experts(weights, x, shares, experts, gated, spec.num_experts)

    spread = torch.randn(rows * chosen, hidden, device="cuda", dtype=dtype)
    first, second = weights["experts.0.gate_up"], weights["experts.0.down"]

    def dense() -> torch.Tensor:
        return F.linear(gated(F.linear(spread, first)), second)

    flops = 6 * rows * chosen * hidden * inner
    read = experts.unique().numel() * 3 * hidden * inner * dtype.itemsize
    seconds, dense_s = timed_s(together), timed_s(dense)
    return (
        f"{rows:6d} rows: {seconds * 1e3:8.3f} ms, {flops / seconds / 1e12:6.1f} TFLOP/s "
        f"({flops / dense_s / 1e12:.1f} dense), {read / seconds / 1e9:6.0f} GB/s of weights"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen3-30B-A3B")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 96, 192, 1024, 8192])
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("experts_rate: needs a CUDA device")
    spec = ModelSpec.from_hf_config(published_config(args.model), args.model)
    if not spec.num_experts:
        sys.exit(f"experts_rate: {args.model} is no mixture of experts; try Qwen3-30B-A3B")
    dtype = getattr(torch, args.dtype)
    weights = experts_of(spec, dtype)
    print(f"{torch.cuda.get_device_name()}, {args.model}, {args.dtype}")
    for rows in args.rows:
        print(measure(spec, weights, rows, dtype))


if __name__ == "__main__":
    main()
