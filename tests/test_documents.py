"""The documents say what the program does: pages are current, the worked example runs, links lead somewhere."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from harness.results import RunResult

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SMALL = (
    "-n",
    3,
    "-b",
    2,
    "--input-len",
    24,
    "--gen-len",
    6,
    "--repeats",
    1,
    "--warmup",
    0,
    "--no-mlflow",
    "--json",
)


def code_block(page: Path, name: str) -> str:
    """The fenced block of a page whose first line is the comment `# name`."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w+\n(# (\S+)\n.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    (found,) = [block for block, title in blocks if title == name]
    return str(found)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the worked example as pip would install it."""
    folder = tmp_path_factory.mktemp("site")
    page = DOCS / "write-a-strategy.md"
    (folder / "layer_swap.py").write_text(code_block(page, "layer_swap.py"), encoding="utf-8")
    project = tomllib.loads(code_block(page, "pyproject.toml"))
    assert project["tool"]["setuptools"]["py-modules"] == ["layer_swap"]
    facts = project["project"]
    info = folder / "layer_swap-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {facts['name']}\nVersion: {facts['version']}\nSummary: {facts['description']}\n"
    )
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in members.items())
        for group, members in facts["entry-points"].items()
    )
    (info / "entry_points.txt").write_text(points)
    return folder


def with_package(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def test_the_worked_example_gives_accelerates_tokens(
    harness: Callable[..., Any], example: Path, tiny_model: Path, questions_file: Path, tmp_path: Path
) -> None:
    def tokens(strategy: str) -> list[list[int]]:
        options = ("--model", tiny_model, "-d", questions_file, *SMALL, "--offload-dir", tmp_path / "offload")
        done = harness("eval", "-s", strategy, *options, cwd=tmp_path, env=with_package(example))
        assert done.code == 0, done.stderr
        folder = Path(json.loads(done.stdout)["result_path"]).parent
        result = RunResult.read(folder)
        assert result.strategy == strategy
        lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        if strategy == "layer_swap":
            assert result.params["resident_layers"] == 0
            assert result.metrics["attainment"] > 0
            assert result.metrics["weight_bytes_cpu"] > 0
        return [json.loads(line)["output_ids"] for line in lines]

    ours = tokens("layer_swap")
    assert [len(row) for row in ours] == [6, 6, 6]
    assert ours == tokens("accelerate")


def test_the_worked_example_is_listed_and_its_keys_are_checked(
    harness: Callable[..., Any], example: Path, tmp_path: Path
) -> None:
    env = with_package(example)
    listed = harness("strategies", cwd=tmp_path, env=env)
    assert "layer_swap" in listed.stdout
    assert "nothing overlaps" in listed.stdout
    assert "layer_swap" not in harness("strategies", cwd=tmp_path).stdout
    shown = harness(
        "config", "show", "-s", "layer_swap", "--set", "resident_layers=2", "--json", cwd=tmp_path, env=env
    )
    assert json.loads(shown.stdout)["resident_layers"]["value"] == 2
    wrong = harness("config", "show", "-s", "layer_swap", "--set", "resident_layer=2", cwd=tmp_path, env=env)
    assert wrong.code == 2
    assert "did you mean 'resident_layers'" in wrong.errors[0]


def test_a_broken_package_is_named(harness: Callable[..., Any], tmp_path: Path) -> None:
    info = tmp_path / "bad-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1\nSummary: broken\n")
    (info / "entry_points.txt").write_text(
        "[offload_harness.strategies]\nbad = no_such_module\nflexgen = no_such_module\n"
    )
    env = with_package(tmp_path)
    done = harness("config", "show", "-s", "bad", cwd=tmp_path, env=env)
    assert done.code == 2
    assert "of package bad" in done.errors[0]
    # A package cannot take the place of one of ours.
    assert harness("config", "show", "-s", "flexgen", cwd=tmp_path, env=env).code == 0


def test_the_pages_of_verbs_are_current() -> None:
    """After a change of the command line: make docs."""
    command = [sys.executable, str(DOCS / "cli_pages.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_timeline_is_drawn_from_the_schedule(tmp_path: Path) -> None:
    output = tmp_path / "timeline.svg"
    command = [sys.executable, str(DOCS / "timeline_picture.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for picture in (output, DOCS / "timeline.svg"):
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        words = picture.read_text(encoding="utf-8")
        assert [word for word in ("host to GPU", "KV cache in", ">21<", ">21c<") if word not in words] == []


def test_a_page_that_is_not_current_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "cli_pages.py"), "--folder", str(tmp_path / "cli")]
    run: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "cwd": ROOT}
    assert subprocess.run([*command, "--check"], **run).returncode == 1
    assert subprocess.run(command, **run).returncode == 0
    assert subprocess.run([*command, "--check"], **run).returncode == 0
    page = tmp_path / "cli" / "eval.md"
    page.write_text(page.read_text(encoding="utf-8").replace("--batch-size", "--batch"), encoding="utf-8")
    (tmp_path / "cli" / "gone.md").write_text("a verb that is no more")
    done = subprocess.run([*command, "--check"], **run)
    assert done.returncode == 1
    assert "eval.md" in done.stderr
    assert "gone.md" in done.stderr


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = [page.name for page in DOCS.glob("*.md") if page.name != "README.md"]
    assert len(pages) >= 3
    assert [name for name in pages if f"({name})" not in index] == []


def test_every_metric_of_a_run_is_defined(
    harness: Callable[..., Any], tiny_model: Path, questions_file: Path, tmp_path: Path
) -> None:
    options = ("--model", tiny_model, "-d", questions_file, *SMALL, "--offload-dir", tmp_path / "offload")
    done = harness("eval", "-s", "flexgen", "--set", "w_gpu_percent=50", *options, cwd=tmp_path)
    assert done.code == 0, done.stderr
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    metrics = json.loads(done.stdout)["metrics"]
    assert len(metrics) > 20
    assert [name for name in metrics if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("harness pro", ["profile"]),
        ("harness eval --batch", ["--batch-size"]),
        ("harness eval -s flex", ["flexgen"]),
        ("harness eval --model built", ["builtin"]),
        ("harness eval --dtype b", ["bfloat16"]),
    ],
)
def test_the_shell_completes(words: str, offered: list[str]) -> None:
    code = "import sys; sys.argv = ['harness']; from harness.cli import main; main()"
    env = {**os.environ, "_HARNESS_COMPLETE": "complete_bash", "COMP_WORDS": words}
    env["COMP_CWORD"] = str(len(words.split()) - 1)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout.split() == offered, done.stderr
