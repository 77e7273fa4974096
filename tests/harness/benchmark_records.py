"""A finished benchmark folder as the runner leaves it: three strategies at two batch sizes, figures made up but consistent.

The model is OPT-6.7B in half precision (12.4 GiB) on a GPU of 8 GiB. `accelerate-b4` is the baseline. Every cell has two
launches of three repeats, each with a folder of its own; nothing here is drawn or delivered.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from records import START_MS

from harness.benchmark.parity import with_parity
from harness.benchmark.record import Benchmark, Cell, CellStatus, Parity, cell_folder
from harness.config import EvalConfig
from harness.provenance import process_identity
from harness.results import (
    CellLink,
    DatasetRecord,
    Provenance,
    Repeat,
    RunError,
    RunResult,
    RunStatus,
    Timeline,
    write_json,
    write_jsonl,
    write_text,
)

BENCHMARK_UUID = "b5a1e0000000400080000000000000b5"
STRATEGIES, BATCH_SIZES = ("accelerate", "flexgen", "autoflex"), (4, 8)
LAUNCHES, REPEATS = 2, 3
NUM_PROMPTS, INPUT_LEN, GEN_LEN = 8, 128, 32
COMMIT = "4f1c2d9" + "0" * 33
GIB = 1 << 30
WEIGHT_BYTES, KV_BYTES_PER_TOKEN = int(12.4 * GIB), 2 * 32 * 4096 * 2

# Per strategy: seconds of prefill and of a decode step for a batch of 4, and the share of the weights on the GPU, host, disk.
_SPEED = {"accelerate": (1.9, 0.82), "flexgen": (1.4, 0.41), "autoflex": (1.2, 0.33)}
_SHARES = {"accelerate": (0.5, 0.5, 0.0), "flexgen": (0.4, 0.6, 0.0), "autoflex": (0.55, 0.45, 0.0)}
_KEYS: dict[str, dict[str, Any]] = {
    "accelerate": {"enable_offload": True, "enable_kv_offload": False, "quantize": "none"},
    "flexgen": {"w_gpu_percent": 40, "w_cpu_percent": 60, "cache_gpu_percent": 100, "num_micro_batches": 2},
    "autoflex": {"objective": "throughput", "calibrate": True},
}


def cell_name(strategy: str, batch_size: int) -> str:
    """The name that the cell has in these folders."""
    return f"{strategy}-b{batch_size}"


def make_cell(strategy: str, batch_size: int, **changes: Any) -> Cell:
    """A finished cell of two launches."""
    name = cell_name(strategy, batch_size)
    common = EvalConfig(
        strategy=strategy,
        model="facebook/opt-6.7b",
        weights="random",
        num_prompts=NUM_PROMPTS,
        input_len=INPUT_LEN,
        gen_len=GEN_LEN,
        batch_size=batch_size,
        gpu_mem=8 * GIB,
        repeats=REPEATS,
    )
    fields: dict[str, Any] = {
        "name": name,
        "axes": {"strategy": strategy, "batch_size": batch_size},
        "common": common.model_dump(mode="json"),
        "strategy_config": _KEYS[strategy],
        "sources": {"strategy": "option --strategy", "batch_size": "option --batch-size"},
        "status": CellStatus.FINISHED,
        "launches": [f"{name}-launch{launch}" for launch in range(LAUNCHES)],
        **changes,
    }
    return Cell.model_validate(fields)


def make_benchmark(**changes: Any) -> Benchmark:
    """A finished benchmark of six cells on identical prompts."""
    cells = [make_cell(strategy, size) for size in BATCH_SIZES for strategy in STRATEGIES]
    fields: dict[str, Any] = {
        "benchmark_uuid": BENCHMARK_UUID,
        "name": "seed opt-6.7b",
        "suite": "seed",
        "experiment": "offload-eval",
        "status": RunStatus.FINISHED,
        "started_at_ms": START_MS,
        "ended_at_ms": START_MS + 600_000,
        "launches": LAUNCHES,
        "cell_timeout_s": 1800.0,
        "baseline": cell_name("accelerate", BATCH_SIZES[0]),
        "cells": cells,
        "parity": {
            cell.name: Parity(equal_share=0.875, first_divergence=17)
            if cell.axes["strategy"] == "autoflex"
            else Parity(equal_share=1.0)
            for cell in cells
        },
        "process": {**process_identity(), "host": "gpu-box"},
        "provenance": _provenance("benchmark"),
        "tags": {"team": "inference"},
        "hardware_fingerprint": "c0ffee",
        "hardware_summary": "1x NVIDIA T4 (15 GiB), 16 cores, 64 GiB",
        **changes,
    }
    return Benchmark.model_validate(fields)


def make_cell_result(cell: Cell, benchmark: Benchmark | None = None, **changes: Any) -> RunResult:
    """The merged result of a finished cell: median over launches of each launch's median."""
    benchmark = benchmark or make_benchmark()
    strategy, batch_size = str(cell.axes["strategy"]), int(cell.common["batch_size"])
    launches = range(len(cell.launches))
    drawn = [_repeats(cell, launch, benchmark.started_at_ms) for launch in launches]
    repeats = [
        repeat.model_copy(update={"index": number})
        for number, repeat in enumerate(itertools.chain.from_iterable(drawn))
    ]
    by_launch = [_medians(one) for one in drawn]
    metrics = {name: median(one[name] for one in by_launch) for name in by_launch[0]}
    spread = {
        name: (max(one[name] for one in by_launch) - min(one[name] for one in by_launch)) / metrics[name]
        for name in metrics
    }
    link = CellLink(benchmark_uuid=benchmark.benchmark_uuid, cell=cell.name, launches=list(cell.launches))
    fields: dict[str, Any] = {
        **_common_fields(cell, benchmark),
        "run_uuid": f"{benchmark.benchmark_uuid}-{cell.name}",
        "run_name": f"{strategy} opt-6.7b b{batch_size}",
        "metrics": {**_once(cell, metrics), **metrics},
        "spread": spread,
        "cold": {"ttft_s": metrics["ttft_s"] * 1.6, "generation_tok_s": metrics["generation_tok_s"] * 0.8},
        "repeats": repeats,
        "itl_s": [_gaps(cell, number) for number in range(len(repeats))],
        "cell": link,
        **changes,
    }
    return RunResult.model_validate(fields)


