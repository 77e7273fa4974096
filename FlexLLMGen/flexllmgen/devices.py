"""Which device and which number type a name means."""

import torch

from flexllmgen.errors import UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that "auto" or a name means."""
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    resolved = torch.device(device)
    return torch.device("cuda", resolved.index or 0) if resolved.type == "cuda" else resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that "auto" or a name means on this device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not supported (supported: {', '.join(DTYPES)})")
    return DTYPES[dtype]
