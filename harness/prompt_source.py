"""Where prompts come from: what `--dataset` names becomes the rows of a Hugging Face dataset.

    humaneval                                an alias of the registry, datasets.toml
    owner/name[:config[/split]][@revision]   a dataset of the hub; `:/split` names a split alone
    questions.jsonl, ./folder                a local json, jsonl, csv (each also .gz) or parquet file,
                                             or a folder of files of one of these formats

Without a split, test is taken if there is one, else validation, else train, else the first.
An alias wins over a file of the same name; `./humaneval` is the file. Everything is loaded by
`datasets` and cached where it caches. Knows nothing of tokenizers and of how rows are chosen.
"""

import difflib
import functools
import glob
import importlib
import importlib.util
import re
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexllmgen.errors import UsageError
from harness.hub import probe_hub, quiet_datasets

REGISTRY = Path(__file__).with_name("datasets.toml")
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SPLITS = ("test", "validation", "train")
HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[^/@]*)(/(?P<split>[^/@]+))?)?(@(?P<revision>\S+))?"
)
GRAMMAR = (
    "a hub dataset is owner/name[:config[/split]][@revision], "
    "a local one a .json, .jsonl, .csv or .parquet file"
)

# What the library raises, beside its own kind, for files and names that are not as they should be.
LIBRARY_ERRORS = (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, RuntimeError)
NO_DATA = "corresponds to no data"

