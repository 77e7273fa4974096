"""Measured rates: plausible, kept, measured again when they should be."""

import dataclasses
import json
from pathlib import Path

import pytest

from flexllmgen.errors import OffloadDirError
from flexllmgen.memory.disk import DirectFile
from profiling import rates as rates_module
from profiling.hardware import read_hardware
from profiling.rates import MAX_AGE_S, Rates, measure_disk, measure_rates, measured_rates


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Rates:
    return measure_rates(device="cpu", dtype="float32", offload_dir=tmp_path_factory.mktemp("offload"))


def test_rates_are_plausible_for_any_machine(measured: Rates) -> None:
    assert 1e9 < measured.compute_flops_per_s < 1e15
    assert 1e8 < measured.host_bytes_per_s < 1e13
    assert 1e6 < measured.disk_read_bytes_per_s < 1e12
    assert 1e6 < measured.disk_write_bytes_per_s < 1e12
    assert measured.h2d_bytes_per_s is None
    assert "h2d_bytes_per_s" not in measured.as_dict()


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    measure_disk(tmp_path, num_bytes=16 << 20)
    assert list(tmp_path.iterdir()) == []


def test_a_nearly_full_disk_is_measured_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    class Counted(DirectFile):
        def __init__(self, path: Path, *, writable: bool = False, size: int | None = None) -> None:
            written.append(size)
            super().__init__(path, writable=writable, size=size)

    monkeypatch.setattr(rates_module, "DirectFile", Counted)
    monkeypatch.setattr(rates_module, "free_disk_bytes", lambda path: 70 << 20, raising=False)
    read, write = measure_disk(tmp_path)
    assert written == [32 << 20]
    assert min(read, write) > 0


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises((OffloadDirError, OSError)):
        measure_disk(file / "below", num_bytes=16 << 20)


def test_kept_rates_are_used_until_they_are_old(
    measured: Rates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def count(**_: object) -> Rates:
        calls.append(1)
        return dataclasses.replace(measured, measured_at=rates_module.time.time())

    monkeypatch.setattr(rates_module, "measure_rates", count)
    hardware = read_hardware(tmp_path)

    def get(dtype: str = "float32") -> Rates:
        return measured_rates(
            hardware, device="cpu", dtype=dtype, offload_dir=tmp_path, cache=tmp_path / "cache"
        )

    assert get() == get()
    assert len(calls) == 1
    get("float16")
    assert len(calls) == 2
    for file in (tmp_path / "cache").iterdir():
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({**kept, "measured_at": kept["measured_at"] - MAX_AGE_S - 1}))
    get()
    assert len(calls) == 3
    for file in (tmp_path / "cache").iterdir():
        file.write_text("{ damaged")
    get()
    assert len(calls) == 4
