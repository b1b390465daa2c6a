"""Rotary embedding kernels: a rotation of channel pairs (i, i + r/2), whose transpose turns by the opposite angle."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_kernels.reference.common import addcmul_, wide


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = wide(cos).unsqueeze(-3), wide(sin).unsqueeze(-3)  # [.., 1, S, r/2]
    # narrow, for the sake of torch's older vmap, which cannot take the slice [..., :d]
    pairs, rest = wide(x.narrow(-1, 0, 2 * half)), x.narrow(-1, 2 * half, x.shape[-1] - 2 * half)
    # y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin
    y = addcmul_(pairs * torch.cat((cos, cos), -1), pairs.roll(half, -1), torch.cat((-sin, sin), -1)).to(x.dtype)
    return torch.cat((y, rest), -1) if rest.shape[-1] else y


def transpose(y_bar: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return forward(y_bar, cos, -sin)
