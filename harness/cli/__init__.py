"""The command line: verbs, their options, exit codes. Every heavy import waits until a verb needs it."""

from harness.cli.app import app, main

# In the order of the help.
# isort: off
from harness.cli import running
from harness.cli import benchmarking
from harness.cli import comparing
from harness.cli import machine
from harness.cli import record
from harness.cli import lists
# isort: on

__all__ = ["app", "benchmarking", "comparing", "lists", "machine", "main", "record", "running"]
