"""From the name of a model to a ModelSource: built-in, local folder, hub cache, hub, or a config alone.

Decides where weights come from and refuses early what cannot load: a missing or truncated file, a
pickle checkpoint. Loads no weight.
"""

import contextlib
import difflib
import importlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexllmgen.errors import CheckpointError, UsageError
from flexllmgen.models.published import published_config, published_names
from harness.builtin import BUILTIN, prepare_builtin
from harness.hub import probe_hub
from strategies.base import ModelSource

_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "*.py"]
_NAMED = 2  # names that are offered for one that is a part of them; of more there is a list
_SHORTEST = 3  # letters of such a part
_WAY_OUT = f"name a folder with config.json and *.safetensors, a hub id, or --model {BUILTIN}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model that can be named, for `harness models`."""

    name: str
    kind: str
    summary: str


def list_models() -> list[NamedModel]:
    """What --model can name without a network: the built-in model, the hub's cache, the published configs."""
    listed = [
        NamedModel(
            name=BUILTIN,
            kind="built in",
            summary="SmolLM2-135M-Instruct, real weights, no download (Apache-2.0)",
        )
    ]
    listed += [
        NamedModel(name=name, kind="cached", summary="in the Hugging Face cache of this machine")
        for name in _cached_models()
    ]
    listed += [
        NamedModel(
            name=name,
            kind="config",
            summary=f"{published_config(name)['model_type']}: hub weights, or --weights random offline",
        )
        for name in published_names()
    ]
    return listed


