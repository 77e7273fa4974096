"""FlexEngine: load a model under a policy, generate, score, close.

    with FlexEngine.load(spec, RandomCheckpoint(), policy, workload=workload) as engine:
        for column in engine.generate(ids, mask, sampling=Greedy(), max_new_tokens=32):
            ...

An engine serves one block of requests at a time and holds no timer while it does: it yields one column of tokens
per step, and whoever measures holds the clock.
"""

# B sequences of the block  T prompt positions  V vocabulary

import itertools
import logging
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from flexllmgen.activations import ActivationStore
from flexllmgen.checkpoint import Checkpoint
from flexllmgen.errors import PolicyError, UsageError
from flexllmgen.executor import Executor
from flexllmgen.fits import check_fits
from flexllmgen.host_attention import HostAttention
from flexllmgen.kv_cache import KVCache
from flexllmgen.loading import weight_pack
from flexllmgen.memory.arena import HostArena
from flexllmgen.memory.disk import DiskPool
from flexllmgen.memory.tiers import Lanes
from flexllmgen.memory.transfer import Lane, Traffic
from flexllmgen.models.decoder import Decoder, Weights
from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import Policy
from flexllmgen.sampling import Greedy, Sampling
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB
from flexllmgen.weights import WeightStore
from flexllmgen.workload import Workload

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SCORE_ROWS = 256
"""Rows whose logits are held at once while scoring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine holds and has moved, read back from where it is kept."""

    host_bytes: int
    pinned_bytes: int
    disk_bytes: int
    h2d_bytes: int
    d2h_bytes: int
    disk_read_bytes: int
    disk_write_bytes: int
    device_allocated_peak_bytes: int
    device_reserved_peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A few seconds' measurements of a loaded engine.

    Args:
        stage: the layer whose load was timed.
        load_s: seconds to bring in its streamed weights; None if all are resident.
        step_s: seconds of a decode step of a full block that attends to `context` positions; None if not tried.
    """

    stage: int
    load_s: float | None
    step_s: float | None
    context: int


class FlexEngine:
    """A loaded model. Make one with `load`; use it as a context manager, or `close` it."""

    def __init__(
        self,
        plan: PlacementPlan,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        directory: Path | None,
    ) -> None:
        self.placement, self.device, self.dtype = plan, device, dtype
        cuda = device.type == "cuda"
        overlapped = plan.policy.overlap > 0
        # Without a disk, the main loop itself fills an accelerator's streams: threads would only cost.
        threaded = overlapped and (not cuda or plan.disk_bytes > 0)
        self._traffic = Traffic()
        disk = DiskPool(self._traffic, plan.policy.copy_threads)

        self._lanes: list[Lane] = []

        def lane(name: str, *, streamed: bool = True) -> Lane:
            stream = None
            if cuda and streamed:
                stream = torch.cuda.Stream(device) if overlapped else torch.cuda.current_stream(device)
            self._lanes.append(Lane(name, stream, threaded=threaded))
            return self._lanes[-1]

        def lanes(name: str, ups: int = 1) -> Lanes:
            # Without an accelerator a lane is a thread, and nothing is gained by several.
            up = tuple(lane(f"{name}-up-{index}") for index in range(max(1, ups if cuda else 1)))
            return Lanes(up=up, down=lane(f"{name}-down"), disk=disk, traffic=self._traffic)

        # None waits behind another: KV and hidden states are wanted sooner than the next layer's weights.
        weight_lanes, kv_lanes, hidden_lanes = (
            lanes("weights", 2),
            lanes("kv", plan.kv_slots),
            lanes("hidden"),
        )
        disk_lane, self._disk = lane("disk", streamed=False), disk
        self._arena = HostArena(register=cuda)
        self._closed = False
        try:
            self._weights = WeightStore(
                plan,
                device=device,
                dtype=dtype,
                arena=self._arena,
                lanes=weight_lanes,
                disk_lane=disk_lane,
                directory=directory,
            )
            self._kv = KVCache(
                plan, device=device, dtype=dtype, arena=self._arena, lanes=kv_lanes, directory=directory
            )
            self._hidden = ActivationStore(
                plan,
                device=device,
                dtype=dtype,
                arena=self._arena,
                lanes=hidden_lanes,
                directory=directory,
            )
            self._host_attention = HostAttention(
                plan, device=device, dtype=dtype, arena=self._arena, kv=self._kv, traffic=self._traffic
            )
            self._arena.commit()
            self._weights.fill(checkpoint)
            if cuda:
                torch.cuda.empty_cache()
            self._kv.allocate()
            self._hidden.allocate()
            self._decoder = Decoder(
                plan.spec, device=device, dtype=dtype, attn_sparsity=plan.policy.attn_sparsity
            )
            self._executor = Executor(
                plan,
                decoder=self._decoder,
                weights=self._weights,
                kv=self._kv,
                hidden=self._hidden,
                host_attention=self._host_attention,
                device=device,
                dtype=dtype,
            )
        except BaseException:
            self._close_parts()
            raise

    @staticmethod
    def load(
        spec: ModelSpec,
        weights: Checkpoint,
        policy: Policy,
        *,
        workload: Workload,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        offload_dir: str | Path | None = None,
        gpu_bytes: int | None = None,
        cpu_bytes: int | None = None,
        in_place: bool | None = None,
    ) -> "FlexEngine":
        """Places and loads a model for blocks of up to `policy.block_size` sequences.

        Args:
            weights: a SafetensorsCheckpoint or RandomCheckpoint.
            workload: prompts may be shorter than its `prompt_tokens`, never longer; nor generations.
            device: "auto" is the first CUDA device, else the CPU.
            dtype: "auto" is float32 on the CPU, float16 on an accelerator.
            offload_dir: where disk shares go; needed if there are any.
            gpu_bytes: limit of device memory; on CUDA the allocator is held to it.
            cpu_bytes: limit of host memory.
            in_place: the device reads host memory itself (on the CPU, unless a test wants the copies).

        Raises:
            PlanInfeasible: if the plan does not fit, before anything is loaded.
            CheckpointError: if the weights are not the model's.
            OffloadDirError: if the offload directory cannot be used.
        """
        resolved = resolve_device(device)
        number = resolve_dtype(dtype, resolved)
        plan = plan_placement(
            spec,
            policy,
            workload,
            number.itemsize,
            in_place=resolved.type == "cpu" if in_place is None else in_place,
            gpu_cap_bytes=gpu_bytes,
        )
        directory = Path(offload_dir) if offload_dir is not None else None
        free = None
        if plan.disk_bytes:
            if directory is None:
                raise PolicyError(
                    "the policy has disk shares, which need an offload directory; give --offload-dir"
                )
            packed = weight_pack(plan, weights, directory, resolved, number).num_bytes()
            free = _free_bytes(directory) + packed
        check_fits(plan, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes, disk_free_bytes=free)
        log.info("%s: %s", spec.name or spec.family, plan.describe())
        if resolved.type == "cuda":
            torch.cuda.set_device(resolved)
            if gpu_bytes is not None:
                total = torch.cuda.get_device_properties(resolved).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_bytes / total), resolved)
            torch.cuda.reset_peak_memory_stats(resolved)
        with torch.inference_mode():
            return FlexEngine(plan, weights, device=resolved, dtype=number, directory=directory)

    @property
    def spec(self) -> ModelSpec:
        return self.placement.spec

    @property
    def block_size(self) -> int:
        """Sequences that one call of `generate` takes at most."""
        return sum(self.placement.micro_batches)

    def generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yields one column of new tokens per step: int64 [B] on the host.

        A sequence that has produced a stop id yields `sampling.pad_id` from then on; when all have, it ends.

        Args:
            ids: prompts [B, T], padded on the left; B up to `block_size`.
            mask: zero or false on padding; None without.
            max_new_tokens: columns at most; the workload's by default.
        """
        tokens = max_new_tokens if max_new_tokens is not None else self.placement.workload.gen_tokens
        self._check(ids, mask, tokens)
        return self._generate(ids, mask, sampling or Greedy(), tokens)

    def score(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, prompt_tokens: int | None = None
    ) -> torch.Tensor:
        """Log-probabilities of each token after the first, given those before it: float32 [B, T - 1].

        Zero where the token or the one before it is padding. Takes any number of sequences.

        Args:
            prompt_tokens: so many are read at once as a prompt; the others are fed one a step, and from the second of them
                on predicted by steps, from KV as the cache keeps it. None: all are read at once, and no KV is read back, so
                that a compressed cache does not show.
        """
        prompt = ids.shape[-1] if prompt_tokens is None else min(prompt_tokens, ids.shape[-1])
        first = slice(0, self.block_size)
        head = ids[first, :prompt] if ids.dim() == 2 else ids
        self._check(head, None if mask is None else mask[first, :prompt], ids.shape[-1] - prompt)
        blocks = []
        for start in range(0, len(ids), self.block_size):
            stop = start + self.block_size
            blocks.append(self._score(ids[start:stop], None if mask is None else mask[start:stop], prompt))
        scores = torch.cat(blocks)
        if mask is not None:
            known = mask.bool().cpu()
            scores = scores * (known[:, 1:] & known[:, :-1])
        return scores

    def probe(self, *, steps: bool = True, trials: int = 3) -> Probe:
        """Times what a plan's rates can be corrected by: loading one layer, and a few decode steps of a whole block.

        On an accelerator they are the steps after a prompt of the workload's length, of which all but the last token is
        skipped: the KV they read is whatever lies there. Elsewhere the prompt is one token. Call it between blocks.

        Args:
            steps: false where a step takes too long for a try.
        """
        with torch.inference_mode():
            stage, load_s = self._executor.probe_load(trials)
        moments = []
        tokens, workload = trials + 2, self.placement.workload
        skipped = min(workload.prompt_tokens, self.placement.max_context - tokens) - 1
        if self.device.type == "cpu" or self.placement.kv_cache.disk:
            skipped = min(skipped, 0)  # Reading what was never written there takes no time.
        if steps and skipped >= 0:
            # Different tokens, so that experts are chosen as they are in a run.
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(self.spec.vocab_size, (self.block_size, 1), generator=generator)
            for _ in self._generate(ids, None, Greedy(), tokens, skipped=skipped):
                moments.append(time.perf_counter())  # noqa: PERF401 - the moment it comes, not after
        # The first step still finds loads that ran while the prompt did.
        gaps = [after - before for before, after in itertools.pairwise(moments[1:])]
        step_s = statistics.median(gaps) if gaps else None
        return Probe(stage=stage, load_s=load_s, step_s=step_s, context=skipped + 4)

    def stats(self) -> EngineStats:
        """What is held and was moved until now."""
        moved = self._traffic.bytes
        cuda = self.device.type == "cuda"
        return EngineStats(
            host_bytes=self._arena.num_bytes,
            pinned_bytes=self._arena.pinned_bytes,
            disk_bytes=self._weights.disk_bytes + self._kv.disk_bytes + self._hidden.disk_bytes,
            h2d_bytes=moved["h2d"],
            d2h_bytes=moved["d2h"],
            disk_read_bytes=moved["disk_read"],
            disk_write_bytes=moved["disk_write"],
            device_allocated_peak_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else 0,
            device_reserved_peak_bytes=torch.cuda.max_memory_reserved(self.device) if cuda else 0,
        )

    def moved_bytes(self) -> dict[str, int]:
        """Bytes moved until now: h2d, d2h, disk_read, disk_write; cheap, and safe to ask from any thread."""
        return dict(self._traffic.bytes)

    def close(self) -> None:
        """Ends threads and gives memory and scratch files back; packed weights stay for the next run."""
        if not self._closed:
            self._closed = True
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._close_parts()
            if self.device.type == "cuda":
                # Each stream that multiplied has a workspace of its own, which outlives it.
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()

    def __enter__(self) -> "FlexEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _close_parts(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._disk.close()
        if hasattr(self, "_host_attention"):
            self._host_attention.close()
        if hasattr(self, "_executor"):
            self._executor.forget()
        for part in ("_weights", "_kv", "_hidden"):
            if hasattr(self, part):
                getattr(self, part).close()
        self._arena.close()

    def _check(self, ids: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> None:
        workload = self.placement.workload
        if self._closed:
            raise UsageError("the engine is closed; load it again")
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise UsageError(f"ids must be integers [sequences, tokens], not {ids.dtype} {tuple(ids.shape)}")
        count, prompt = ids.shape
        if not 1 <= count <= self.block_size:
            raise UsageError(
                f"{count} sequences do not fit a block of {self.block_size}; pass them block by block"
            )
        if not 1 <= prompt <= workload.prompt_tokens or prompt + tokens > self.placement.max_context:
            raise UsageError(
                f"{prompt} prompt and {tokens} new tokens do not fit a workload of "
                f"{workload.prompt_tokens} and {workload.gen_tokens}; load the engine for longer ones"
            )
        if mask is not None:
            if mask.shape != ids.shape:
                raise UsageError(f"mask {tuple(mask.shape)} must have the shape of ids {tuple(ids.shape)}")
            if not bool(mask[:, -1].all()):
                raise UsageError("a prompt ends in padding; pad on the left")

    @torch.inference_mode()  # As a decorator it is left at each yield: the consumer's code is not in it.
    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        sampling: Sampling,
        tokens: int,
        *,
        skipped: int = 0,
    ) -> Iterator[torch.Tensor]:
        def head(w: Weights, x_BTD: torch.Tensor, first: int, token: int) -> torch.Tensor:
            # Only the last position decides the next token.
            return sampling.pick(self._decoder.logits(w, x_BTD[:, -1]), first, token)

        stops = torch.tensor(sampling.stop_ids, dtype=torch.int64)
        ended = torch.zeros(len(ids), dtype=torch.bool)
        for column in self._executor.run(ids, mask, tokens, head, skipped=skipped):
            shown = torch.where(ended, sampling.pad_id, column)
            ended = ended | torch.isin(column, stops)
            yield shown
            if len(stops) and bool(ended.all()):
                return

    def _score(self, ids: torch.Tensor, mask: torch.Tensor | None, prompt: int) -> torch.Tensor:
        """Scores of one block, of which `prompt` positions are computed at once."""
        targets = ids.to(self.device).long()
        count, length = targets.shape

        def head(w: Weights, x_BTD: torch.Tensor, first: int, token: int) -> torch.Tensor:
            batch, columns, size = x_BTD.shape
            begin = prompt + token - 1 if token else 0
            end = min(begin + columns, length - 1)  # The last token predicts none that is known.
            rows = x_BTD[:, : end - begin].reshape(-1, size)
            wanted = targets[first : first + batch, begin + 1 : end + 1].reshape(-1)
            found = torch.empty(len(rows), dtype=torch.float32, device=x_BTD.device)
            for start in range(0, len(rows), _SCORE_ROWS):
                stop = start + _SCORE_ROWS
                likely = self._decoder.logits(w, rows[start:stop]).float().log_softmax(dim=-1)
                found[start:stop] = likely.gather(1, wanted[start:stop, None])[:, 0]
            scores[first : first + batch, begin:end] = found.view(batch, end - begin)
            # What comes next is not chosen but given.
            return targets[first : first + batch, end]

        with torch.inference_mode():
            scores = torch.empty(count, length - 1, dtype=torch.float32, device=self.device)
            passes = max(1, length - prompt)
            for _ in self._executor.run(
                ids[:, :prompt], None if mask is None else mask[:, :prompt], passes, head
            ):
                pass
            return scores.cpu()


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that "auto" or a name means."""
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    resolved = torch.device(device)
    return torch.device("cuda", resolved.index or 0) if resolved.type == "cuda" else resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that "auto" or a name means on this device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not supported (supported: {', '.join(DTYPES)})")
    return DTYPES[dtype]


def _free_bytes(directory: Path) -> int:
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


__all__ = ["DTYPES", "EngineStats", "FlexEngine", "GiB", "Probe", "resolve_device", "resolve_dtype"]
