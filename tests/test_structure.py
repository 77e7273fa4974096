"""What imports what: help is cheap, and the four floors look only downwards."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "accelerate", "datasets", "mlflow", "matplotlib", "plotly", "scipy"}
FLOORS = ("flexllmgen", "profiling", "strategies", "harness")


def imported_by(code: str, cwd: Path) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after running `code`."""
    code += "\nimport sys; print('modules:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "modules:"
    return set(last[1:])


def command(*arguments: str) -> str:
    """Code that runs the command inside the interpreter."""
    return (
        f"import sys; sys.argv = ['harness', *{arguments!r}]\n"
        "from harness.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("eval", "--help"),
        ("--version",),
        ("config", "show"),
        ("strategies",),
    ],
)
def test_what_loads_no_model_imports_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    imported = imported_by(command(*arguments), tmp_path)
    assert "typer" in imported
    assert not imported & (HEAVY | {"numpy", "pandas"})


@pytest.mark.parametrize("arguments", [("models",), ("datasets",)])
def test_the_lists_need_no_framework(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert not imported_by(command(*arguments), tmp_path) & {"torch", "transformers", "mlflow", "matplotlib"}


def test_a_worker_knows_neither_mlflow_nor_pictures(tmp_path: Path) -> None:
    code = "import harness.worker, strategies.accelerate, strategies.flexgen"
    imported = imported_by(code, tmp_path)
    assert "torch" in imported
    assert not imported & {"mlflow", "matplotlib", "typer"}


def test_the_command_itself_needs_no_torch(tmp_path: Path) -> None:
    """Its memory is small, and everything it imports before a run starts delays the run."""
    imported = imported_by("import harness.cli, harness.evaluation, harness.delivery", tmp_path)
    assert not imported & HEAVY


def test_measured_without_mlflow_imports_no_mlflow(tmp_path: Path, tiny_model: Path) -> None:
    """The command's process, over a whole run."""
    arguments = ("eval", "--model", str(tiny_model), "-n", "1", "--input-len", "16", "--gen-len", "2")
    imported = imported_by(command(*arguments, "--no-mlflow", "--repeats", "1", "-q"), tmp_path)
    assert not imported & {"mlflow", "torch", "transformers"}
    assert (tmp_path / "results").exists()
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("floor", FLOORS)
def test_floors_look_only_downwards(floor: str, tmp_path: Path) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    code = (
        f"import importlib, pkgutil, {floor}\n"
        f"for module in pkgutil.walk_packages({floor}.__path__, '{floor}.'):\n"
        # Kernels in Triton are imported on a GPU, and only there.
        "    module.name.endswith('_triton') or importlib.import_module(module.name)\n"
    )
    imported = imported_by(code, tmp_path)
    assert floor in imported
    assert not imported & above
    if floor != "harness":
        assert "mlflow" not in imported
