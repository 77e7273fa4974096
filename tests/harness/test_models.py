"""From a model's name to its folder: what is found, what is refused, and how soon without a network."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexllmgen.errors import CheckpointError, UsageError
from harness.models import check_weights, list_models, load_tokenizer, max_positions, resolve_model
from strategies.base import ModelSource


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        resolve_model(name, **{"weights": "pretrained", **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_safetensors(path: Path, *, data_bytes: int, header: dict[str, Any] | None = None) -> Path:
    text = json.dumps(
        header or {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": {"a": "b"}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * data_bytes)
    return path


def test_a_local_folder(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(str(tiny_model), weights="pretrained")
    assert source.path == tiny_model.resolve()
    assert source.config["model_type"] == "llama"
    assert source.revision is None
    monkeypatch.chdir(tiny_model.parent)
    assert resolve_model("./" + tiny_model.name, weights="pretrained").path == tiny_model.resolve()
    assert resolve_model(tiny_model.name, weights="pretrained").path == tiny_model.resolve()


def test_a_published_config_draws_random_weights_without_a_folder() -> None:
    source = resolve_model("facebook/opt-30b", weights="random")
    assert (source.path, source.weights) == (None, "random")
    assert source.config["num_hidden_layers"] == 48
    assert load_tokenizer(source) is None


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "~/nowhere-at-all", "a/b/c", "~no-such-user/x"])
def test_a_folder_that_is_not_there(name: str) -> None:
    assert "no such folder" in refusal(name)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in refusal("model.gguf")


def test_a_name_that_no_hub_id_can_be() -> None:
    message = refusal("two words/here")
    assert "not a hub id" in message
    assert "--model builtin" in message


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_without_a_network_the_built_in_model_is_named(weights: str) -> None:
    message = refusal("somebody/not-cached", weights=weights)
    assert "no network" in message
    assert "--model builtin" in message


def test_without_a_network_a_published_model_has_its_speed(hub_cache: Path) -> None:
    message = refusal("facebook/opt-125m")
    assert message.endswith("or add --weights random for a speed run without its weights")
    assert "did you mean" not in message
    assert "--weights random" not in refusal("somebody/not-cached")


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("builtinn", "builtin"),
        ("Builtin", "builtin"),
        ("facebook/opt-125", "facebook/opt-125m"),
        ("facebok/opt-30bb", "facebook/opt-30b"),
    ],
)
def test_a_name_that_is_nearly_right(name: str, meant: str, weights: str, hub_cache: Path) -> None:
    assert f"did you mean {meant!r}?" in refusal(name, weights=weights)


def test_a_published_name_without_its_owner(hub_cache: Path) -> None:
    assert "did you mean 'facebook/opt-125m'?" in refusal("opt-125m")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mixtral", "'mistralai/Mixtral-8x7B-v0.1'"),
        ("Llama-3-70B", "'meta-llama/Meta-Llama-3-70B'"),
        ("somebody/Llama-3.1", "'meta-llama/Llama-3.1-8B' or 'meta-llama/Llama-3.1-70B'"),
    ],
)
def test_a_part_of_a_published_name(name: str, meant: str, hub_cache: Path) -> None:
    assert f"did you mean {meant}?" in refusal(name)


def test_a_part_of_many_names_points_to_the_list(hub_cache: Path) -> None:
    assert " a part of " not in refusal("a")
    told = refusal("qwen3")
    assert "did you mean" not in told
    assert "a part of 7 names in `harness models`" in told


def test_a_cached_model_is_nearly_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.models._cached_models", lambda: ["owner/peculiar"])
    assert "did you mean 'owner/peculiar'?" in refusal("owner/peculier")


def test_a_name_like_no_other_gets_no_guess(hub_cache: Path) -> None:
    assert "did you mean" not in refusal("somebody/not-cached")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_this_folder(
    name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model)
    assert "--model is empty" in refusal(name)
    assert "--model builtin" in refusal(name)


def test_a_folder_without_a_config_names_the_way_out(tmp_path: Path) -> None:
    way_out = "name a folder with config.json and *.safetensors, a hub id, or --model builtin"
    assert refusal(str(tmp_path)).endswith(f"has no config.json; {way_out}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no config.json"),
        ("{", "damaged"),
        ("[]", "model_type"),
        ("{}", "model_type"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path: Path, content: str | bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert expected in refusal(str(tmp_path))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "--weights random" in refusal(str(tmp_path))
    assert resolve_model(str(tmp_path), weights="random").path == tmp_path.resolve()


def test_pickle_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "--allow-pickle" in refusal(str(tmp_path))
    assert resolve_model(str(tmp_path), weights="pretrained", allow_pickle=True).allow_pickle


def test_a_whole_file_passes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", data_bytes=16)
    check_weights(tmp_path, "m", allow_pickle=False)


def test_a_file_cut_anywhere_is_told(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", data_bytes=16)
    whole = path.read_bytes()
    for keep in (0, 4, 8, 20, len(whole) - 16, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
            check_weights(tmp_path, "m", allow_pickle=False)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"w": 1}',
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        check_weights(tmp_path, "m", allow_pickle=False)


def test_shards(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    write_safetensors(tmp_path / "one.safetensors", data_bytes=16)
    with pytest.raises(CheckpointError, match=r"lacks two\.safetensors \(1 of 2 shards"):
        check_weights(tmp_path, "m", allow_pickle=False)
    write_safetensors(tmp_path / "two.safetensors", data_bytes=15)
    with pytest.raises(CheckpointError, match=r"two\.safetensors is truncated"):
        check_weights(tmp_path, "m", allow_pickle=False)
    write_safetensors(tmp_path / "two.safetensors", data_bytes=16)
    check_weights(tmp_path, "m", allow_pickle=False)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        check_weights(tmp_path, "m", allow_pickle=False)


def test_a_tokenizer_that_is_missing_or_broken(tmp_path: Path, tiny_model: Path) -> None:
    def source(path: Path, weights: str = "pretrained") -> ModelSource:
        return ModelSource(name="m", path=path, config={}, weights=weights)  # type: ignore[arg-type]

    assert load_tokenizer(source(tiny_model)).eos_token == "</s>"
    with pytest.raises(UsageError, match="no tokenizer files"):
        load_tokenizer(source(tmp_path))
    assert load_tokenizer(source(tmp_path, "random")) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(source(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_context_a_model_was_made_for() -> None:
    assert max_positions({"max_position_embeddings": 2048}) == 2048
    assert max_positions({"n_positions": 1024}) == 1024
    assert max_positions({"text_config": {"max_position_embeddings": 64}}) == 64
    assert max_positions({}) is None


def test_what_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = list_models()
    names = [model.name for model in listed]
    assert names[0] == "builtin"
    expected = {"facebook/opt-125m", "facebook/opt-175b", "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B"}
    assert expected <= set(names)
    assert all(model.summary and "\n" not in model.summary for model in listed)


# The hub, as far as it can be had without one


def cache_snapshot(root: Path, repo: str, files: dict[str, bytes]) -> Path:
    """A repository in the hub's cache layout, as a download leaves it."""
    home = root / ("models--" + repo.replace("/", "--"))
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_cached_model_needs_no_network(hub_cache: Path, tiny_model: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    snapshot = cache_snapshot(hub_cache, "owner/tiny", files)
    source = resolve_model("owner/tiny", weights="pretrained")
    assert source.path is not None
    assert source.path.resolve() == snapshot.resolve()
    assert source.revision == "a" * 40
    assert resolve_model("owner/tiny@" + "a" * 40, weights="pretrained").revision == "a" * 40
    assert "no network" in refusal("owner/tiny@v2")


def test_a_cached_config_without_its_weights_is_not_the_model(hub_cache: Path, tiny_model: Path) -> None:
    cache_snapshot(hub_cache, "owner/tiny", {"config.json": (tiny_model / "config.json").read_bytes()})
    assert "no network" in refusal("owner/tiny")
    assert resolve_model("owner/tiny", weights="random").path is not None


def test_a_download_that_was_broken_off_is_taken_up_again(
    hub_cache: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard of two is in the cache: with a network the rest is fetched, not refused for ever."""
    import huggingface_hub

    index = b'{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    one = write_safetensors(hub_cache.parent / "one", data_bytes=16).read_bytes()
    config = (tiny_model / "config.json").read_bytes()
    files = {"config.json": config, "model.safetensors.index.json": index, "one.safetensors": one}
    snapshot = cache_snapshot(hub_cache, "owner/half", files)
    assert "no network" in refusal("owner/half")
    monkeypatch.setattr("harness.models.probe_hub", lambda: lambda: True)
    offline = huggingface_hub.snapshot_download

    def download(repo: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            return str(offline(repo, local_files_only=True, **options))
        (snapshot / "two.safetensors").write_bytes(one)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo, **options: ["one.safetensors"]
    )
    assert resolve_model("owner/half", weights="pretrained").path == snapshot


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("hub", ["silent", "refusing"])
def test_a_hub_that_does_not_answer_costs_seconds(
    hub: str, silent_server: str, monkeypatch: pytest.MonkeyPatch, hub_cache: Path
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", silent_server if hub == "silent" else "http://127.0.0.1:9")
    import huggingface_hub  # noqa: F401 - its import is not the network's time

    started = time.monotonic()
    message = refusal("somebody/not-cached")
    assert time.monotonic() - started < 3
    assert "no network" in message
    assert "--model builtin" in message
