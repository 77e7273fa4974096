"""The README names every verb, strategy key and folder there is; options are in it or in the pages it leads to."""

from pathlib import Path

import pytest

from harness.cli import app
from harness.config import EvalConfig, flag_of
from strategies.registry import STRATEGIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EvalConfig.model_fields)
def test_every_option_is_in_the_page_that_the_readme_leads_to(name: str) -> None:
    assert "(docs/cli/eval.md)" in README
    page = (ROOT / "docs" / "cli" / "eval.md").read_text(encoding="utf-8")
    assert f"`{flag_of(name)}`" in page


@pytest.mark.parametrize("entry", STRATEGIES, ids=lambda entry: entry.name)
def test_every_strategy_and_its_keys_are_in_the_readme(entry: object) -> None:
    config_type, _ = entry.load_config()  # type: ignore[attr-defined]
    missing = [key for key in config_type.model_fields if f"`{key}`" not in README]
    assert missing == []
    assert f"strategies/{entry.name}.toml" in README  # type: ignore[attr-defined]


def test_every_verb_is_in_the_readme() -> None:
    verbs = [command.name for command in app.registered_commands]
    assert len(verbs) >= 6
    assert [verb for verb in verbs if f"`harness {verb}" not in README] == []


def test_every_folder_is_in_the_readme() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    folders = {line.split("/")[0] for line in listed.splitlines() if "/" in line}
    assert [folder for folder in sorted(folders) if f"`{folder}/`" not in README] == []


def test_every_option_of_benchmark_is_in_the_readme() -> None:
    import inspect

    from harness.cli.benchmarking import benchmark_command

    own = [
        name
        for name in inspect.signature(benchmark_command).parameters
        if name not in EvalConfig.model_fields and name not in ("as_json", "assignments", "verbose", "quiet")
    ]
    section = README.partition("## Benchmarks")[2].partition("\n## ")[0]
    flags = {"--" + name.replace("_", "-") for name in own} - {"--config", "--objective", "--no-calibrate"}
    assert len(flags) >= 8
    assert [flag for flag in sorted(flags) if f"`{flag}" not in section] == []


def test_every_suite_is_in_the_readme() -> None:
    from harness.benchmark.suite import shipped_suites

    assert [name for name in shipped_suites() if f"`{name}`" not in README] == []
