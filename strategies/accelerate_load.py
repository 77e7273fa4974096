"""Loads a transformers model by a device map: from a checkpoint or with random weights.

What the map puts on disk ends up in the run's own folder, in the compute type, whatever the
checkpoint's type and place: then the offload directory's disk is the one that is measured.
"""

import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import CustomDtype, OffloadedWeightsLoader, PrefixedDataset, set_module_tensor_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from flexllmgen.errors import CheckpointError, UsageError
from strategies.accelerate_config import Config
from strategies.base import ModelSource, PlanRequest

log = logging.getLogger(__name__)

TIERS = ("gpu", "cpu", "disk")


def tier_of(place: object) -> str:
    """The tier of a device map's entry: a device index means gpu."""
    return str(place) if place in ("cpu", "disk") else "gpu"


def model_config(source: ModelSource) -> Any:
    """The transformers config object of a resolved model.

    Raises:
        UsageError: transformers does not know the architecture, or it needs the repository's own code.
    """
    try:
        if source.path is not None:
            return AutoConfig.from_pretrained(
                source.path, trust_remote_code=source.trust_remote_code, local_files_only=True
            )
        fields = {key: value for key, value in source.config.items() if key != "model_type"}
        return AutoConfig.for_model(source.config["model_type"], **fields)
    except (ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"model {source.name} runs its own Python code; read that code, then pass --trust-remote-code"
            ) from None
        model_type = source.config.get("model_type")
        raise UsageError(
            f"model {source.name}: transformers cannot use its config (model_type {model_type!r})"
        ) from error


def meta_model(source: ModelSource, dtype: str, attn_implementation: str) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers real.

    Raises:
        UsageError: not a causal language model that transformers knows.
    """
    config = model_config(source)
    attention = None if attn_implementation == "auto" else attn_implementation
    try:
        return empty_model(
            config, dtype, attn_implementation=attention, trust_remote_code=source.trust_remote_code
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"model {source.name}: {str(error).splitlines()[0]}") from error


def empty_model(config: Any, dtype: str, **options: Any) -> PreTrainedModel:
    """The model of a config without weights; `options` are from_config's."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **options)
    model.tie_weights()
    model.eval()
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """Bytes of every distinct weight (tied ones once), and of the blocks that move as one."""

    weights: Mapping[str, int]
    largest_block: tuple[str, int]
    bits: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, *, bits: int | None) -> "WeightSizes":
        """Sizes of a meta model; `bits` is the width that linear weights are quantised to."""
        quantised = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if bits is not None and isinstance(module, torch.nn.Linear) and "lm_head" not in name
        }

        def size(name: str, weight: torch.Tensor) -> int:
            return weight.numel() * bits // 8 if bits is not None and name in quantised else weight.nbytes

        weights = {name: size(name, weight) for name, weight in model.named_parameters()}
        blocks = no_split_classes(model)
        block_sizes = {
            name: sum(size(f"{name}.{own}", weight) for own, weight in module.named_parameters())
            for name, module in model.named_modules()
            if type(module).__name__ in blocks or not any(module.children())
        }
        largest = max(block_sizes.items(), key=lambda item: item[1])
        return cls(weights=weights, largest_block=largest, bits=bits)

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    def by_tier(self, device_map: Mapping[str, object]) -> dict[str, int]:
        """Bytes that a device map puts on each tier."""
        sums = dict.fromkeys(TIERS, 0)
        for name, num_bytes in self.weights.items():
            sums[tier_of(_place(device_map, name))] += num_bytes
        return sums

    def spread(
        self, model: PreTrainedModel, *, device: int | str, device_bytes: int, host_bytes: int | None
    ) -> dict[str, Any]:
        """accelerate's own device map under the caps; it leaves room for the largest block in transit."""
        max_memory: dict[int | str, int] = {device: device_bytes}
        if host_bytes is not None:
            max_memory["cpu"] = host_bytes
        dtype = {8: torch.int8, 4: CustomDtype.INT4, None: None}[self.bits]
        with warnings.catch_warnings():
            # It warns about buffers of offloaded layers; ours are counted and stay on the device.
            warnings.simplefilter("ignore")
            device_map: dict[str, Any] = infer_auto_device_map(
                model, max_memory=max_memory, no_split_module_classes=no_split_classes(model), dtype=dtype
            )
        return device_map


def no_split_classes(model: PreTrainedModel) -> list[str]:
    """Names of the classes whose modules must lie on one device, because of their residual connections."""
    return sorted(model._no_split_modules or ())


