"""Rotary embedding kernels: a rotation of channel pairs (i, i + r/2), whose transpose turns by the opposite angle."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_kernels.reference.common import wide


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    # stacked, so that under vmap either both tables carry the batch dimension or neither does; [.., 1, S, r/2]
    cos, sin = wide(torch.stack((cos, sin))).unsqueeze(-3)
    factor = torch.cat((cos, cos, cos.new_ones(*cos.shape[:-1], rest)), -1)
    x_wide = wide(x)
    y = x_wide * factor
    # y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin
    y[..., :half].addcmul_(x_wide[..., half : 2 * half], sin, value=-1)
    y[..., half : 2 * half].addcmul_(x_wide[..., :half], sin)
    return y.to(x.dtype)


def transpose(y_bar: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return forward(y_bar, cos, -sin)
