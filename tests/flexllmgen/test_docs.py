"""The examples in the docstrings hold."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("checkpoint", "policy", "schedule", "spec", "splits", "workload", "models.published")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"flexllmgen.{name}"))
    assert result.attempted
    assert not result.failed