def load_pretrained(
    request: PlanRequest, config: Config, device_map: dict[str, Any], folder: Path
) -> PreTrainedModel:
    """Load a checkpoint by the device map, through transformers' own loader.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing or wrongly shaped.
    """
    source = request.model
    assert source.path is not None
    transformers_logging.disable_progress_bar()
    quantization = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "int4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, request.dtype)),
    }[config.quantize]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=getattr(torch, request.dtype),
            device_map=device_map,
            offload_folder=str(folder),
            quantization_config=quantization,
            attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=None if source.allow_pickle else True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"model {source.name}: a weight file is damaged ({error}); download or copy it again"
        ) from error
    except RuntimeError as error:
        if "mismatch" in str(error):
            raise CheckpointError(
                f"model {source.name}: tensors of the checkpoint have other shapes than its config says; the log has them"
            ) from error
        if "PytorchStreamReader" in str(error):
            raise CheckpointError(
                f"model {source.name}: a weight file is damaged ({_one_line(error)}); download or copy it again"
            ) from error
        raise
    if missing := sorted(info["missing_keys"]):
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"model {source.name}: the checkpoint lacks {len(missing)} tensors: {named}")
    _move_disk_weights(model, folder)
    model.eval()
    return model


def load_random(
    request: PlanRequest, config: Config, device_map: dict[str, Any], folder: Path
) -> PreTrainedModel:
    """Build the model with weights drawn at random, by the device map.

    Matrices are normal with the config's initializer range, gains one, biases zero. Each is drawn from
    the run's seed and its own name, so a weight is the same wherever it is placed.
    """
    model = meta_model(request.model, request.dtype, config.attn_implementation)
    std = float(getattr(model.config, "initializer_range", None) or 0.02)
    draw_device = request.machine.device
    index: dict[str, dict[str, str]] = {}
    for position, (name, weight) in enumerate(list(model.named_parameters())):
        value = _draw(weight, name, std, seed=request.seed * 1_000_003 + position, device=draw_device)
        place = _place(device_map, name)
        if place == "disk":
            index[name] = _save(value, name, folder)
        else:
            set_module_tensor_to_device(model, name, place, value=value, dtype=weight.dtype)
    model.tie_weights()
    for tied, owner in getattr(model, "all_tied_weights_keys", {}).items():
        if owner in index:
            index[tied] = index[owner]
    if set(device_map.values()) != {"cpu"}:
        dispatch_model(
            model,
            device_map,
            offload_dir=str(folder),
            offload_index=index or None,
            skip_keys=model._skip_keys_device_placement,
        )
    return model


def offload_loader(model: PreTrainedModel) -> OffloadedWeightsLoader | None:
    """The map of offloaded weights that accelerate's hooks read from; None when nothing is offloaded."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if isinstance(weights, PrefixedDataset):
            dataset = weights.dataset
            assert isinstance(dataset, OffloadedWeightsLoader)
            return dataset
    return None


def _move_disk_weights(model: PreTrainedModel, folder: Path) -> None:
    """Rewrite the weights on disk into `folder`, in the compute type.

    transformers points its index at the checkpoint and converts at each use; an offload directory on
    a faster or slower disk would then make no difference, and the conversion would be timed.
    """
    loader = offload_loader(model)
    if loader is None:
        return
    moved: dict[tuple[str, str], dict[str, str]] = {}
    for name, entry in list(loader.index.items()):
        source = entry.get("safetensors_file")
        if source is None or Path(source).parent == folder:
            continue
        key = (source, entry.get("weight_name", name))
        if key not in moved:
            moved[key] = _save(loader[name], name, folder)
        loader.index[name] = moved[key]


def _save(weight: torch.Tensor, name: str, folder: Path) -> dict[str, str]:
    """Write one weight as safetensors; return its entry for accelerate's offload index."""
    path = folder / f"{name}.safetensors"
    save_file({name: weight.contiguous().cpu()}, path)
    return {
        "safetensors_file": str(path),
        "weight_name": name,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def _draw(weight: torch.Tensor, name: str, std: float, *, seed: int, device: str) -> torch.Tensor:
    if weight.dim() < 2:
        fill = 0.0 if name.endswith("bias") else 1.0
        return torch.full(weight.shape, fill, dtype=weight.dtype, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.empty(weight.shape, dtype=weight.dtype, device=device).normal_(0.0, std, generator=generator)


def _place(device_map: Mapping[str, Any], name: str) -> Any:
    """The place of a weight: that of the longest module name in the map that holds it."""
    holders = [key for key in device_map if key == "" or name == key or name.startswith(key + ".")]
    return device_map[max(holders, key=len)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:150]
