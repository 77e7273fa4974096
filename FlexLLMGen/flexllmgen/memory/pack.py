"""WeightPack: the disk parts of packed layers in the offload directory, kept for the next run.

A folder per model, dtype and layout; a file per layer: its bytes in whole pages, then a page that holds their
length and checksum. Files appear by renaming, so a file that is there is whole; a lock serialises two
processes that pack the same model. A file whose checksum does not match is thrown away and packed again.
"""

import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from flexllmgen.compression import RULE
from flexllmgen.errors import OffloadDirError
from flexllmgen.images import Image
from flexllmgen.memory.disk import DirectFile
from flexllmgen.memory.mapping import map_memory
from flexllmgen.units import PAGE, round_up

log = logging.getLogger(__name__)

_CHECK_BYTES = 8 << 20

Part = tuple[int, int, torch.Tensor]
"""A range [start, stop) of an image's bytes, and the flat memory they go to."""


def aligned_empty(num_bytes: int) -> torch.Tensor:
    """Page-aligned host bytes, which direct I/O needs."""
    return torch.frombuffer(map_memory(max(num_bytes, PAGE)), dtype=torch.uint8)[:num_bytes]


def pack_key(fingerprint: str, dtype: torch.dtype, images: Sequence[Image]) -> str:
    """Names a pack: equal for the same weights, dtype, layout and cuts."""
    layout = [
        [image.name, image.num_bytes, image.disk_bytes]
        + [
            # Without bits as it ever was: packs that are there are found again.
            [name, tensor.offset, list(tensor.shape)]
            + ([RULE, tensor.bits, tensor.group_size] if tensor.bits else [])
            for name, tensor in image.tensors.items()
        ]
        for image in images
        if image.disk_bytes
    ]
    text = json.dumps([1, fingerprint, str(dtype), layout])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def packed_bytes(directory: Path) -> int:
    """Bytes of all packs under a directory."""
    return sum(path.stat().st_size for path in directory.glob("weights-*/*.bin"))


class WeightPack:
    """The packed files of one model and layout under `directory`."""

    def __init__(self, directory: Path, key: str, kind: str = "weights") -> None:
        self.folder = directory / f"{kind}-{key}"
        self._made: list[Path] = []

    def path(self, image: Image) -> Path:
        return self.folder / f"{image.name}.bin"

    def num_bytes(self) -> int:
        """Bytes that are packed already."""
        return sum(path.stat().st_size for path in self.folder.glob("*.bin")) if self.folder.is_dir() else 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the pack alone while checking and writing.

        If that is interrupted or fails, files that are whole stay for the next time; where the disk is full or cannot be used,
        what was written is given back.
        """
        descriptor = self._lock()
        try:
            self._sweep()
            yield
        except BaseException as error:
            if isinstance(error, OffloadDirError):
                for path in self._made:
                    path.unlink(missing_ok=True)
            self._remove_if_empty()
            raise
        finally:
            os.close(descriptor)

    def _lock(self) -> int:
        """Waits for the lock. One that a run which failed has removed meanwhile is no lock: a new one is made."""
        path = self.folder / ".lock"
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise OffloadDirError(
                    f"cannot write to {self.folder} ({error.strerror}); choose another --offload-dir"
                ) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        # Its time says when the pack was last used.
                        os.utime(descriptor)
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def stale(self, images: Sequence[Image]) -> set[str]:
        """Names of the images whose file is absent or damaged; damaged files are removed."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            verdicts = list(pool.map(self.read, images))
        return {image.name for image, good in zip(images, verdicts, strict=True) if not good}

    def read(self, image: Image, parts: Sequence[Part] = ()) -> bool:
        """Checks an image's file, and spreads its bytes over `parts`; a damaged one is removed.

        What was spread before the damage showed is written over by whoever makes the image anew.
        """
        if self._read(image, parts):
            return True
        if self.path(image).exists():
            log.warning("%s is damaged and is packed again", self.path(image))
            self.path(image).unlink()
        return False

    def write(self, image: Image, payload: torch.Tensor) -> None:
        """Writes the disk part of an image: `payload`, page-aligned and padded to whole pages.

        Raises:
            OffloadDirError: if the disk is full; nothing of the file is left then.
        """
        trailer = aligned_empty(PAGE)
        text = json.dumps({"bytes": payload.numel(), "crc32": _checksum(payload)}).encode()
        trailer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        temporary = self.folder / f".{image.name}-{os.getpid()}.tmp"
        file: DirectFile | None = None
        try:
            file = DirectFile(temporary, writable=True, size=payload.numel() + PAGE)
            file.write(payload, 0)
            file.write(trailer, payload.numel())
            file.sync()
            temporary.replace(self.path(image))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            if file is not None:
                file.close()
        self._made.append(self.path(image))

    def _read(self, image: Image, parts: Sequence[Part]) -> bool:
        path, size = self.path(image), round_up(image.disk_bytes, PAGE)
        if not path.exists() or path.stat().st_size != size + PAGE:
            return False
        file = DirectFile(path)
        try:
            trailer = aligned_empty(PAGE)
            file.read(trailer, size)
            said = json.loads(bytes(trailer.tolist()).rstrip(b"\0"))
            piece, checksum = aligned_empty(min(_CHECK_BYTES, size)), 0
            for start in range(0, size, _CHECK_BYTES):
                part = piece[: min(_CHECK_BYTES, size - start)]
                file.read(part, start)
                checksum = _checksum(part, checksum)
                spread(part, start, parts)
            return bool(said == {"bytes": size, "crc32": checksum})
        except (ValueError, OffloadDirError):
            return False
        finally:
            file.close()

    def _sweep(self) -> None:
        """Half-written files of a process that was killed; we hold the lock, so nobody is writing them."""
        for orphan in self.folder.glob(".*.tmp"):
            orphan.unlink(missing_ok=True)

    def _remove_if_empty(self) -> None:
        if not any(self.folder.glob("*.bin")):
            (self.folder / ".lock").unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()


def _checksum(memory: torch.Tensor, start: int = 0) -> int:
    return zlib.crc32(memory.numpy().data, start)


def spread(memory: torch.Tensor, first: int, parts: Sequence[Part]) -> None:
    """Copies an image's bytes from `first` on to the parts that they belong to."""
    for start, stop, target in parts:
        low, high = max(start, first), min(stop, first + len(memory))
        if low < high:
            target[low - start : high - start].copy_(memory[low - first : high - first])
