"""Runs transformers' `generate` and hands out each token column as it is made.

`generate` blocks until all tokens are there, but tells a streamer of each column. It runs on one
thread of the engine's own, and the columns come out through a queue. Holds no clock.
"""

import queue
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from strategies.accelerate_load import offload_loader
from strategies.base import Placed, Plan
from strategies.openmp import release_workers


class _Cancelled(Exception):  # noqa: N818 - a signal, not an error
    """The consumer has gone; unwinds `generate`."""


class _ColumnStreamer(BaseStreamer):  # type: ignore[misc]
    """Passes columns on. The first thing a streamer is given is the prompt, which is dropped."""

    def __init__(self, columns: "queue.SimpleQueue[torch.Tensor | BaseException | None]") -> None:
        self.columns = columns
        self.prompt_seen = False
        self.cancelled = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled.is_set():
            raise _Cancelled
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.columns.put(value)

    def end(self) -> None:
        self.columns.put(None)


class AccelerateEngine:
    """A loaded transformers model behind the Engine protocol."""

    def __init__(
        self, model: PreTrainedModel, plan: Plan, *, device: str, kv_offload: bool, folder: Path
    ) -> None:
        self.model, self.plan = model, plan
        self.device = torch.device(device)
        self.kv_offload = kv_offload
        self.folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        # Nothing of the checkpoint's own generation settings: greedy, and EOS ends nothing, so that
        # every sequence gets exactly the tokens asked for.
        self.model.generation_config = GenerationConfig(pad_token_id=0)

    @torch.inference_mode()
    def score(self, ids_BT: torch.Tensor, *, prompt_tokens: int) -> torch.Tensor:  # noqa: ARG002
        """Log-probabilities of each token after the first, float32 of shape (B, T - 1).

        All tokens are read at once: steps would give the same, since KV is kept as it is.
        """
        scores = []
        for ids_T in ids_BT.to(self.device):  # A row at a time: logits are the largest thing there is.
            logits_TV = self.model(ids_T[None], use_cache=False).logits[0, :-1].float()
            wanted_T1 = ids_T[1:, None].to(logits_TV.device)
            scores.append(logits_TV.log_softmax(dim=-1).gather(1, wanted_T1)[:, 0].cpu())
        return torch.stack(scores)

    def generate(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, gen_tokens: int
    ) -> Iterator[torch.Tensor]:
        """Yield `gen_tokens` columns of int64 ids of shape (B,), greedily chosen."""
        assert ids_BT.shape == mask_BT.shape, (ids_BT.shape, mask_BT.shape)
        columns: queue.SimpleQueue[torch.Tensor | BaseException | None] = queue.SimpleQueue()
        streamer = _ColumnStreamer(columns)

        def work() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        ids_BT.to(self.device),
                        attention_mask=mask_BT.to(self.device),
                        max_new_tokens=gen_tokens,
                        do_sample=False,
                        streamer=streamer,
                        cache_implementation="offloaded" if self.kv_offload else None,
                    )
            except _Cancelled:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
                columns.put(error)

        # Planning and loading have computed on this thread; from here on only the other one does.
        release_workers()
        running = self._thread.submit(work)
        try:
            while (item := columns.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item.to(torch.int64)
        finally:
            streamer.cancelled.set()
            running.result()

    def placed(self) -> Placed:
        """Bytes by tier, read from the parameters and from accelerate's index of what it offloaded."""
        tiers: Counter[str] = Counter(gpu=0, cpu=0, disk=0)
        devices: Counter[str] = Counter()
        loader = offload_loader(self.model)
        for name, weight in self.model.named_parameters():
            if weight.device.type != "meta":
                tier, device = ("gpu" if weight.device.type == "cuda" else "cpu"), str(weight.device)
            elif loader is not None and name in loader.state_dict:
                tier, device = "cpu", "cpu (offloaded)"
            else:
                tier, device = "disk", "disk"
            tiers[tier] += weight.nbytes
            devices[device] += weight.nbytes
        files = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return Placed(
            weight_bytes=dict(tiers),
            offload_files_bytes=files,
            pinned_bytes=0,
            details={"weight_bytes_by_device": dict(devices)},
        )

    def close(self) -> None:
        """End the thread and let go of the model."""
        self._thread.shutdown(wait=True)
        del self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
