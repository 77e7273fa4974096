"""Checkpoints: where weights come from, one tensor of ours at a time.

`SafetensorsCheckpoint` reads a folder in Hugging Face's layout (one file or shards with an index);
`RandomCheckpoint` makes seeded numbers, for measuring without a download. Knows nothing of tiers.
"""

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from flexllmgen.errors import CheckpointError
from flexllmgen.spec import ModelSpec

PIECE_NUMBERS = 16 << 20
"""Random numbers that are drawn at once: the most that is held beside where they go."""


class Checkpoint(Protocol):
    """A source of weights."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal contents: packed layers on disk are found again by it."""
        ...

    def validate(self, spec: ModelSpec) -> None:
        """Raises CheckpointError, naming tensors, unless the checkpoint is exactly the model's."""
        ...

    def fill(self, spec: ModelSpec, layer: int, name: str, target: torch.Tensor) -> None:
        """Writes tensor `name` of `layer` (-1: embedding or head) into `target`, converting its dtype."""
        ...


class RandomCheckpoint:
    """Seeded normal weights: seed, device kind and dtype decide the numbers, the policy does not."""

    def __init__(self, seed: int = 0, std: float = 0.02) -> None:
        self.seed, self.std = seed, std

    @property
    def fingerprint(self) -> str:
        return f"random-{self.seed}-{self.std}-{PIECE_NUMBERS}"

    def validate(self, spec: ModelSpec) -> None:
        """Random weights fit every model."""

    def fill(self, spec: ModelSpec, layer: int, name: str, target: torch.Tensor) -> None:  # noqa: ARG002
        for _ in self.pieces(layer, name, target.numel(), lambda start, stop: target.view(-1)[start:stop]):
            pass

    def pieces(
        self, layer: int, name: str, count: int, take: Callable[[int, int], torch.Tensor]
    ) -> Iterator[tuple[int, int]]:
        """Fills a tensor of `count` numbers piece by piece, so that it need not be in one place.

        `take(start, stop)` gives the flat memory for those numbers; yields each range when it is filled.
        """
        key = hashlib.sha256(f"{self.seed}/{layer}/{name}".encode()).digest()
        generator = None
        for start in range(0, count, PIECE_NUMBERS):
            stop = min(start + PIECE_NUMBERS, count)
            piece = take(start, stop)
            if generator is None:
                generator = torch.Generator(device=piece.device).manual_seed(
                    int.from_bytes(key[:7], "little")
                )
            piece.normal_(0.0, self.std, generator=generator)
            if name.endswith("norm.weight"):
                piece.add_(1.0)
            yield start, stop


class SafetensorsCheckpoint:
    """A folder with `model.safetensors`, or shards and `model.safetensors.index.json`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        else:
            files = ["model.safetensors"]
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent:
            raise CheckpointError(
                f"{self.folder} lacks {', '.join(absent)}; this engine reads safetensors checkpoints only"
            )
        self._files = [self.folder / file for file in files]
        self._handles: list[Any] = []
        self._where: dict[str, int] = {}
        for position, path in enumerate(self._files):
            try:
                handle = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); fetch it again") from error
            self._handles.append(handle)
            self._where.update(dict.fromkeys(handle.keys(), position))

    @property
    def fingerprint(self) -> str:
        parts = []
        for path in self._files:
            stat = path.stat()
            parts.append(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def validate(self, spec: ModelSpec) -> None:
        missing, wrong = [], []
        known: set[str] = set()
        for layer, name, shape in _all_tensors(spec):
            rows = 0
            for source in sources(spec, layer, name):
                found = self._find(source)
                if found is None:
                    missing.append(source)
                    continue
                known.add(found)
                there = self._shape(found)
                rows += there[0] if there else 0
                if len(there) != len(shape) or there[1:] != shape[1:]:
                    wrong.append(
                        f"{found} is {there}, the model wants (..., {', '.join(map(str, shape[1:]))})"
                    )
            if rows != shape[0] and not missing:
                wrong.append(f"{' + '.join(sources(spec, layer, name))} have {rows} rows, not {shape[0]}")
        allowed = [*spec.traits.optional, *(["lm_head.weight"] if spec.tied else [])]
        extra = [
            name
            for name in sorted(self._where)
            if name not in known and not any(fnmatch.fnmatch(name, pattern) for pattern in allowed)
        ]
        problems = [
            f"{kind} {_some(names)}"
            for kind, names in (("missing", missing), ("wrongly shaped", wrong), ("unexpected", extra))
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder} does not hold the {spec.family} model of its config: {'; '.join(problems)}; "
                "download or copy weights and config.json again"
            )

    def fill(self, spec: ModelSpec, layer: int, name: str, target: torch.Tensor) -> None:
        row = 0
        for source in sources(spec, layer, name):
            found = self._find(source)
            assert found is not None, "validate first"
            tensor = self._handles[self._where[found]].get_tensor(found)
            target[row : row + tensor.shape[0]].copy_(tensor)
            row += tensor.shape[0]

    def _find(self, source: str) -> str | None:
        """Some checkpoints of a bare decoder leave out the leading `model.`."""
        for candidate in (source, source.removeprefix("model.")):
            if candidate in self._where:
                return candidate
        return None

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[self._where[name]].get_slice(name).get_shape())


def sources(spec: ModelSpec, layer: int, name: str) -> tuple[str, ...]:
    """Checkpoint names of the tensors stacked into ours.

    >>> from flexllmgen.spec import OPT_125M
    >>> sources(OPT_125M, 3, "up.weight")
    ('model.decoder.layers.3.fc1.weight',)
    """
    names, expert = spec.traits.names, ""
    if name.startswith("experts."):
        _, expert, part = name.split(".")
        name = f"experts.{{expert}}.{part}"
    return tuple(each.format(layer=layer, expert=expert) for each in names[name])


def _all_tensors(spec: ModelSpec) -> list[tuple[int, str, tuple[int, ...]]]:
    ends = [(-1, name, shape) for name, shape in {**spec.embed_tensors(), **spec.head_tensors()}.items()]
    per_layer = {**spec.attention_tensors(), **spec.mlp_tensors()}
    return ends + [
        (layer, name, shape) for layer in range(spec.num_layers) for name, shape in per_layer.items()
    ]


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
