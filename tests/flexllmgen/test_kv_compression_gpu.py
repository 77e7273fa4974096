"""Compressed KV on a CUDA device: its kernels do what torch does, and every tier gives the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_codes_on_cpu import KV, SIZES
from test_kv_compression import KV_PLACEMENTS, PROMPT, SEQUENCES, TOKENS
from test_parity import Recorder
from tiny_models import TinyModel, make_tiny, prompts

from flexllmgen.compression import compressed_bytes
from flexllmgen.engine import FlexEngine
from flexllmgen.kv_compression import CompressedSegment, KVCodec
from flexllmgen.policy import ON_CPU, Policy
from flexllmgen.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize(("heads", "size", "group"), [(3, 64, 64), (8, 128, 128), (2, 40, 32), (1, 7, 32)])
@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_do_what_torch_does(bits: int, heads: int, size: int, group: int, dtype: torch.dtype) -> None:
    batch, tokens = 3, 141
    x = torch.randn(2, batch, tokens, heads, 3 * size, generator=torch.Generator().manual_seed(0)).to(dtype)
    made: dict[str, tuple[KVCodec, CompressedSegment]] = {}
    for device in ("cpu", "cuda"):
        scratch = torch.empty(batch * tokens * 2 * heads * size, dtype=dtype, device=device)
        codec = KVCodec(
            bits=bits, group_size=group, kv_heads=heads, head_dim=size, scratch=scratch, sequences=batch
        )
        # Longer rows than their content, as on disk.
        row = compressed_bytes((batch, 2, heads * size), bits, group) + 64
        rows = torch.zeros(tokens, row, dtype=torch.uint8, device=device)
        centre = torch.zeros(batch, heads, size, dtype=dtype, device=device)
        made[device] = codec, codec.segment(rows, 0, centre)
        codec.begin(0, tokens)
    keys, values = (each[..., size : 2 * size] for each in x)
    blocks = tokens // group * group
    for device, (codec, segment) in made.items():
        k, v = (each.flatten(2).to(device) for each in (keys, values))
        codec._write_blocks(segment, k[:, :blocks], 0)
        codec._write(segment, 0, k[:, blocks:], blocks)
        codec._write(segment, 1, v, 0)
        codec._write(segment.part(1, 3), 1, v[1:3, 7:8], 5)
    theirs, mine = made["cpu"][1], made["cuda"][1]
    assert torch.equal(mine.zero_SB2L.cpu(), theirs.zero_SB2L)
    # Division is rounded otherwise, so that a scale may be the next one, and a code on the edge of two either.
    torch.testing.assert_close(mine.scale_SB2L.cpu(), theirs.scale_SB2L, atol=1e-7, rtol=2e-3)
    assert (mine.scale_SB2L.cpu() != theirs.scale_SB2L).float().mean() < 1e-2
    assert (mine.codes_SB2C.cpu() != theirs.codes_SB2C).float().mean() < 1e-2
    theirs.codes_SB2C.copy_(mine.codes_SB2C)
    theirs.scale_SB2L.copy_(mine.scale_SB2L)
    for first, stop in ((0, tokens), (33, tokens - 9)):
        for part in ((0, 3), (1, 2)):
            want = made["cpu"][0].read(theirs.part(*part), first, stop)
            got = made["cuda"][0].read(mine.part(*part), first, stop)
            assert torch.equal(got.cpu(), want)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 4}
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name), **sizes)
        return made[name]

    return get


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["opt", "llama3", "mistral"])
def test_every_tier_gives_the_same(larger: Any, tmp_path: Path, name: str, bits: int, padded: bool) -> None:
    model = larger(name)
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)

    def run(policy: Policy, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
        recorder = Recorder()
        with FlexEngine.load(
            model.spec,
            model.checkpoint,
            policy,
            workload=workload,
            device=device,
            dtype="float32",
            offload_dir=tmp_path,
        ) as engine:
            tokens = torch.stack(list(engine.generate(ids, mask, sampling=recorder)), dim=1)
            if device == "cuda":
                assert engine.stats().device_allocated_peak_bytes <= engine.placement.gpu_bytes
        return tokens, recorder.logits().cpu()

    made: dict[str, Any] = {"kv_bits": bits, "kv_group_size": 32}
    want, want_logits = run(Policy(micro_batch_size=6, **made), "cpu")
    for micro_batches, overlap in ((1, 1), (3, 2), (2, 0)):
        cut: dict[str, Any] = {
            "micro_batch_size": 6 // micro_batches,
            "num_micro_batches": micro_batches,
            "overlap": overlap,
            "weights": ON_CPU,
            **made,
        }
        whole, whole_logits = run(Policy(**cut))
        # Other products round otherwise, and a number on the edge of two codes then takes the other: a whole step.
        same = (whole == want).cumprod(dim=1).bool()[:, :-1]
        assert same.float().mean() > 0.6
        assert (whole_logits - want_logits)[:, 1:][same].abs().median() < 0.02 * want_logits.std()
        for tier in ("host", "disk", "mixed"):
            got, logits = run(Policy(**cut, kv_cache=KV_PLACEMENTS[tier]))
            assert torch.equal(got, whole), tier
            torch.testing.assert_close(logits, whole_logits, atol=5e-3, rtol=0)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", SIZES)
def test_the_cpu_reads_what_it_would_without_a_gpu(tmp_path: Path, name: str, kv: str, padded: bool) -> None:
    model, group = make_tiny(name, tmp_path / "model", **SIZES[name]), SIZES[name].get("head_dim", 64)
    policy = Policy(
        micro_batch_size=3,
        num_micro_batches=2,
        kv_cache=KV[kv],
        kv_bits=8,
        kv_group_size=group,
        cpu_attention=True,
    )
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    made = []
    for device in ("cpu", "cuda"):
        recorder = Recorder()
        with FlexEngine.load(
            model.spec,
            model.checkpoint,
            policy,
            workload=workload,
            device=device,
            dtype="float32",
            offload_dir=tmp_path,
            in_place=False,
        ) as engine:
            tokens = torch.stack(list(engine.generate(ids, mask, sampling=recorder)), dim=1)
        made.append((tokens, recorder.logits().cpu()))
    (want, want_logits), (got, logits) = made
    same = (got == want).cumprod(dim=1).bool()[:, :-1]
    assert same.float().mean() > 0.6
    assert (logits - want_logits)[:, 1:][same].abs().median() < 0.005 * want_logits.std()
