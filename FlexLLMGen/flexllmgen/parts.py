"""EngineParts: the stores, lanes and loop of an engine, made and ended together.

What is held, and in which order it is taken and given back, is known here; what is asked of an engine is not.
"""

from pathlib import Path

import torch

from flexllmgen.activations import ActivationStore
from flexllmgen.checkpoint import Checkpoint
from flexllmgen.executor import Executor
from flexllmgen.host_attention import HostAttention
from flexllmgen.kv_cache import KVCache
from flexllmgen.memory.arena import HostArena
from flexllmgen.memory.disk import DiskPool
from flexllmgen.memory.tiers import Lanes
from flexllmgen.memory.transfer import Lane, Traffic
from flexllmgen.models.decoder import Decoder
from flexllmgen.placement import PlacementPlan
from flexllmgen.weights import WeightStore


class EngineParts:
    """What an engine is made of, with all weights loaded. Close it."""

    def __init__(
        self,
        plan: PlacementPlan,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        directory: Path | None,
    ) -> None:
        cuda = device.type == "cuda"
        overlapped = plan.policy.overlap > 0
        # Without a disk, the main loop itself fills an accelerator's streams: threads would only cost.
        threaded = overlapped and (not cuda or plan.disk_bytes > 0)
        self.traffic = Traffic()
        disk = DiskPool(self.traffic, plan.policy.copy_threads)

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
            return Lanes(up=up, down=lane(f"{name}-down"), disk=disk, traffic=self.traffic)

        # None waits behind another: KV and hidden states are wanted sooner than the next layer's weights.
        weight_lanes, kv_lanes, hidden_lanes = (
            lanes("weights", 2),
            lanes("kv", plan.kv_slots),
            lanes("hidden"),
        )
        disk_lane, self.disk = lane("disk", streamed=False), disk
        self.arena = HostArena(register=cuda)
        try:
            self.weights = WeightStore(
                plan,
                device=device,
                dtype=dtype,
                arena=self.arena,
                lanes=weight_lanes,
                disk_lane=disk_lane,
                directory=directory,
            )
            self.kv = KVCache(
                plan, device=device, dtype=dtype, arena=self.arena, lanes=kv_lanes, directory=directory
            )
            self.hidden = ActivationStore(
                plan,
                device=device,
                dtype=dtype,
                arena=self.arena,
                lanes=hidden_lanes,
                directory=directory,
            )
            self.host_attention = HostAttention(
                plan, device=device, dtype=dtype, arena=self.arena, kv=self.kv, traffic=self.traffic
            )
            self.arena.commit()
            self.weights.fill(checkpoint)
            if cuda:
                torch.cuda.empty_cache()
            self.kv.allocate()
            self.hidden.allocate()
            self.decoder = Decoder(
                plan.spec, device=device, dtype=dtype, attn_sparsity=plan.policy.attn_sparsity
            )
            self.executor = Executor(
                plan,
                decoder=self.decoder,
                weights=self.weights,
                kv=self.kv,
                hidden=self.hidden,
                host_attention=self.host_attention,
                device=device,
                dtype=dtype,
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends threads and gives memory and scratch files back, also of parts of which not all were made."""
        for lane in self._lanes:
            lane.close()
        self.disk.close()
        if hasattr(self, "host_attention"):
            self.host_attention.close()
        if hasattr(self, "executor"):
            self.executor.forget()
        for part in ("weights", "kv", "hidden"):
            if hasattr(self, part):
                getattr(self, part).close()
        self.arena.close()
