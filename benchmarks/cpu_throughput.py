"""Throughput on the CPU against transformers' generate: the same weights, prompts and batch, taking turns in one run.

    python benchmarks/cpu_throughput.py --model opt-125m --batch 8 --prompt 128 --gen 32

Prints one JSON line: seconds of each pass, tokens per second at the median, their ratio, whether the tokens agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "FlexLLMGen"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    args = parser.parse_args()

    import transformers

    from flexllmgen.checkpoint import SafetensorsCheckpoint
    from flexllmgen.engine import FlexEngine
    from flexllmgen.models.published import published_config
    from flexllmgen.policy import ON_CPU, Policy
    from flexllmgen.spec import ModelSpec
    from flexllmgen.workload import Workload

    config_dict = published_config(args.model)
    if args.layers:
        config_dict["num_hidden_layers"] = args.layers
    config = transformers.AutoConfig.for_model(**config_dict)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, config.vocab_size - 100, (args.batch, args.prompt), generator=generator)
    mask = torch.ones_like(ids)

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=args.gen,
                min_new_tokens=args.gen,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=1,
            )
        return out[:, args.prompt :]

    workload = Workload(num_sequences=args.batch, prompt_tokens=args.prompt, gen_tokens=args.gen)
    policy = Policy(micro_batch_size=args.batch, weights=ON_CPU, kv_cache=ON_CPU)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    cpu_seconds: dict[str, list[float]] = {"ours": [], "transformers": []}

    def timed(name: str, work: Callable[[], object]) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        work()
        seconds[name].append(time.perf_counter() - start)
        cpu_seconds[name].append(time.process_time() - cpu_start)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with FlexEngine.load(
            ModelSpec.from_hf_config(config.to_dict()),
            SafetensorsCheckpoint(folder),
            policy,
            workload=workload,
            device="cpu",
            dtype="float32",
        ) as engine:
            same = torch.equal(torch.stack(list(engine.generate(ids)), dim=1), theirs())
            for _ in range(args.repeats):
                timed("ours", lambda: list(engine.generate(ids)))
                timed("transformers", theirs)
    rates = {name: args.batch * args.gen / statistics.median(values) for name, values in seconds.items()}
    result = {
        "model": args.model,
        "batch": args.batch,
        "prompt": args.prompt,
        "gen": args.gen,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "same_tokens": same,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "tok_s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["transformers"], 3),
        # Both figures that a neighbour on the machine disturbs less: the best pass, and processor time.
        "ratio_of_best": round(min(seconds["transformers"]) / min(seconds["ours"]), 3),
        "ratio_of_cpu_time": round(
            statistics.median(cpu_seconds["transformers"]) / statistics.median(cpu_seconds["ours"]), 3
        ),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
