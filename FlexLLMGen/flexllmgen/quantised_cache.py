"""QuantisedCache: the compressed layers of a checkpoint in the offload directory, so that a model is quantised once.

A file per image with all its bytes, wherever a plan puts them: other shares find it again. What an interrupted start has
finished is found again too. It is a cache: where it cannot be written, weights are quantised anew at the next start.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from flexllmgen.checkpoint import Checkpoint, RandomCheckpoint
from flexllmgen.errors import OffloadDirError
from flexllmgen.images import Image
from flexllmgen.memory.pack import Part, WeightPack, aligned_empty, pack_key
from flexllmgen.placement import PlacementPlan
from flexllmgen.units import PAGE, gib, round_up

log = logging.getLogger(__name__)


@contextmanager
def open_cache(
    plan: PlacementPlan, checkpoint: Checkpoint, directory: Path | None, dtype: torch.dtype
) -> Iterator["QuantisedCache | None"]:
    """Holds the cache of these weights alone; None where there is none to use.

    Random numbers are not kept: they are made and quantised sooner than they are read.
    """
    # What lies on disk as a whole has a pack, which is the same.
    images = [image for image in plan.images if image.compressed and image.disk_bytes < image.num_bytes]
    if directory is None or not images or isinstance(checkpoint, RandomCheckpoint):
        yield None
        return
    whole = [_whole(image) for image in plan.images if image.compressed]
    pack = WeightPack(directory, pack_key(checkpoint.fingerprint, dtype, whole), kind="quantised")
    with ExitStack() as stack:
        try:
            stack.enter_context(pack.locked())
        except OffloadDirError as error:
            log.warning("quantised weights are not kept: %s", error)
            yield None
            return
        yield QuantisedCache(pack, writable=_has_room(pack, images, plan))


class QuantisedCache:
    """The files of one checkpoint, number type, bits and layout. Made by `open_cache`.

    Args:
        writable: false where the disk has no room for what is absent.
    """

    def __init__(self, pack: WeightPack, *, writable: bool) -> None:
        self._pack, self._writable = pack, writable

    def read(self, image: Image, parts: Sequence[Part]) -> bool:
        """Puts an image's bytes where they belong; false where they are not there, or damaged."""
        return self._pack.read(_whole(image), parts)

    def memory(self, image: Image) -> torch.Tensor:
        """Zeros to make an image in, uint8 [image.num_bytes]; `write` takes it."""
        return aligned_empty(round_up(image.num_bytes, PAGE))[: image.num_bytes]

    def write(self, image: Image, memory: torch.Tensor) -> None:
        """Keeps an image; without room it is left."""
        if not self._writable:
            return
        # The pages that it was made in, whole.
        payload = memory.as_strided((round_up(image.num_bytes, PAGE),), (1,))
        try:
            self._pack.write(_whole(image), payload)
        except OffloadDirError as error:
            self._writable = False
            log.warning("quantised weights are not kept: %s", error)


def _whole(image: Image) -> Image:
    return replace(image, gpu_bytes=0, cpu_bytes=0)


def _has_room(pack: WeightPack, images: Sequence[Image], plan: PlacementPlan) -> bool:
    absent = sum(image.num_bytes + 2 * PAGE for image in images if not pack.path(image).exists())
    free = shutil.disk_usage(pack.folder).free
    if absent and absent + plan.disk_bytes > free:
        log.warning(
            "quantised weights are not kept: they take %s in %s, which has %s free",
            gib(absent + plan.disk_bytes),
            pack.folder,
            gib(free),
        )
        return False
    return True
