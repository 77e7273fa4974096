"""Examples in docstrings are true, in every module that has any."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "FlexLLMGen" / "flexllmgen", ROOT / "profiling", ROOT / "strategies", ROOT / "harness")
MODULES = sorted(
    ".".join(path.relative_to(folder.parent).with_suffix("").parts)
    for folder in FOLDERS
    for path in folder.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


def test_each_package_has_examples() -> None:
    assert {name.partition(".")[0] for name in MODULES} == {folder.name for folder in FOLDERS}
