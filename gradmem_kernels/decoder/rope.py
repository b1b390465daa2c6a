"""Frequencies and tables of the rotary embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmem_kernels.decoder.config import DecoderConfig, RopeScaling

__all__ = ["Rope", "inverse_frequencies", "tables"]

Rope = tuple[Tensor, Tensor]


def inverse_frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """``[r/2]``, float64: the angle between neighbouring positions of each rotated pair of channels."""
    exponent = torch.arange(0, config.rotated, 2, dtype=torch.float64, device=device) / config.rotated
    frequencies = config.rope_theta ** -exponent
    return frequencies if config.rope_scaling is None else _scaled(frequencies, config.rope_scaling)


def tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rope:
    """``cos, sin [..., r/2]`` for :func:`gradmem_kernels.rotary`; the angles are computed in float64."""
    angle = positions.to(torch.float64)[..., None] * frequencies.to(torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    slow = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return slow
    # llama3: how often a pair turns over the original context says which part of it keeps its speed
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(slow, frequencies, kept.clamp(0, 1))