def make_launch_result(cell: Cell, launch: int, benchmark: Benchmark | None = None) -> RunResult:
    """The result of one process of a cell, as `harness eval` writes one."""
    benchmark = benchmark or make_benchmark()
    repeats = _repeats(cell, launch, benchmark.started_at_ms)
    metrics = _medians(repeats)
    link = CellLink(benchmark_uuid=benchmark.benchmark_uuid, cell=cell.name, launches=[cell.launches[launch]])
    return RunResult(
        **_common_fields(cell, benchmark),
        run_uuid=cell.launches[launch],
        run_name=f"{cell.name} launch {launch + 1}",
        metrics={**_once(cell, metrics), **metrics},
        repeats=repeats,
        itl_s=[_gaps(cell, number) for number in range(len(repeats))],
        cell=link,
    )


def make_benchmark_folder(
    results: Path,
    benchmark: Benchmark | None = None,
    *,
    failed: Sequence[str] = (),
    lost: Sequence[str] = (),
    launch_folders: bool = True,
) -> Path:
    """Write `results/<benchmark uuid>/` and return it.

    Args:
        failed: names of cells that failed for want of memory after their plan: a result without figures.
        lost: names of cells that failed before they could leave any result.
        launch_folders: whether each launch has its own result folder too.
    """
    benchmark = benchmark or make_benchmark()
    benchmark = benchmark.model_copy(
        update={
            "cells": [
                _failed_cell(cell) if cell.name in (*failed, *lost) else cell for cell in benchmark.cells
            ],
            "parity": {
                name: parity for name, parity in benchmark.parity.items() if name not in (*failed, *lost)
            },
        }
    )
    folder = results / benchmark.benchmark_uuid
    benchmark.write(folder)
    for cell in benchmark.cells:
        if cell.name in lost:
            continue
        inside = cell_folder(folder, cell.name)
        result = make_cell_result(cell, benchmark)
        if cell.name in failed:
            nothing: dict[str, Any] = {"metrics": {}, "spread": {}, "repeats": [], "itl_s": [], "cold": {}}
            planned = {k: v for k, v in result.metrics.items() if k.startswith(("predicted", "limit"))}
            result = result.model_copy(
                update={
                    **nothing,
                    "metrics": {**planned, "peak_device_allocated_bytes": 7.9 * GIB},
                    "status": RunStatus.FAILED,
                    "error": cell.error,
                }
            )
        elif cell.name in benchmark.parity:
            result = with_parity(result, benchmark.parity[cell.name])
        _write_result_folder(inside, result, cell)
        if launch_folders and cell.name not in failed:
            for launch, uuid in enumerate(cell.launches):
                launched = make_launch_result(cell, launch, benchmark)
                _write_result_folder(inside / "launches" / uuid, launched, cell)
    return folder


