"""The evaluation: prompts in, a measured and recorded run out."""

__version__ = "0.1.0"
