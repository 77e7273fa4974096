"""Attention of a decode step on the CPU: bytes of KV read a second, against the memory's own rate and torch's attention.

    python benchmarks/cpu_attention.py [--threads 8,12,15] [--call-mib 64 [--pause-us 500]] [--out cpu_attention.json]

Prints a table and writes JSON. With a GPU all is measured twice: alone, and while copies from page-locked memory to
the GPU run without a pause. Each row has the memory's read rate, measured beside it, and the share of it that the attention
reaches: as torch sums an array with all cores, which is how a profile measures it, and as fast as the kernel's own threads
can read in order, which is more; all by the median of the trials, torch's attention by the mean of two. Bytes are those
stored: codes of 8 bits with their scales and zeros.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "FlexLLMGen"))

from flexllmgen.compressed_size import compressed_bytes
from flexllmgen.kv_cache import by_sequence
from flexllmgen.memory.mapping import map_memory

GIB = 1 << 30
SHAPES = {"MHA, 56 heads of 128": (56, 56, 128), "GQA, 64 on 8 heads of 128": (64, 8, 128)}
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPS: dict[str, int] = {"int8, groups of 64": 64, "int8, groups of 128": 128}
PAUSE_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--threads", default="", help="counts, with commas; without: the cores less one, 3/4 and 1/2"
    )
    parser.add_argument("--gib", type=float, default=1.0, help="KV that is read; two such buffers take turns")
    parser.add_argument(
        "--call-mib",
        type=float,
        default=float("inf"),
        help="by calls of up to so much, one after another, as of a step's micro-batches; without: by one",
    )
    parser.add_argument(
        "--pause-us",
        type=float,
        default=0,
        help="before each of these calls, as while a step computes; not counted",
    )
    parser.add_argument("--context", type=int, default=544)
    parser.add_argument("--trials", type=int, default=9)
    kinds: list[str] = [*DTYPES, *GROUPS]
    parser.add_argument(
        "--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=f"of {', '.join(kinds)}"
    )
    parser.add_argument("--out", type=Path, default=Path("cpu_attention.json"))
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    default = sorted({max(1, count) for count in (cores - 1, cores * 3 // 4, cores // 2)}, reverse=True)
    counts = [int(count) for count in args.threads.split(",")] if args.threads else default

    from flexllmgen.cpu_attention import which

    if which() == "torch":
        sys.exit("the kernel could not be built: see the line above")
    cut = args.call_mib * (1 << 20), args.pause_us / 1e6
    bench = Bench(int(args.gib * GIB), args.context, args.trials, args.kinds, cut)
    rows: list[dict[str, Any]] = []
    for load in ("alone", "under copies") if torch.cuda.is_available() else ("alone",):
        with copies() if load == "under copies" else nothing() as copied:
            for threads in counts:
                rows += report(bench.kernel_rows(threads), load, copied)
            rows += report(bench.torch_rows(counts[0]), load, copied)
    result = {
        "kernel": which(),
        "cores": cores,
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "context": args.context,
        "kv_bytes": bench.num_bytes,
        "call_bytes": min(bench.call_bytes, bench.num_bytes),
        "pause_s": bench.pause_s,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{which()} kernel on {cores} cores of {cpu_name()}; written to {args.out}")


class Bench:
    """KV in two buffers that take turns, so that no call finds its own in a cache."""

    def __init__(
        self, num_bytes: int, context: int, trials: int, kinds: list[str], cut: tuple[float, float]
    ) -> None:
        self.num_bytes, self.context, self.trials, self.kinds = num_bytes, context, trials, kinds
        self.call_bytes, self.pause_s = cut
        self.buffers = [torch.frombuffer(map_memory(num_bytes), dtype=torch.uint8) for _ in range(2)]
        for buffer in self.buffers:  # Small numbers in every format: bytes of 0x3c are fp16 ones, bf16 0.01.
            buffer.fill_(0x3C)

    def kernel_rows(self, threads: int) -> Iterator[dict[str, Any]]:
        from flexllmgen.cpu_attention import _kernel, prepare_attention

        kernel, summed = _kernel(128), min(self.num_bytes, GIB) // 4 * 4
        assert kernel is not None
        for shape in SHAPES:
            for name in self.kinds:
                calls, num_bytes, paused_s = self._calls(shape, name, threads, prepare_attention)
                reads = [
                    lambda each=each: kernel.read(each[: self.num_bytes], threads) for each in self.buffers
                ]
                sums = [each[:summed].view(torch.float32).sum for each in self.buffers]
                # In turns: what else the machine does then troubles all alike.
                seconds, read_s, sum_s = self._timed(calls, reads, sums)
                rates = num_bytes / (seconds - paused_s), self.num_bytes / read_s, summed / sum_s
                yield row("kernel", shape, name, threads, *rates)

    def torch_rows(self, threads: int) -> Iterator[dict[str, Any]]:
        """torch's attention on the same KV where it lies, as FlexLLMGen calls it without a kernel."""
        from flexllmgen.cpu_attention.fallback import attend_with_torch

        def prepare(
            q: torch.Tensor, kv: torch.Tensor, length: int, *, out_BNH: torch.Tensor, threads: int
        ) -> Callable[[], None]:
            return functools.partial(
                attend_with_torch, q, kv, length, None, first=0, out_BNH=out_BNH, threads=threads,
                scale_S2BKG=None, zero_S2BKG=None, group_size=64,
            )  # fmt: skip

        for shape in SHAPES:
            for name in (kind for kind in self.kinds if kind in DTYPES):
                calls, num_bytes, paused_s = self._calls(shape, name, threads, prepare)
                (seconds,) = self._timed(calls[:1], trials=2)
                yield row("torch", shape, name, threads, num_bytes / (seconds - paused_s))

    def _calls(
        self, shape: str, name: str, threads: int, prepare: Callable[..., Callable[[], None]]
    ) -> tuple[list[Callable[[], None]], int, float]:
        """For each buffer what reads its KV, the bytes that this reads, and the seconds that it pauses."""
        heads, num_kv_heads, size = SHAPES[shape]
        group, numbers = GROUPS.get(name), num_kv_heads * size
        dtype = (
            torch.bfloat16 if group else DTYPES[name]
        )  # of queries, and of keys and values that are no codes
        each = compressed_bytes((2, numbers), 8, group) if group else 2 * numbers * dtype.itemsize
        sequences = self.num_bytes // (each * self.context)
        q = torch.randn(sequences, heads, size).to(dtype)
        out = torch.empty_like(q)
        num_bytes = sequences * self.context * each
        at_once = max(1, int(min(self.call_bytes, num_bytes)) // (each * self.context))
        starts = range(0, sequences, at_once)
        calls = []
        for buffer in self.buffers:  # Laid out as the engine's cache is.
            rows = buffer[:num_bytes].view(sequences, self.context, each)
            run = []
            for start in starts:
                mine = slice(start, start + at_once)
                kv, *sides = by_sequence(
                    rows[mine], num_kv_heads, size, dtype=None if group else dtype, group_size=group or 0
                )
                more = {"scale_S2BKG": sides[0], "zero_S2BKG": sides[1], "group_size": group} if group else {}
                run.append(prepare(q[mine], kv, self.context, out_BNH=out[mine], threads=threads, **more))
            calls.append(functools.partial(_one_after_another, run, self.pause_s))
        return calls, num_bytes, self.pause_s * len(starts)

    def _timed(self, *actions: list[Callable[[], object]], trials: int | None = None) -> list[float]:
        """The median of the trials of each, its variants taking turns. Each begins when torch's threads, which spin for some
        time after their work, have gone to sleep."""
        seconds: list[list[float]] = [[] for _ in actions]
        for trial in range(1 + (trials or self.trials)):
            for index, variants in enumerate(actions):
                time.sleep(PAUSE_S)
                started = time.perf_counter()
                variants[trial % len(variants)]()
                if trial:
                    seconds[index].append(time.perf_counter() - started)
        return [statistics.median(each) for each in seconds]


def _one_after_another(calls: list[Callable[[], None]], pause_s: float) -> None:
    for call in calls:
        until = time.perf_counter() + pause_s
        while time.perf_counter() < until:  # Awake, as what waits for a device is.
            pass
        call()


def row(
    who: str,
    shape: str,
    name: str,
    threads: int,
    rate: float,
    read_rate: float | None = None,
    sum_rate: float | None = None,
) -> dict[str, Any]:
    figures = {"who": who, "shape": shape, "dtype": name, "threads": threads, "kv_bytes_per_s": rate}
    figures |= {"read_bytes_per_s": read_rate, "share": rate / read_rate if read_rate else None}
    return figures | {"sum_bytes_per_s": sum_rate, "share_of_sum": rate / sum_rate if sum_rate else None}


def report(rows: Iterator[dict[str, Any]], load: str, copied: Callable[[], float]) -> list[dict[str, Any]]:
    """Prints rows as they are measured."""
    done = []
    copied()
    for each in rows:
        full = each | {"load": load, "h2d_bytes_per_s": copied()}
        done.append(full)
        against = " " * 38
        if each["share"]:
            against = (
                f"of {each['read_bytes_per_s'] / 1e9:6.1f}: {each['share']:4.0%} "
                f"(of {each['sum_bytes_per_s'] / 1e9:6.1f} summed: {each['share_of_sum']:4.0%})"
            )
        beside = f"   copies {full['h2d_bytes_per_s'] / 1e9:.1f}" if full["h2d_bytes_per_s"] else ""
        print(
            f"{load:12} {each['who']:6} {each['shape']:26} {each['dtype']:19} {each['threads']:3} threads "
            f"{each['kv_bytes_per_s'] / 1e9:6.1f} GB/s {against}{beside}",
            flush=True,
        )
    return done


@contextmanager
def nothing() -> Iterator[Callable[[], float]]:
    yield lambda: 0.0


@contextmanager
def copies() -> Iterator[Callable[[], float]]:
    """Copies to the GPU, always several under way; gives the rate since it was last asked."""
    pinned = torch.empty(GIB // 2, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(pinned, device="cuda")
    ended, moved = threading.Event(), [0]

    def run() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            pending: list[torch.cuda.Event] = []
            while not ended.is_set():
                device.copy_(pinned, non_blocking=True)
                # A blocking event: waiting for it takes no core from the attention.
                event = torch.cuda.Event(blocking=True)
                event.record(stream)
                pending.append(event)
                if len(pending) > 3:
                    pending.pop(0).synchronize()
                    moved[0] += pinned.nbytes
            stream.synchronize()

    last = [time.perf_counter(), 0]

    def rate() -> float:
        now, total = time.perf_counter(), moved[0]
        since, before = last
        last[:] = [now, total]
        return (total - before) / (now - since)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    try:
        yield rate
    finally:
        ended.set()
        thread.join()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


if __name__ == "__main__":
    main()
