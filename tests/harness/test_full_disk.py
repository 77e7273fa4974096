"""Disks that are really full: of results/, of the store, of the offload directory; small ones, in a namespace."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.benchmark.record import Benchmark, CellStatus, read_cells
from harness.results import RunResult, RunStatus

_MOUNT = ["unshare", "-rm", "mount", "-t", "tmpfs", "none"]


def _may_mount(folder: Path) -> bool:
    try:
        return subprocess.run([*_MOUNT, str(folder)], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def on_small_disks(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run a shell script in which `disk DIR SIZE` mounts a small disk, and `grow DIR` makes it large."""
    if not _may_mount(tmp_path):
        pytest.skip("no disk can be mounted in a namespace here (unshare -rm)")

    def run(script: str) -> subprocess.CompletedProcess[str]:
        prelude = f"""
            disk() {{ mkdir -p "$1"; mount -t tmpfs -o size="$2" none "$1"; }}
            grow() {{ mount -o remount,size=400m "$1"; }}
            harness() {{ {sys.executable} -m harness.cli "$@"; }}
        """
        return subprocess.run(
            ["unshare", "-rm", "sh", "-c", prelude + script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


def errors_in(text: str) -> list[str]:
    assert "Traceback" not in text
    assert "internal error" not in text
    return [line for line in text.splitlines() if line.startswith("error:")]


SMALL = "-n 2 -b 2 --input-len 16 --gen-len 8"

OnSmallDisks = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_no_room_for_results_is_told_before_anything_is_loaded(
    on_small_disks: OnSmallDisks, tiny_model: Path
) -> None:
    done = on_small_disks(
        f"disk results 64k; harness eval --no-mlflow --model {tiny_model} {SMALL}; echo code $?; ls -A results"
    )
    assert done.stdout.splitlines() == ["code 2"], done
    (line,) = errors_in(done.stderr)
    assert "No space left" in line
    assert "--results-dir" in line
    assert "load" not in done.stderr


@pytest.mark.slow
def test_results_that_fill_up_meanwhile_cost_no_repeat(
    on_small_disks: OnSmallDisks, tiny_model: Path, tmp_path: Path
) -> None:
    """Bulk and pictures find no room; the figures have room that was set aside, and are delivered later."""
    done = on_small_disks(
        f"""
        disk results 300k
        harness eval --no-mlflow --model {tiny_model} {SMALL} --repeats 60; echo code $?
        find results -name '.*' ; cp -r results kept
        grow results; harness sync results; echo code $?
        """
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 0"], (
        done
    )
    assert "could not be written: No space left" in done.stderr
    assert not errors_in(done.stderr)
    (folder,) = (tmp_path / "kept").iterdir()
    result = RunResult.read(folder)
    assert (result.status, len(result.repeats)) == (RunStatus.FINISHED, 60)
    assert any("could not be written" in warning for warning in result.warnings)
    for file in folder.glob("*.json"):
        json.loads(file.read_text())
    assert not [file for file in folder.rglob(".*") if file.suffix != ".json"]


@pytest.mark.slow
def test_a_benchmark_whose_results_fill_up_goes_on_later(
    on_small_disks: OnSmallDisks, tiny_model: Path, tmp_path: Path
) -> None:
    done = on_small_disks(
        f"""
        disk results 520k
        harness benchmark --no-mlflow --model {tiny_model} -s accelerate -s flexgen --launches 3 {SMALL} --repeats 2
        echo code $?; cp -r results kept
        grow results; harness benchmark --resume @latest --json > said; echo code $?; cp -r results ended
        """
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 2", "code 0"], (
        done
    )
    (line,) = errors_in(done.stderr)
    assert "No space left" in line
    assert "--resume" in line
    (kept,), (ended,) = ((tmp_path / name).iterdir() for name in ("kept", "ended"))
    # The fault is the disk's: no cell has failed by it.
    assert {cell.status for cell in Benchmark.read(kept).cells} == {CellStatus.PENDING}
    measured = {
        file.parent.name: RunResult.read(file.parent) for file in kept.rglob("launches/*/result.json")
    }
    finished = {uuid: one for uuid, one in measured.items() if one.status is RunStatus.FINISHED}
    assert finished
    benchmark = Benchmark.read(ended)
    assert [len(cell.launches) for cell in benchmark.cells] == [3, 3]
    assert set(finished) <= {uuid for cell in benchmark.cells for uuid in cell.launches}, (
        "measured once, kept"
    )
    assert {len(one.repeats) for one in read_cells(ended, benchmark).values()} == {6}
    assert json.loads((tmp_path / "said").read_text())["status"] == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("size", ["256k", "900k"])
def test_a_full_store_is_four_and_is_not_left_half_made(
    on_small_disks: OnSmallDisks, tiny_model: Path, size: str
) -> None:
    done = on_small_disks(
        f"""
        disk mlruns {size}
        harness eval --model {tiny_model} {SMALL} --repeats 2; echo code $?; ls mlruns
        grow mlruns; harness sync results; echo code $?
        """
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("code", "mlflow"))]
    assert said == ["code 4", "code 0"], done
    (line,) = errors_in(done.stderr)
    assert "full" in line
    assert "harness sync" in line


# Tells a planner that there is room, as there was before another program took it.
_LIE = """
import collections, os, shutil
if os.environ.get("ROOM_THAT_IS_NOT"):
    usage = collections.namedtuple("usage", "total used free")
    shutil.disk_usage = lambda _: usage(1 << 40, 0, 1 << 40)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "-s accelerate --cpu-mem 450kB",
        "-s flexgen --set w_gpu_percent=0",
        "-s flexgen --set cache_gpu_percent=0",
    ],
)
def test_a_full_offload_directory_is_one_line_and_left_clean(
    on_small_disks: OnSmallDisks, tiny_model: Path, tmp_path: Path, options: str
) -> None:
    (tmp_path / "lie").mkdir()
    (tmp_path / "lie" / "sitecustomize.py").write_text(_LIE)
    done = on_small_disks(
        f"""
        disk spill 400m
        harness profile --model {tiny_model} --offload-dir spill > /dev/null 2>&1
        head -c 500m /dev/zero > spill/other 2> /dev/null; truncate -s -60k spill/other
        export ROOM_THAT_IS_NOT=1 PYTHONPATH=lie
        harness eval --no-mlflow --model {tiny_model} {SMALL} --offload-dir spill {options}; echo code $?
        find spill -type f
        rm spill/other
        harness eval --no-mlflow --model {tiny_model} {SMALL} --offload-dir spill {options}; echo code $?
        """
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("code", "spill"))]
    assert said == ["code 2", "spill/other", "code 0"], done
    (line,) = errors_in(done.stderr)
    assert "no space left" in line
    assert "offload" in line or "choose another" in line
