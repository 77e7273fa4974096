"""What the command's exit codes mean; errors of the engine carry their own (flexllmgen.errors: 2 and 5)."""

CHECK_FAILED = 3
"""A check that was asked for does not hold: `--fail-on`, or a problem that `doctor` found."""
NOT_DELIVERED = 4
"""Measured, and not in the MLflow store."""
PARTIAL = 6
"""Some cells of a benchmark were measured, others were not."""
INTERRUPTED = 130
