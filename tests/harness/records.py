"""A result and its folder, as the worker leaves them."""

from pathlib import Path
from typing import Any

from harness.provenance import process_identity
from harness.results import (
    DatasetRecord,
    Provenance,
    Repeat,
    RunResult,
    RunStatus,
    Timeline,
    write_json,
    write_jsonl,
    write_text,
)

START_MS = 1_790_000_000_000
UUID = "3f2b8c1e-0000-4000-8000-000000000001"


def make_result(**changes: Any) -> RunResult:
    fields: dict[str, Any] = {
        "run_uuid": UUID,
        "status": RunStatus.FINISHED,
        "experiment": "offload-eval",
        "run_name": "accelerate-tiny",
        "strategy": "accelerate",
        "model": "owner/tiny",
        "started_at_ms": START_MS,
        "ended_at_ms": START_MS + 9000,
        "process": {**process_identity(), "host": "gpu-box"},
        "params": {
            "batch_size": 4,
            "gpu_mem": None,
            "enable_offload": True,
            "note": "x" * 7000,
            "top p (%)": 1,
        },
        "metrics": {"ttft_s": 0.5, "load_s": 2.0, "bad": float("inf"), "worse": float("nan")},
        "spread": {"ttft_s": 0.2},
        "cold": {"ttft_s": 0.9},
        "repeats": [
            Repeat(index=n, ended_at_ms=START_MS + 4000 + n, metrics={"ttft_s": ttft_s})
            for n, ttft_s in enumerate((0.4, 0.5, 0.5))
        ],
        "itl_s": [[0.1, 0.2], [0.1, 0.4], [0.3, 0.4]],
        "tags": {"team": "inference"},
        "dataset": DatasetRecord(
            name="humaneval",
            source="openai/openai_humaneval",
            source_type="package",
            split="test",
            digest="0123456789" * 6,
            num_rows=164,
            num_prompts=8,
            prompts_unique=8,
            prompts_truncated=0,
            real_tokens=900,
            padded_tokens=100,
            prompt_mode="pad",
        ),
        "provenance": Provenance(
            git_commit="a" * 40,
            git_branch="main",
            git_dirty=True,
            git_remote="https://git.example/code.git",
            command="/somewhere/bin/harness eval -n 8",
            user="someone",
        ),
        "hardware_fingerprint": "c0ffee",
        "workload_key": "8x128+32",
        **changes,
    }
    return RunResult.model_validate(fields)


def make_folder(results: Path, result: RunResult | None = None) -> Path:
    result = result or make_result()
    folder = results / result.run_uuid
    # result.json refuses inf and nan on the way back in; the tracker must not rely on that.
    finite = {name: value for name, value in result.metrics.items() if abs(value) < 1e300}
    result.model_copy(update={"metrics": finite}).write(folder)
    times = [0.05 * step for step in range(180)]
    series: dict[str, list[float | None]] = {
        "rss_bytes": [1e9 + time for time in times],
        "cpu_percent": [50.0 for _ in times],
        "disk_read_bytes": [2e8 * time for time in times],
        "gpu_0_memory_bytes": [None for _ in times],
        "gpu_1_power_w": [300.0 for _ in times],
    }
    timeline = Timeline(started_at_ms=START_MS, time_s=times, series=series, phases=[("load", 0.0, 2.0)])
    write_text(folder / "timeline.json", timeline.model_dump_json())
    write_jsonl(folder / "requests.jsonl", [{"prompt_id": "HumanEval/0"}])
    write_json(folder / "detail" / "plan.json", {"device_map": {}})
    write_text(folder / ".half.json", "{")
    (folder / "memory.png").write_bytes(b"\x89PNG")
    return folder
