"""`python -m harness.cli`: the command without its console script."""

from harness.cli import main

if __name__ == "__main__":
    main()
