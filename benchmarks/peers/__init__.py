"""Other ways to run a model larger than its GPU, each measured the same way: `run(case)` says what it took.

Random weights, the same random prompts for all, greedy, no early stop, device memory capped in torch's allocator. None of
them is part of the project: what is missing on a machine is told by the error that its import raises.
"""

PEERS = {
    "accelerate": "accelerate_hooks:run",
    "prefetch": "prefetch_hooks:run",
    "diffusers": "group_offload:run",
    "deepspeed": "zero_inference:run",
    "flextensor": "flextensor_offload:run",
    "flexgen": "flexgen_original:run",
    "bitsandbytes": "bitsandbytes_hooks:run",
    "bitsandbytes-prefetch": "bitsandbytes_hooks:run_prefetched",
}
"""Module and function by peer."""