def resolve_model(
    name: str,
    *,
    weights: Literal["pretrained", "random"],
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> ModelSource:
    """Find a model by name and check that it can be loaded.

    Args:
        name: `builtin`, a local folder, or a hub id `owner/name`, with `@revision` if wanted.
        weights: with `random`, only the config is needed, and published configs work offline.

    Raises:
        UsageError: unknown, not reachable, no weights in a form that may be loaded.
        CheckpointError: a weight file is truncated or missing.
    """
    if not name.strip():
        raise UsageError(f"--model is empty; {_WAY_OUT}")
    revision = None
    # Not Path.expanduser, which raises for a user that does not exist.
    folder = Path(os.path.expanduser(name))  # noqa: PTH111
    if name == BUILTIN:
        path: Path | None = prepare_builtin()
    elif folder.is_dir():
        path = folder.resolve()
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.is_file():
        raise UsageError(f"--model {name}: no such folder; {_WAY_OUT}")
    elif weights == "random" and (config := _published(name)) is not None:
        return ModelSource(
            name=name, path=None, config=config, weights="random", trust_remote_code=trust_remote_code
        )
    else:
        repo, _, wanted = name.partition("@")
        path = _hub_folder(repo, wanted or None, weights)
        revision = path.name if path.parent.name == "snapshots" else None
    assert path is not None
    config = _read_config(path, name)
    if weights == "pretrained":
        check_weights(path, name, allow_pickle=allow_pickle)
    return ModelSource(
        name=name,
        path=path,
        config=config,
        weights=weights,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The longest context the model was made for, where its config says so."""
    text = config.get("text_config") or config
    value = text.get("max_position_embeddings") or text.get("n_positions")
    return int(value) if value else None


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, or None where there are no files for one (a config from the table).

    Raises:
        UsageError: there is a tokenizer and it cannot be loaded.
    """
    if source.path is None:
        return None
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((source.path / file).exists() for file in names):
        if source.weights == "random":
            return None
        raise UsageError(
            f"model {source.name}: {source.path} has no tokenizer files (tokenizer.json); copy them beside the weights"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise UsageError(
            f"model {source.name}: its tokenizer cannot be loaded: {_first_line(error)}"
        ) from error


def check_weights(path: Path, name: str, *, allow_pickle: bool) -> None:
    """Check that weight files are there, whole, and of a kind that may be loaded.

    A safetensors file says in its header how long it must be (format: 8 bytes header length, JSON, data).

    Raises:
        UsageError: no weights, or pickle ones that were not allowed.
        CheckpointError: a file is shorter than its header says, or a shard of the index is missing.
    """
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"model {name}: {index.name} is damaged ({_first_line(error)}); download or copy it again"
            ) from error
        missing = sorted(shard for shard in shards if not (path / shard).exists())
        if missing:
            raise CheckpointError(
                f"model {name}: {path} lacks {missing[0]} ({len(missing)} of {len(shards)} shards missing)"
            )
        files = [path / shard for shard in sorted(shards)]
    for file in files:
        _check_safetensors(file, name)
    if files:
        return
    pickles = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
    if not pickles:
        raise UsageError(
            f"model {name}: {path} holds no weights (*.safetensors); use --weights random for a speed run without them"
        )
    if not allow_pickle:
        raise UsageError(
            f"model {name}: only pickle weights ({pickles[0].name}), which can run code when loaded; "
            "pass --allow-pickle if you trust them, or convert them to safetensors"
        )


def _check_safetensors(file: Path, name: str) -> None:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (header_length,) = struct.unpack("<Q", stream.read(8))
            if header_length > size:
                raise ValueError(f"the header alone should have {header_length} bytes, the file has {size}")
            header = json.loads(stream.read(header_length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        needed = 8 + header_length + max(ends, default=0)
        if size < needed:
            raise ValueError(f"it has {size} bytes, its header says {needed}")
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"model {name}: {file} is truncated or damaged ({_first_line(error)}); download or copy it again"
        ) from error


def _published(name: str) -> dict[str, Any] | None:
    try:
        return published_config(name)
    except UsageError:
        return None


def _hub_folder(repo: str, revision: str | None, weights: str) -> Path:
    """The local snapshot of a hub repository, downloaded if the hub answers."""
    reachable = probe_hub()
    hub: Any = importlib.import_module("huggingface_hub")
    errors: Any = importlib.import_module("huggingface_hub.errors")
    patterns = [*_CONFIG_FILES, *(["*.safetensors", "*.bin"] if weights == "pretrained" else [])]
    way_out = f"{_did_you_mean(repo)}name a local folder or --model {BUILTIN}"
    if weights == "random":
        way_out += ", or one of `harness models`"
    elif _published(repo) is not None:
        way_out += ", or add --weights random for a speed run without its weights"
    try:
        cached = Path(
            hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
        if (cached / "config.json").exists() and (weights == "random" or _has_weights(cached)):
            return cached
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        pass
    except (errors.HFValidationError, ValueError):
        raise UsageError(f"--model {repo}: not a hub id (owner/name) and no such folder; {way_out}") from None
    if not reachable():
        raise UsageError(
            f"--model {repo}: no network (the Hugging Face hub cannot be reached) and not whole in the cache here; {way_out}"
        )
    try:
        files = hub.HfApi().list_repo_files(repo, revision=revision)
        if any(file.endswith(".safetensors") for file in files):
            patterns = [pattern for pattern in patterns if pattern != "*.bin"]
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise UsageError(
            f"--model {repo}: gated; accept its licence on the hub and set HF_TOKEN, or {way_out}"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UsageError(f"--model {repo}: the hub has no such model or revision; {way_out}") from None
    except Exception as error:
        raise UsageError(
            f"--model {repo}: download failed: {_first_line(error)}; try again, or {way_out}"
        ) from error


def _did_you_mean(name: str) -> str:
    """The beginning of a way out: names that this one is a part of or nearly is, or nothing."""
    known = [BUILTIN, *published_names(), *_cached_models()]
    if name in known:
        return ""
    # Owners mislead the comparison.
    wanted = name.rpartition("/")[2].lower()
    by_last_part = {full.rpartition("/")[2].lower(): full for full in reversed(known)}
    holding = [last for last in by_last_part if len(wanted) >= _SHORTEST and wanted in last]
    holding.sort(key=lambda last: (len(last), last))
    if wanted in by_last_part or not holding:
        near = difflib.get_close_matches(wanted, by_last_part, n=1, cutoff=0.8)
    elif len(holding) > _NAMED:
        return f"it is a part of {len(holding)} names in `harness models`: take one of them, or "
    else:
        near = holding
    if not near:
        return ""
    return f"did you mean {' or '.join(repr(by_last_part[last]) for last in near)}? If not, "


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot holds weights, and of sharded ones all: a download may have been broken off."""
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(ValueError, KeyError, AttributeError, OSError):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return all((folder / shard).exists() for shard in shards)
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _cached_models() -> list[str]:
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        repos = hub.scan_cache_dir().repos
    except Exception:  # noqa: BLE001 - no cache folder, or a damaged one: nothing to list
        return []
    return sorted(repo.repo_id for repo in repos if repo.repo_type == "model")


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"model {name}: {path} has no config.json; {_WAY_OUT}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name}: {path / 'config.json'} is damaged: {_first_line(error)}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UsageError(f"model {name}: {path / 'config.json'} names no model_type")
    return config


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