def _failed_cell(cell: Cell) -> Cell:
    error = RunError(
        type="OutOfMemory",
        message="CUDA ran out of memory: predicted a peak of 6.1 GiB, reached 7.9 of 8.0; lower --batch-size",
        traceback="Traceback ...",
        exit_code=5,
    )
    return cell.model_copy(update={"status": CellStatus.FAILED, "error": error})


def _provenance(verb: str) -> Provenance:
    return Provenance(
        git_commit=COMMIT,
        git_branch="main",
        git_dirty=False,
        git_remote="https://git.example/code.git",
        command=f"/somewhere/bin/harness {verb} --model facebook/opt-6.7b",
        host="gpu-box",
        user="someone",
        versions={"python": "3.11.7", "torch": "2.13.0"},
    )


def _common_fields(cell: Cell, benchmark: Benchmark) -> dict[str, Any]:
    digest = "feedbeef" * 8
    return {
        "status": RunStatus.FINISHED,
        "experiment": benchmark.experiment,
        "strategy": cell.axes["strategy"],
        "model": cell.common["model"],
        "started_at_ms": benchmark.started_at_ms + 1000 * benchmark_index(cell),
        "ended_at_ms": benchmark.started_at_ms + 1000 * benchmark_index(cell) + 150_000,
        "process": benchmark.process,
        "params": {
            **{name: value for name, value in cell.common.items() if not isinstance(value, list)},
            **cell.strategy_config,
            "dtype": "float16",
            "device": "cuda",
        },
        "tags": benchmark.tags,
        "dataset": DatasetRecord(
            name="humaneval",
            source="openai/openai_humaneval",
            source_type="package",
            split="test",
            digest=digest,
            num_rows=164,
            num_prompts=NUM_PROMPTS,
            prompts_unique=NUM_PROMPTS,
            prompts_truncated=0,
            real_tokens=900,
            padded_tokens=124,
            prompt_mode="pad",
        ),
        "provenance": _provenance("benchmark"),
        "hardware_fingerprint": benchmark.hardware_fingerprint,
        "workload_key": f"opt-6.7b/humaneval-{digest[:8]}/n{NUM_PROMPTS}/in{INPUT_LEN}/gen{GEN_LEN}/float16",
        "plan": _plan(cell),
    }


def benchmark_index(cell: Cell) -> int:
    """The position of the cell in the grid that `make_benchmark` makes."""
    strategy, size = str(cell.axes["strategy"]), int(cell.common["batch_size"])
    sizes = BATCH_SIZES.index(size) if size in BATCH_SIZES else 0
    return sizes * len(STRATEGIES) + STRATEGIES.index(strategy)


def _times(cell: Cell) -> tuple[float, float]:
    """Seconds of a batch's prefill and of its decode step; a bigger batch shares the streamed weights."""
    prefill_s, step_s = _SPEED[str(cell.axes["strategy"])]
    size = int(cell.common["batch_size"])
    return prefill_s * (0.6 + 0.1 * size), step_s * (0.95 + 0.0125 * size)


def _gaps(cell: Cell, number: int) -> list[float]:
    drawn = random.Random(f"{cell.name} {number}")
    step_s = _times(cell)[1]
    return [step_s * (1 + 0.0008 * token + drawn.uniform(-0.01, 0.01)) for token in range(GEN_LEN - 1)]


