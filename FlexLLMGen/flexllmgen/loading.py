"""Loads all images once, before the first request: from packs and caches that earlier runs left, else from the checkpoint.

Decides where an image's bytes come from, and what of them is kept for the next run. How they are made is filling.py's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from flexllmgen.checkpoint import Checkpoint, RandomCheckpoint
from flexllmgen.filling import fill_by_windows, fill_on_host
from flexllmgen.images import Image
from flexllmgen.memory.disk import DirectFile
from flexllmgen.memory.pack import Part, WeightPack, aligned_empty, pack_key, spread
from flexllmgen.placement import PlacementPlan
from flexllmgen.quantised_cache import QuantisedCache, open_cache
from flexllmgen.units import PAGE, round_up


def weight_pack(
    plan: PlacementPlan, checkpoint: Checkpoint, directory: Path, device: torch.device, dtype: torch.dtype
) -> WeightPack:
    """Where the disk parts of these weights are packed. Random numbers differ between kinds of device."""
    kind = device.type if isinstance(checkpoint, RandomCheckpoint) else ""
    return WeightPack(directory, pack_key(checkpoint.fingerprint + kind, dtype, plan.images))


def load_images(
    plan: PlacementPlan,
    checkpoint: Checkpoint,
    parts_of: Callable[[int], list[Part]],
    directory: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[int, DirectFile]:
    """Fills the memory of all images, and packs their disk parts unless they are there already.

    Those that are compressed are kept in the directory, if there is one, and read from there the next time.

    Args:
        parts_of: the memory that an image's resident and host parts go to; empty parts left out.

    Returns:
        The open file of each image that has a disk part.

    Raises:
        CheckpointError: if it does not fit the model; OffloadDirError: if the disk is full.
    """
    packed = [image for image in plan.images if image.disk_bytes]
    with ExitStack() as held:
        pack, stale = None, set[str]()
        if packed:
            assert directory is not None, "a plan with disk shares needs a directory"
            pack = weight_pack(plan, checkpoint, directory, device, dtype)
            held.enter_context(pack.locked())
            stale = pack.stale(packed)
        cache = held.enter_context(open_cache(plan, checkpoint, directory, dtype))
        _Loading(plan, checkpoint, pack, stale, cache, device, dtype).run(parts_of)
    if pack is None:
        return {}
    return {
        index: DirectFile(pack.path(image)) for index, image in enumerate(plan.images) if image.disk_bytes
    }


class _Loading:
    def __init__(
        self,
        plan: PlacementPlan,
        checkpoint: Checkpoint,
        pack: WeightPack | None,
        stale: set[str],
        cache: QuantisedCache | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._plan, self._checkpoint, self._device, self._dtype = plan, checkpoint, device, dtype
        self._pack, self._stale, self._cache = pack, stale, cache

    def run(self, parts_of: Callable[[int], list[Part]]) -> None:
        needed = [
            (index, image)
            for index, image in enumerate(self._plan.images)
            if image.name in self._stale or image.gpu_bytes + image.cpu_bytes > 0
        ]
        # Files are read, and packs written, by several threads. Random numbers are made on the device, by one
        # thread at a time: its memory has room for few images.
        threads = min(4, max(1, torch.get_num_threads()))
        with ThreadPoolExecutor(max_workers=threads) as pool:
            futures = [pool.submit(self._fill, image, parts_of, index) for index, image in needed]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    @torch.inference_mode()
    def _fill(self, image: Image, parts_of: Callable[[int], list[Part]], index: int) -> None:
        parts, payload = parts_of(index), None
        pack = self._pack if image.name in self._stale else None
        if pack is not None:
            payload = aligned_empty(round_up(image.disk_bytes, PAGE)).zero_()
            parts = [*parts, (image.gpu_bytes + image.cpu_bytes, image.num_bytes, payload)]
        self._spread(image, parts)
        if pack is not None and payload is not None:
            pack.write(image, payload)

    def _spread(self, image: Image, parts: list[Part]) -> None:
        """Fills an image's parts: from the cache, or from the checkpoint for the cache too."""
        checkpoint, device, dtype = self._checkpoint, self._device, self._dtype
        if device.type != "cpu" and isinstance(checkpoint, RandomCheckpoint):
            fill_by_windows(checkpoint, image, parts, device=device, dtype=dtype)
            return
        cache = self._cache if image.compressed and image.disk_bytes < image.num_bytes else None
        if cache is not None and cache.read(image, parts):
            return
        whole = next((part for start, stop, part in parts if (start, stop) == (0, image.num_bytes)), None)
        if cache is not None:
            memory, whole = cache.memory(image), None
        elif whole is not None:
            memory = whole
        else:
            # Zeros, so that the gaps between tensors are the same in every pack of the same weights.
            memory = torch.zeros(image.num_bytes, dtype=torch.uint8)
        fill_on_host(checkpoint, self._plan.spec, image, memory, device=device, dtype=dtype)
        if whole is None:
            spread(memory, 0, parts)
        if cache is not None:
            cache.write(image, memory)
