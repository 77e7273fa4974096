"""Tiny models and their tokenizer, made once per session, and folders that are never the user's.

Only the built-in model is shared with the user's cache: converting it takes longer than all else here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.config import cache_dir

# Long enough for a few sentences, short enough that a test can ask for too much.
TINY_CONTEXT = 128
TINY_EOS = 2
QUESTIONS = [f"What is {n} plus {n}, and why does that not make {n * 7}?" for n in range(1, 13)]


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """Lines that tell of errors."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of the session's own, with the user's converted built-in model in it, and no network."""
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    own = tmp_path_factory.mktemp("cache")
    (own / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HARNESS_", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setenv("HARNESS_CACHE_DIR", str(own))
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer without merges, so every id below 259 means something."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<s>", "<pad>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a four-layer Llama of random weights, sharp enough to make varied tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=TINY_EOS,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local dataset with a column `question`."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text(
        "".join(json.dumps({"question": text, "n": n}) + "\n" for n, text in enumerate(QUESTIONS))
    )
    return path


def command(*arguments: object) -> list[str]:
    """The console command as a child process of this Python."""
    return [sys.executable, "-m", "harness.cli", *map(str, arguments)]


@pytest.fixture(scope="session")
def harness() -> Callable[..., Finished]:
    """Run the command to its end in a folder: `harness("eval", ..., cwd=folder)`."""

    def run(
        *arguments: object, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> Finished:
        done = subprocess.run(
            command(*arguments),
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def start_harness() -> Callable[..., "subprocess.Popen[str]"]:
    """Start the command and come back at once; its errors go to a pipe."""

    def start(*arguments: object, cwd: Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command(*arguments), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.fixture(scope="session")
def builtin_model() -> Path:
    """The built-in model's folder, converted first where that has never been done."""
    from harness.builtin import prepare_builtin

    return prepare_builtin()


@pytest.fixture(scope="session")
def laptop_profile() -> Any:
    """A profile of a machine without a GPU, its rates made up, with one small model's layer times."""
    from flexllmgen.models.published import published_config
    from flexllmgen.spec import ModelSpec
    from profiling.hardware import read_hardware
    from profiling.layer_times import HeadPoint, LayerShape, LayerTimes, Point
    from profiling.profile import Capacity, HardwareProfile, Measurement

    rates = {
        "compute_flops_per_s": 1e11,
        "device_bytes_per_s": 2e10,
        "host_bytes_per_s": 2e10,
        "disk_read_bytes_per_s": 1e9,
        "disk_write_bytes_per_s": 1e9,
        "cached_file_bytes_per_s": 5e9,
    }
    points = tuple(
        Point(rows=rows, attention_s=1e-5 * rows, per_position_s=1e-8 * rows, mlp_s=3e-5 * rows)
        for rows in (1, 64)
    )
    return HardwareProfile(
        fingerprint="0" * 16,
        hardware=read_hardware(Path.cwd()),
        device="cpu",
        dtype="float32",
        torch="2.11.0",
        threads=2,
        measured_at=0.0,
        took_s=1.0,
        energy_counter=False,
        capacity=Capacity(host_total_bytes=16 << 30, host_available_bytes=8 << 30, disk_free_bytes=64 << 30),
        measurements={
            name: Measurement(median=rate, best=rate, spread=0.0, trials=5) for name, rate in rates.items()
        },
        layers=(
            LayerTimes(
                shape=LayerShape.of(ModelSpec.from_hf_config(published_config("opt-125m"))),
                issue_s=1e-5,
                prompt=points,
                step=points,
                head=(HeadPoint(rows=1, head_s=1e-3), HeadPoint(rows=64, head_s=2e-3)),
            ),
        ),
    )


class Events:
    """Stands in for the command: remembers what a worker sends."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, event: str, **fields: Any) -> None:
        """Remember one event."""
        self.sent.append({"event": event, **fields})

    def of(self, event: str) -> Sequence[dict[str, Any]]:
        """The events of one kind."""
        return [one for one in self.sent if one["event"] == event]


@pytest.fixture
def events() -> Events:
    """A fresh record of events."""
    return Events()