def _repeats(cell: Cell, launch: int, started_at_ms: int) -> list[Repeat]:
    prefill_s, step_s = _times(cell)
    batches = NUM_PROMPTS // int(cell.common["batch_size"]) or 1
    tokens = NUM_PROMPTS * GEN_LEN
    repeats = []
    for index in range(REPEATS):
        drawn = random.Random(f"{cell.name} {launch} {index}")
        wobble = 1 + 0.01 * launch + drawn.uniform(-0.008, 0.008)
        ttft_s, tpot_s = prefill_s * wobble, step_s * wobble
        prefill, decode = batches * ttft_s, batches * tpot_s * (GEN_LEN - 1)
        repeats.append(
            Repeat(
                index=index,
                launch=launch,
                ended_at_ms=started_at_ms + 60_000 * (launch + 1) + 10_000 * index,
                metrics={
                    "ttft_s": ttft_s,
                    "tpot_s": tpot_s,
                    "e2e_s": prefill + decode,
                    "prefill_s": prefill,
                    "decode_s": decode,
                    "prefill_tok_s": 900 / prefill,
                    "decode_tok_s": NUM_PROMPTS * (GEN_LEN - 1) / decode,
                    "generation_tok_s": tokens / (prefill + decode),
                    "output_tokens": float(tokens),
                    "itl_p50_s": tpot_s,
                    "itl_p99_s": tpot_s * 1.06,
                },
            )
        )
    return repeats


def _medians(repeats: Sequence[Repeat]) -> dict[str, float]:
    return {name: median(one.metrics[name] for one in repeats) for name in repeats[0].metrics}


def _once(cell: Cell, metrics: dict[str, float]) -> dict[str, float]:
    gpu, cpu, disk = _SHARES[str(cell.axes["strategy"])]
    rate = metrics["generation_tok_s"]
    predicted, limit = rate * 1.08, rate * 1.6
    return {
        "plan_s": 0.4,
        "load_s": 21.0 + 3 * cpu,
        "repeats": float(LAUNCHES * REPEATS),
        "pinned_bytes": WEIGHT_BYTES * cpu,
        "offload_disk_bytes": WEIGHT_BYTES * disk,
        "weight_bytes_gpu": WEIGHT_BYTES * gpu,
        "weight_bytes_cpu": WEIGHT_BYTES * cpu,
        "weight_bytes_disk": WEIGHT_BYTES * disk,
        "peak_rss_bytes": WEIGHT_BYTES * cpu + 1.9 * GIB,
        "peak_device_allocated_bytes": WEIGHT_BYTES * gpu + 0.9 * GIB,
        "predicted_peak_gpu_bytes": WEIGHT_BYTES * gpu + 0.8 * GIB,
        "predicted_peak_cpu_bytes": WEIGHT_BYTES * cpu,
        "predicted_peak_disk_bytes": WEIGHT_BYTES * disk,
        "predicted_tok_s": predicted,
        "predicted_ttft_s": metrics["ttft_s"] / 1.08,
        "predicted_tpot_s": metrics["tpot_s"] / 1.08,
        "limit_tok_s": limit,
        "limit_ttft_s": metrics["ttft_s"] / 1.6,
        "limit_tpot_s": metrics["tpot_s"] / 1.6,
        "prediction_error": predicted / rate - 1,
        "attainment": rate / limit,
    }


