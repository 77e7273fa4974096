"""Offloaded LLM generation: weights, KV cache and activations split by exact shares over the tiers."""