Kind = Literal["completion", "instruction", "chat"]
SourceType = Literal["hub", "package", "file"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredDataset:
    """A dataset that has an alias, and how its rows become prompts."""

    alias: str
    summary: str
    repo: str
    config: str | None = None
    split: str
    template: str
    kind: Kind
    licence: str
    id_column: str | None = None
    package: Sequence[str] = ()

    @property
    def offline(self) -> bool:
        """Whether an installed package ships it, so that it loads without a network."""
        return self.packaged_file() is not None

    def packaged_file(self) -> Path | None:
        """The file of the installed package that ships the rows. Looks for it without importing."""
        if not self.package:
            return None
        module, file = self.package
        spec = importlib.util.find_spec(module)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        return next((path for folder in folders if (path := Path(folder, file)).is_file()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """A dataset of the hub: `owner/name:config/split@revision`, taken apart."""

    repo: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A loaded dataset: `table` is a `datasets.Dataset`, the rest says where it came from."""

    table: Any
    name: str
    source: str
    source_type: SourceType
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    licence: str | None = None
    registered: RegisteredDataset | None = None
    warnings: tuple[str, ...] = ()


@functools.cache
def registered_datasets() -> Mapping[str, RegisteredDataset]:
    """The datasets that have an alias, by alias.

    >>> registered_datasets()["gsm8k"].repo
    'openai/gsm8k'
    """
    tables: dict[str, dict[str, Any]] = tomllib.loads(REGISTRY.read_text(encoding="utf-8"))
    return {alias: RegisteredDataset(alias=alias, **fields) for alias, fields in tables.items()}


def load_rows(dataset: str) -> Rows:
    """Load what `dataset` names; the module's docstring has the grammar.

    Raises:
        UsageError: no such alias, dataset, config, split, revision or file; a file that cannot be
            read; no rows; or a hub dataset that is not cached while the hub cannot be reached,
            which takes under 3 s to say.

    >>> load_rows("humaneval").table.num_rows
    164
    """
    dataset = dataset.strip()
    registered = registered_datasets().get(dataset.lower())
    if registered and (packaged := registered.packaged_file()):
        rows = _packaged_rows(registered, packaged)
    elif registered:
        name = HubName(repo=registered.repo, config=registered.config, split=registered.split)
        rows = _hub_rows(name, registered)
    elif local := _local_path(dataset):
        rows = _local_rows(local)
    elif found := HUB_NAME.fullmatch(dataset):
        parts: dict[str, Any] = {part: text or None for part, text in found.groupdict().items()}
        rows = _hub_rows(HubName(**parts))
    else:
        aliases = registered_datasets()
        near = difflib.get_close_matches(dataset.lower(), aliases, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the aliases are {', '.join(aliases)};"
        raise UsageError(f"no dataset has the alias {dataset!r}; {hint} {GRAMMAR}")
    if not rows.table.num_rows:
        raise UsageError(f"{dataset} has no rows; name another dataset, config or split with --dataset")
    return rows


def _packaged_rows(registered: RegisteredDataset, file: Path) -> Rows:
    return Rows(
        table=_load_files("json", [file]),
        name=registered.alias,
        source="/".join(registered.package),
        source_type="package",
        split=registered.split,
        licence=registered.licence,
        registered=registered,
    )


def _local_path(dataset: str) -> Path | None:
    """The path that a name means, if it means one: it exists, or can be nothing else."""
    try:
        path = Path(dataset).expanduser()
        meant = path.exists() or _format(path) or dataset.startswith((".", "/", "~"))
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a null character
        return None
    return path if dataset and meant else None


def _local_rows(path: Path) -> Rows:
    if not path.exists():
        raise UsageError(f"no file or folder {path}; {GRAMMAR}")
    files = [path]
    if path.is_dir():
        inside = [file.relative_to(path) for file in sorted(path.rglob("*")) if _format(file)]
        files = [path / file for file in inside if not any(part.startswith(".") for part in file.parts)]
    formats = sorted({_format(file) or "" for file in files})
    if len(formats) > 1:
        raise UsageError(
            f"{path} mixes {' and '.join(formats)} files; name one file, or a folder of one format"
        )
    if not formats or not formats[0]:
        known = ", ".join(FORMATS)
        raise UsageError(f"{path} is or holds no file of a known format: {known} (all but .parquet also .gz)")
    return Rows(
        table=_load_files(formats[0], files),
        name=path.resolve().name,
        source=str(path.resolve()),
        source_type="file",
    )


def _format(path: Path) -> str | None:
    name = path.name.lower()
    found = FORMATS.get(Path(name.removesuffix(".gz")).suffix)
    return None if found == "parquet" and name.endswith(".gz") else found


def _load_files(file_format: str, files: list[Path]) -> Any:
    if not any(file.stat().st_size for file in files):
        raise UsageError(f"{files[0]} is empty; name another dataset with --dataset")
    with quiet_datasets(online=False) as datasets:
        try:
            names = [glob.escape(str(file.resolve())) for file in files]
            return datasets.load_dataset(file_format, data_files=names, split="train")
        except (*LIBRARY_ERRORS, datasets.exceptions.DatasetsError) as error:
            # The library wraps what its reader said; the innermost cause names the line or the byte.
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if NO_DATA in str(cause):
                raise UsageError(f"{files[0]} has no rows; name another dataset with --dataset") from error
            what = str(files[0]) if len(files) == 1 else f"a file of {files[0].parent}"
            raise UsageError(f"{what} cannot be read as {file_format}: {_line(cause)}") from error


def _hub_rows(name: HubName, registered: RegisteredDataset | None = None) -> Rows:
    reachable = probe_hub()
    import datasets

    online = reachable()
    with quiet_datasets(online=online):
        try:
            splits = datasets.load_dataset(name.repo, name.config, revision=name.revision)
        except (*LIBRARY_ERRORS, datasets.exceptions.DatasetsError) as error:
            raise UsageError(_hub_complaint(name, error, online=online)) from error
        split = name.split or next((known for known in SPLITS if known in splits), next(iter(splits), ""))
        if split not in splits:
            raise UsageError(f"{name.repo} has no split {split!r}; it has {', '.join(splits)}")
        table = splits[split]
        revision = _revision(table)
        licence = registered.licence if registered else _card_licence(name.repo, revision)
    return Rows(
        table=table,
        name=registered.alias if registered else name.repo,
        source=name.repo,
        source_type="hub",
        config=name.config or table.info.config_name,
        split=split,
        revision=revision or name.revision,
        licence=licence,
        registered=registered,
        warnings=() if online else _check_cached_revision(name, revision),
    )


def _hub_complaint(name: HubName, error: Exception, *, online: bool) -> str:
    """What the library says, often in many lines, as one line that lists what there is."""
    listed = re.search(r"available[^\[]*\[(.*?)\]", str(error), re.IGNORECASE | re.DOTALL)
    if listed and not online:
        return f"no network, and of {name.repo} only config {listed[1]} is in the cache of datasets"
    if listed:
        wrong = f"no config {name.config!r}" if name.config else "several configs"
        return (
            f"{name.repo} has {wrong}; write {name.repo}:CONFIG with one of {listed[1]}, "
            f"or {name.repo}:CONFIG/SPLIT"
        )
    if not online and isinstance(error, OSError):
        offline = [f"--dataset {alias}" for alias, known in registered_datasets().items() if known.offline]
        return (
            f"no network (or offline mode is set), and {name.repo} is not in the cache of datasets; "
            f"without a network use {' or '.join([*offline, 'a local file'])}"
        )
    if NO_DATA in str(error):
        return f"{name.repo} has no rows; name another dataset with --dataset"
    at = f" at revision {name.revision}" if name.revision else ""
    return f"{name.repo}{at} cannot be loaded: {_line(error)}"


def _check_cached_revision(name: HubName, found: str | None) -> tuple[str, ...]:
    """Without a network the library takes whatever revision is cached: refuse another, warn if unknown."""
    asked = name.revision
    if asked is None or (found or "").startswith(asked):
        return ()
    if found and re.fullmatch(r"[0-9a-f]{7,40}", asked):
        raise UsageError(f"no network, and {name.repo} is cached at revision {found}; name that, or none")
    return (f"no network: the cached {name.repo} was used, which may not be revision {asked}",)


def _revision(table: Any) -> str | None:
    """The hub's commit that the rows came from; it is in the names of the files they were made from."""
    names = [*(table.info.download_checksums or ()), *(file["filename"] for file in table.cache_files)]
    found = (re.search(r"[@/]([0-9a-f]{40})/", name) for name in names)
    return next((match[1] for match in found if match), None)


def _card_licence(repo: str, revision: str | None) -> str | None:
    """The licence that the dataset's card states, where it has a card; the library has just fetched it."""
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        card = hub.hf_hub_download(repo, "README.md", repo_type="dataset", revision=revision)
        licence = hub.DatasetCard(Path(card).read_text(encoding="utf-8")).data.license
    except (OSError, ValueError):
        return None
    return ", ".join(licence) if isinstance(licence, list) else licence


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
