"""Host memory by the page: private to the process and in huge pages where the system allows."""

import contextlib
import mmap

_ADVICE = ("MADV_HUGEPAGE", "MADV_DONTFORK")
"""A child that is forked needs none of it, and sharing it would have each page copied at the next write."""


def map_memory(num_bytes: int) -> mmap.mmap:
    """Maps fresh zeroed memory, aligned to a page.

    Python's own default is a mapping that processes share, for which most systems have no huge pages.

    Raises:
        OSError: the system has not that much.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, num_bytes)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in _ADVICE:
        # A kernel may be built without either.
        if hasattr(mmap, advice):
            with contextlib.suppress(OSError):
                mapping.madvise(getattr(mmap, advice))
    return mapping
