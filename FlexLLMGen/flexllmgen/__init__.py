"""Offloaded LLM generation: weights, KV cache and activations split by exact shares over the tiers."""

import os

# Streams share a GPU's queues, eight unless CUDA is told otherwise when it starts: one that waits for the CPU's attention or
# for a disk would hold up whatever is behind it in the same queue. There are a dozen here.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