def _plan(cell: Cell) -> dict[str, Any]:
    strategy, size = str(cell.axes["strategy"]), int(cell.common["batch_size"])
    tiers = ("gpu", "cpu", "disk")
    shares = _SHARES[strategy]
    prefill_s, step_s = _times(cell)
    batches = NUM_PROMPTS // size or 1
    prefill, decode = batches * prefill_s, batches * step_s * (GEN_LEN - 1)
    streamed = WEIGHT_BYTES * (1 - shares[0])

    def estimate(factor: float) -> dict[str, Any]:
        busy = {"host to device": 1.0, "compute": 0.3, "device memory": 0.1}
        return {
            "prefill_s": prefill * factor,
            "decode_s": decode * factor,
            "generation_tok_s": NUM_PROMPTS * GEN_LEN / ((prefill + decode) * factor),
            "prefill_bound": "host to device",
            "decode_bound": "host to device",
            "prefill_busy_s": {name: prefill * factor * share for name, share in busy.items()},
            "decode_busy_s": {name: decode * factor * share for name, share in busy.items()},
            "prefill_moved_bytes": {"h2d": streamed * batches, "d2h": 0.0},
            "decode_moved_bytes": {"h2d": streamed * batches * (GEN_LEN - 1), "d2h": 0.0},
            "peak_bytes": {"gpu": int(WEIGHT_BYTES * shares[0] + 0.8 * GIB), "cpu": int(streamed), "disk": 0},
        }

    plan: dict[str, Any] = {
        "strategy": strategy,
        "model": cell.common["model"],
        "dtype": "float16",
        "device": "cuda",
        "gpu_cap_bytes": cell.common["gpu_mem"],
        "cpu_cap_bytes": None,
        "num_sequences": NUM_PROMPTS,
        "prompt_tokens": INPUT_LEN,
        "gen_tokens": GEN_LEN,
        "batch_size": size,
        "weight_bytes": {tier: int(WEIGHT_BYTES * share) for tier, share in zip(tiers, shares, strict=True)},
        "kv_bytes": {"gpu": size * (INPUT_LEN + GEN_LEN) * KV_BYTES_PER_TOKEN, "cpu": 0, "disk": 0},
        "workspace_bytes": 200 << 20,
        "predicted": estimate(1 / 1.08),
        "limit": estimate(1 / 1.6),
    }
    if strategy == "accelerate":
        return {**plan, "device_map": {"model.layers.0": "cuda:0", "model.layers.1": "cpu"}}
    policy = {"micro_batch_size": size // 2, "num_micro_batches": 2, "overlap": 1, "sep_layer": False}
    whole = {"gpu": 100.0, "cpu": 0.0, "disk": 0.0}
    weights = {tier: 100 * share for tier, share in zip(tiers, shares, strict=True)}
    return {
        **plan,
        "policy": policy,
        "shares": {"weights": weights, "kv_cache": whole, "activations": whole},
    }


def _write_result_folder(folder: Path, result: RunResult, cell: Cell) -> None:
    result.write(folder)
    write_json(folder / "plan.json", result.plan)
    times = [0.05 * step for step in range(240)]
    gpu, cpu, _ = _SHARES[str(cell.axes["strategy"])]
    series: dict[str, list[float | None]] = {
        "rss_bytes": [1.9 * GIB + WEIGHT_BYTES * cpu * min(1.0, time / 3) for time in times],
        "device_allocated_bytes": [WEIGHT_BYTES * gpu * min(1.0, time / 3) for time in times],
        "cpu_percent": [180.0 for _ in times],
        "disk_read_bytes": [WEIGHT_BYTES * min(1.0, time / 3) for time in times],
    }
    phases = [("load", 0.0, 3.0), ("warm-up", 3.0, 5.0), ("repeat 1", 5.0, 8.0), ("repeat 2", 8.0, 12.0)]
    timeline = Timeline(started_at_ms=result.started_at_ms, time_s=times, series=series, phases=phases)
    write_text(folder / "timeline.json", timeline.model_dump_json())
    parts = 1 if cell.axes["strategy"] == "autoflex" else 0
    write_jsonl(
        folder / "requests.jsonl",
        [
            {
                "prompt_id": f"HumanEval/{number}",
                "prompt": f"def task_{number}():",
                "truncated": False,
                "input_ids": list(range(number, number + INPUT_LEN)),
                # The last sequence of autoflex differs from position 17 on: the parity that the benchmark states.
                "output_ids": [
                    100 + token + (parts if number == NUM_PROMPTS - 1 and token >= 17 else 0)
                    for token in range(GEN_LEN)
                ],
                "output_text": "    return",
            }
            for number in range(NUM_PROMPTS)
        ],
    )
    if result.error is not None:
        write_text(folder / "error.txt", result.error.traceback)
