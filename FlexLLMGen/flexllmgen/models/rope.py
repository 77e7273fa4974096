"""Rotary position embedding (Su et al. 2021): frequencies with their scalings, and the rotation."""

# B sequences  T tokens  N heads  H head dim

import math

import torch

from flexllmgen.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Angles per position, [head_dim / 2], scaled as the model was trained.

    `llama3` keeps short wavelengths, divides long ones by `factor` and blends between (Llama 3 herd, section
    3.4.2).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        longest = rope.original_max_positions / rope.low_freq_factor
        shortest = rope.original_max_positions / rope.high_freq_factor
        share = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - share) * frequencies / rope.factor + share * frequencies
        scaled = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
        between = (wavelengths <= longest) & (wavelengths >= shortest)
        return torch.where(between, blended, scaled)
    return frequencies


def angles(
    positions_BT: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's rotations, [B, T, 1, H / 2]."""
    turned = positions_BT[:, :, None, None].float() * frequencies
    return turned.cos().to(dtype), turned.sin().to(dtype)


def rotate(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, i + H / 2) of every head."""
    first, second = x_BTNH.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
