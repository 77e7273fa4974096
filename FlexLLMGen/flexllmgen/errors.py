"""The exception tree. Each message names the need, the limit and the way out, on one line.

Everything a user can cause derives from `OffloadError`; the command line turns each into one line
and its exit code. `assert` is for our own mistakes and is never caught.
"""


class OffloadError(Exception):
    """Base of every error that a user can cause and mend."""

    exit_code = 2


class UsageError(OffloadError):
    """Something the user named does not exist or does not go together."""


class UnsupportedModelError(UsageError):
    """The architecture is not one this engine can run."""


class CheckpointError(UsageError):
    """A checkpoint lacks tensors, has extra or wrongly shaped ones, or its file is damaged."""


class PolicyError(UsageError):
    """A policy contradicts itself: shares over 100 %, a count below one."""


class OffloadDirError(UsageError):
    """The offload directory cannot be written, or is full."""


class PlanInfeasible(OffloadError):  # noqa: N818 - reads as a verdict, and is the documented name
    """The plan does not fit the memory it was given; the message carries the numbers."""

    exit_code = 5


class OutOfMemory(OffloadError):  # noqa: N818
    """Memory ran out although the plan said it would fit."""

    exit_code = 5
