"""Sizes: their grain, and how a person reads them."""

PAGE = 4096
"""What direct disk I/O must be aligned to, in memory and in the file."""
GiB = 1 << 30


def gib(num_bytes: float) -> str:
    """Bytes as text in binary units.

    >>> gib(3 * 2**30), gib(200_000_000), gib(512)
    ('3.00 GiB', '190.7 MiB', '512 B')
    """
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.1f} MiB"
    if num_bytes >= 2**10:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes:.0f} B"


def round_up(value: int, grain: int) -> int:
    """The least multiple of `grain` that is at least `value`."""
    return -(-value // grain) * grain


DISK_THREADS = 4
"""Threads that read and write the disk, unless a policy says otherwise; rates are measured with so many."""
