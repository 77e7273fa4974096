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

from flexllmgen.checkpoint import Checkpoint
from flexllmgen.devices import resolve_device, resolve_dtype
from flexllmgen.errors import PolicyError, UsageError
from flexllmgen.fits import check_fits
from flexllmgen.loading import weight_pack
from flexllmgen.models.decoder import Weights
from flexllmgen.parts import EngineParts
from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import Policy
from flexllmgen.sampling import Greedy, Sampling
from flexllmgen.scoring import score_block
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload

log = logging.getLogger(__name__)


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
        self._closed = False
        self._parts = EngineParts(plan, checkpoint, device=device, dtype=dtype, directory=directory)

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
            keep = None if mask is None else mask[start:stop]
            parts = self._parts
            blocks.append(
                score_block(parts.executor, parts.decoder, self.device, ids[start:stop], keep, prompt)
            )
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
            stage, load_s = self._parts.executor.probe_load(trials)
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
        parts, moved = self._parts, self._parts.traffic.bytes
        cuda = self.device.type == "cuda"
        return EngineStats(
            host_bytes=parts.arena.num_bytes,
            pinned_bytes=parts.arena.pinned_bytes,
            disk_bytes=parts.weights.disk_bytes + parts.kv.disk_bytes + parts.hidden.disk_bytes,
            h2d_bytes=moved["h2d"],
            d2h_bytes=moved["d2h"],
            disk_read_bytes=moved["disk_read"],
            disk_write_bytes=moved["disk_write"],
            device_allocated_peak_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else 0,
            device_reserved_peak_bytes=torch.cuda.max_memory_reserved(self.device) if cuda else 0,
        )

    def moved_bytes(self) -> dict[str, int]:
        """Bytes moved until now: h2d, d2h, disk_read, disk_write; cheap, and safe to ask from any thread."""
        return dict(self._parts.traffic.bytes)

    def close(self) -> None:
        """Ends threads and gives memory and scratch files back; packed weights stay for the next run."""
        if not self._closed:
            self._closed = True
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._parts.close()
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
            return sampling.pick(self._parts.decoder.logits(w, x_BTD[:, -1]), first, token)

        stops = torch.tensor(sampling.stop_ids, dtype=torch.int64)
        ended = torch.zeros(len(ids), dtype=torch.bool)
        for column in self._parts.executor.run(ids, mask, tokens, head, skipped=skipped):
            shown = torch.where(ended, sampling.pad_id, column)
            ended = ended | torch.isin(column, stops)
            yield shown
            if len(stops) and bool(ended.all()):
                return


def _free_bytes(directory: Path) -> int:
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
