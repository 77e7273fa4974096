"""The machine's profile: whole, JSON-ready, and the same fingerprint for the same machine."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from profiling import hardware
from profiling.hardware import available_memory_bytes, free_disk_bytes, read_hardware


class NotSupportedError(Exception):
    """As NVML raises for what a device cannot tell."""


class FakeNvml:
    """A driver with one GPU, some of whose questions go unanswered."""

    NVMLError = NotSupportedError

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's names
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return 9, 0

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"NVIDIA H200"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def __getattr__(self, name: str) -> Any:
        def answer(*_: object) -> Any:
            if self.silent:
                raise NotSupportedError(name)
            return dataclasses.make_dataclass("Memory", ["total"])(2**37) if "Memory" in name else 5

        return answer


def fake(monkeypatch: pytest.MonkeyPatch, *, silent: bool) -> None:
    import contextlib

    monkeypatch.setattr(hardware, "nvml", lambda: contextlib.nullcontext(FakeNvml(silent=silent)))


def test_the_profile_is_json_and_whole(tmp_path: Path) -> None:
    profile = read_hardware(tmp_path / "not" / "there" / "yet")
    shown = json.loads(json.dumps(profile.as_dict()))
    assert shown["schema_version"] == 1
    assert shown["memory_bytes"] > 2**28
    assert shown["logical_cores"] >= shown["physical_cores"] >= 1
    assert shown["cpu"]
    assert shown["disk"]["free_bytes"] <= shown["disk"]["total_bytes"]
    assert shown["disk"]["filesystem"] != "unknown"
    assert len(profile.fingerprint) == 16
    assert profile.cpu in profile.summary
    assert "\n" not in profile.summary


def test_the_fingerprint_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_hardware(tmp_path)
    (tmp_path / "file").write_bytes(b"x" * 10**6)
    monkeypatch.setattr(hardware, "_memory_limit", lambda: 1234)
    after = read_hardware(tmp_path)
    assert after.memory_bytes != before.memory_bytes
    assert after.fingerprint == before.fingerprint
    monkeypatch.setattr(hardware, "_cpu_model", lambda: "another processor")
    assert read_hardware(tmp_path).fingerprint != before.fingerprint


@pytest.mark.parametrize("silent", [False, True])
def test_a_gpu_that_does_not_answer_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    without = read_hardware(tmp_path)
    fake(monkeypatch, silent=silent)
    profile = read_hardware(tmp_path)
    (gpu,) = profile.gpus
    assert (gpu.name, gpu.compute_capability) == ("NVIDIA H200", "9.0")
    assert (gpu.memory_bytes, gpu.pcie_generation) == ((0, None) if silent else (2**37, 5))
    assert profile.driver == "580.1"
    assert "NVIDIA H200" in profile.summary
    two = dataclasses.replace(profile, gpus=profile.gpus[:1] * 2)
    assert two.summary == profile.summary.replace("NVIDIA H200", "2 x NVIDIA H200")
    assert profile.fingerprint != without.fingerprint


def test_memory_within_the_control_groups_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_memory_bytes() <= psutil.virtual_memory().total
    monkeypatch.setattr(hardware, "_memory_limit", lambda: 10_000)
    assert available_memory_bytes() == 10_000


@pytest.mark.parametrize(("text", "expected"), [("max\n", 2**36), ("1048576\n", 2**20), (str(2**60), 2**36)])
def test_the_control_groups_limit(monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    total = dataclasses.make_dataclass("Memory", ["total"])(2**36)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: total)
    read = Path.read_text

    def read_text(path: Path, **options: Any) -> str:
        return text if path == Path("/sys/fs/cgroup/memory.max") else read(path, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert hardware._memory_limit() == expected


def test_free_disk_of_a_folder_to_come(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "a" / "b") == pytest.approx(
        psutil.disk_usage(str(tmp_path)).free, rel=0.2
    )
