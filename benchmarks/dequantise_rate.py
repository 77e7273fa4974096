"""How fast compressed weights are turned back on a GPU, at a model's shapes, beside the rate of a copy within its memory.

    python benchmarks/dequantise_rate.py --model opt-30b

One line for each number of bits: GB/s read and written, GB/s of numbers, the share of the copy's rate (read and written,
as well), and milliseconds of a layer.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from flexllmgen.compression import BITS, compressed_bytes, dequantise, quantise
from flexllmgen.images import pack
from flexllmgen.models.published import published_config
from flexllmgen.policy import Policy
from flexllmgen.spec import ModelSpec

ROUNDS = 20


def timed_s(work: object) -> float:
    """Median seconds of the device for one call."""
    assert callable(work)
    work()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def copy_bytes_per_s() -> float:
    """Bytes read and written by a copy of 1 GiB."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.nbytes / timed_s(lambda: target.copy_(source))


def layer(spec: ModelSpec, bits: int, group_size: int, dtype: torch.dtype) -> tuple[float, int, int]:
    """Seconds, compressed bytes and bytes of numbers of one layer's matrices."""
    images, _ = pack(
        spec, Policy(micro_batch_size=1, weight_bits=bits, weight_group_size=group_size), dtype.itemsize
    )
    works, read, written = [], 0, 0
    for tensor in images[2].tensors.values():
        if not tensor.bits:
            continue
        some = torch.randn(64, tensor.shape[1], device="cuda").to(dtype)
        parts = [part.repeat(-(-tensor.shape[0] // 64), 1) for part in quantise(some, bits, group_size)]
        parts = [part[: tensor.shape[0]] for part in parts]
        out = torch.empty(tensor.shape, dtype=dtype, device="cuda")
        works.append((*parts, bits, group_size, out))
        read += compressed_bytes(tensor.shape, bits, group_size)
        written += out.nbytes

    def work() -> None:
        for each in works:
            dequantise(*each)

    return timed_s(work), read, written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="opt-30b")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", default="float16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("dequantise_rate: needs a CUDA device")
    spec = ModelSpec.from_hf_config(published_config(args.model), args.model)
    copied = copy_bytes_per_s()
    print(f"{torch.cuda.get_device_name()}: copy within memory {copied / 1e9:.0f} GB/s, read and written")
    for bits in BITS:
        seconds, read, written = layer(spec, bits, args.group_size, getattr(torch, args.dtype))
        moved = (read + written) / seconds
        print(
            f"{args.model}, {bits} bits: {moved / 1e9:.0f} GB/s read and written ({moved / copied:.0%} of the copy), "
            f"{written / seconds / 1e9:.0f} GB/s of numbers, {seconds * 1e3:.3f} ms a layer"
        )


if __name__ == "__main__":
    main()
