"""Tiny models are made once per session."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TinyModel, make_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tiny(name)` gives a tiny model, made once per session."""
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
