"""Tiles, warps and stages of the attention kernels: one shipped configuration for each kernel, class of dtypes, class
of head dimensions and architecture, with the device and date it was measured on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

__all__ = ["CONFIGS", "DTYPES", "HEAD_DIMS", "KERNELS", "Config", "Key", "choose", "dtype_class",
           "override"]

#: The largest head dimension of each class; each is padded to a power of two.
HEAD_DIMS = (32, 64, 128, 256)
KERNELS = ("forward", "dual_forward", "backward_queries", "backward_keys", "dual_backward_queries",
           "dual_backward_keys")

#: bfloat16 and float16; float32 whose products may be TF32; float32 in full, with three TF32 products for each.
DTYPES = ("half", "tf32", "float32")


class Config(NamedTuple):
    """``own`` rows of a program's block, ``other`` rows of a tile that it goes over."""

    own: int
    other: int
    warps: int
    stages: int
    #: Of dual_backward_keys: the tangents' cotangents in a launch of their own, where all four do not fit in registers.
    apart: bool = False
    #: Columns of the head dimension that products read from memory at a time where tiles do not fit in registers.
    part: int | None = None
    #: Device and date of the measurement that chose it; None: not measured yet.
    measured: str | None = None


class Key(NamedTuple):
    kernel: str
    #: Of DTYPES.
    dtype: str
    head_dim: int
    architecture: str


#: Chosen by compiling, not by running: the first of a list from large tiles to small whose registers do not spill, or
#: spill least. On sm_80 most fit in 99 KiB of shared memory, as sm_86 and sm_89 have.
CONFIGS: Mapping[Key, Config] = {
    Key("forward", "half", 32, "sm_90"): Config(128, 128, 8, 2),
    Key("dual_forward", "half", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("backward_queries", "half", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("backward_keys", "half", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_backward_queries", "half", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_backward_keys", "half", 32, "sm_90"): Config(128, 64, 8, 1),
    Key("forward", "half", 64, "sm_90"): Config(128, 128, 8, 2),
    Key("dual_forward", "half", 64, "sm_90"): Config(128, 64, 8, 3),
    Key("backward_queries", "half", 64, "sm_90"): Config(128, 64, 8, 3),
    Key("backward_keys", "half", 64, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_backward_queries", "half", 64, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_backward_keys", "half", 64, "sm_90"): Config(128, 32, 8, 1),
    Key("forward", "half", 128, "sm_90"): Config(128, 128, 8, 2),
    Key("dual_forward", "half", 128, "sm_90"): Config(128, 32, 8, 3),
    Key("backward_queries", "half", 128, "sm_90"): Config(128, 64, 8, 3),
    Key("backward_keys", "half", 128, "sm_90"): Config(128, 64, 8, 2),
    Key("dual_backward_queries", "half", 128, "sm_90"): Config(128, 32, 8, 3),
    Key("dual_backward_keys", "half", 128, "sm_90"): Config(128, 32, 8, 1, apart=True),
    Key("forward", "half", 256, "sm_90"): Config(128, 32, 8, 3),
    Key("dual_forward", "half", 256, "sm_90"): Config(32, 32, 4, 1),
    Key("backward_queries", "half", 256, "sm_90"): Config(128, 32, 8, 3),
    Key("backward_keys", "half", 256, "sm_90"): Config(32, 32, 4, 1),
    Key("dual_backward_queries", "half", 256, "sm_90"): Config(32, 32, 4, 1),
    Key("dual_backward_keys", "half", 256, "sm_90"): Config(32, 32, 4, 1, apart=True),
    Key("forward", "tf32", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_forward", "tf32", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("backward_queries", "tf32", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("backward_keys", "tf32", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_backward_queries", "tf32", 32, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_backward_keys", "tf32", 32, "sm_90"): Config(128, 32, 8, 3),
    Key("forward", "tf32", 64, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_forward", "tf32", 64, "sm_90"): Config(128, 64, 8, 1),
    Key("backward_queries", "tf32", 64, "sm_90"): Config(128, 64, 8, 3),
    Key("backward_keys", "tf32", 64, "sm_90"): Config(128, 64, 8, 3),
    Key("dual_backward_queries", "tf32", 64, "sm_90"): Config(128, 64, 8, 1),
    Key("dual_backward_keys", "tf32", 64, "sm_90"): Config(128, 32, 8, 3),
    Key("forward", "tf32", 128, "sm_90"): Config(128, 64, 8, 2),
    Key("dual_forward", "tf32", 128, "sm_90"): Config(128, 32, 8, 1),
    Key("backward_queries", "tf32", 128, "sm_90"): Config(128, 64, 8, 1),
    Key("backward_keys", "tf32", 128, "sm_90"): Config(128, 64, 8, 2),
    Key("dual_backward_queries", "tf32", 128, "sm_90"): Config(64, 16, 4, 1),
    Key("dual_backward_keys", "tf32", 128, "sm_90"): Config(32, 32, 4, 1, apart=True),
    Key("forward", "tf32", 256, "sm_90"): Config(128, 32, 8, 1),
    Key("dual_forward", "tf32", 256, "sm_90"): Config(32, 32, 4, 1),
    Key("backward_queries", "tf32", 256, "sm_90"): Config(64, 32, 4, 1),
    Key("backward_keys", "tf32", 256, "sm_90"): Config(32, 32, 4, 1),
    Key("dual_backward_queries", "tf32", 256, "sm_90"): Config(16, 16, 4, 1),
    Key("dual_backward_keys", "tf32", 256, "sm_90"): Config(16, 16, 4, 1, apart=True),
    Key("forward", "float32", 32, "sm_90"): Config(64, 32, 4, 1),
    Key("dual_forward", "float32", 32, "sm_90"): Config(64, 32, 4, 1),
    Key("backward_queries", "float32", 32, "sm_90"): Config(64, 32, 4, 1),
    Key("backward_keys", "float32", 32, "sm_90"): Config(64, 32, 4, 1),
    Key("dual_backward_queries", "float32", 32, "sm_90"): Config(64, 32, 4, 1),
    Key("dual_backward_keys", "float32", 32, "sm_90"): Config(32, 16, 4, 1, part=16),
    Key("forward", "float32", 64, "sm_90"): Config(64, 32, 4, 1),
    Key("dual_forward", "float32", 64, "sm_90"): Config(32, 32, 8, 1, part=32),
    Key("backward_queries", "float32", 64, "sm_90"): Config(64, 32, 4, 1),
    Key("backward_keys", "float32", 64, "sm_90"): Config(64, 32, 4, 1),
    Key("dual_backward_queries", "float32", 64, "sm_90"): Config(32, 32, 8, 1, part=32),
    Key("dual_backward_keys", "float32", 64, "sm_90"): Config(32, 32, 8, 1, part=32),
    Key("forward", "float32", 128, "sm_90"): Config(64, 32, 8, 1, part=32),
    Key("dual_forward", "float32", 128, "sm_90"): Config(32, 16, 8, 1, part=32),
    Key("backward_queries", "float32", 128, "sm_90"): Config(64, 32, 8, 1, part=32),
    Key("backward_keys", "float32", 128, "sm_90"): Config(32, 16, 8, 1, part=32),
    Key("dual_backward_queries", "float32", 128, "sm_90"): Config(32, 32, 8, 1, part=32),
    Key("dual_backward_keys", "float32", 128, "sm_90"): Config(32, 16, 8, 1, apart=True, part=32),
    Key("forward", "float32", 256, "sm_90"): Config(64, 32, 8, 1, part=32),
    Key("dual_forward", "float32", 256, "sm_90"): Config(16, 16, 8, 1, part=32),
    Key("backward_queries", "float32", 256, "sm_90"): Config(64, 32, 8, 1, part=32),
    Key("backward_keys", "float32", 256, "sm_90"): Config(32, 16, 8, 1, part=32),
    Key("dual_backward_queries", "float32", 256, "sm_90"): Config(32, 16, 8, 1, part=32),
    Key("dual_backward_keys", "float32", 256, "sm_90"): Config(16, 16, 8, 1, apart=True, part=32),
    Key("forward", "half", 32, "sm_80"): Config(128, 128, 8, 2),
    Key("dual_forward", "half", 32, "sm_80"): Config(128, 64, 8, 3),
    Key("backward_queries", "half", 32, "sm_80"): Config(128, 64, 8, 3),
    Key("backward_keys", "half", 32, "sm_80"): Config(128, 64, 8, 3),
    Key("dual_backward_queries", "half", 32, "sm_80"): Config(128, 64, 8, 3),
    Key("dual_backward_keys", "half", 32, "sm_80"): Config(128, 64, 8, 1),
    Key("forward", "half", 64, "sm_80"): Config(128, 128, 8, 2),
    Key("dual_forward", "half", 64, "sm_80"): Config(128, 32, 8, 3),
    Key("backward_queries", "half", 64, "sm_80"): Config(128, 64, 8, 3),
    Key("backward_keys", "half", 64, "sm_80"): Config(128, 64, 8, 1),
    Key("dual_backward_queries", "half", 64, "sm_80"): Config(128, 32, 8, 2),
    Key("dual_backward_keys", "half", 64, "sm_80"): Config(64, 16, 4, 1),
    Key("forward", "half", 128, "sm_80"): Config(128, 64, 8, 2),
    Key("dual_forward", "half", 128, "sm_80"): Config(64, 16, 4, 1),
    Key("backward_queries", "half", 128, "sm_80"): Config(128, 32, 8, 2),
    Key("backward_keys", "half", 128, "sm_80"): Config(64, 32, 4, 1),
    Key("dual_backward_queries", "half", 128, "sm_80"): Config(32, 32, 4, 1),
    Key("dual_backward_keys", "half", 128, "sm_80"): Config(64, 16, 4, 1, apart=True),
    Key("forward", "half", 256, "sm_80"): Config(128, 32, 8, 1),
    Key("dual_forward", "half", 256, "sm_80"): Config(32, 32, 4, 1),
    Key("backward_queries", "half", 256, "sm_80"): Config(64, 32, 4, 1),
    Key("backward_keys", "half", 256, "sm_80"): Config(32, 32, 4, 1),
    Key("dual_backward_queries", "half", 256, "sm_80"): Config(16, 16, 4, 1),
    Key("dual_backward_keys", "half", 256, "sm_80"): Config(16, 16, 4, 1, apart=True),
    Key("forward", "tf32", 32, "sm_80"): Config(128, 64, 8, 3),
    Key("dual_forward", "tf32", 32, "sm_80"): Config(128, 32, 8, 3),
    Key("backward_queries", "tf32", 32, "sm_80"): Config(128, 64, 8, 3),
    Key("backward_keys", "tf32", 32, "sm_80"): Config(128, 64, 8, 3),
    Key("dual_backward_queries", "tf32", 32, "sm_80"): Config(128, 64, 8, 1),
    Key("dual_backward_keys", "tf32", 32, "sm_80"): Config(64, 32, 4, 2),
    Key("forward", "tf32", 64, "sm_80"): Config(128, 64, 8, 2),
    Key("dual_forward", "tf32", 64, "sm_80"): Config(64, 16, 4, 1),
    Key("backward_queries", "tf32", 64, "sm_80"): Config(128, 32, 8, 3),
    Key("backward_keys", "tf32", 64, "sm_80"): Config(64, 32, 4, 2),
    Key("dual_backward_queries", "tf32", 64, "sm_80"): Config(64, 16, 4, 1),
    Key("dual_backward_keys", "tf32", 64, "sm_80"): Config(32, 32, 4, 1),
    Key("forward", "tf32", 128, "sm_80"): Config(128, 32, 8, 1),
    Key("dual_forward", "tf32", 128, "sm_80"): Config(32, 32, 4, 1),
    Key("backward_queries", "tf32", 128, "sm_80"): Config(64, 32, 4, 1),
    Key("backward_keys", "tf32", 128, "sm_80"): Config(64, 16, 4, 1),
    Key("dual_backward_queries", "tf32", 128, "sm_80"): Config(16, 16, 4, 1),
    Key("dual_backward_keys", "tf32", 128, "sm_80"): Config(16, 16, 4, 1, apart=True),
    Key("forward", "tf32", 256, "sm_80"): Config(32, 32, 4, 1),
    Key("dual_forward", "tf32", 256, "sm_80"): Config(16, 16, 4, 1),
    Key("backward_queries", "tf32", 256, "sm_80"): Config(32, 16, 4, 1),
    Key("backward_keys", "tf32", 256, "sm_80"): Config(16, 16, 4, 1),
    Key("dual_backward_queries", "tf32", 256, "sm_80"): Config(16, 16, 4, 1),
    Key("dual_backward_keys", "tf32", 256, "sm_80"): Config(16, 16, 4, 1, apart=True),
    Key("forward", "float32", 32, "sm_80"): Config(64, 32, 4, 1),
    Key("dual_forward", "float32", 32, "sm_80"): Config(64, 32, 4, 1),
    Key("backward_queries", "float32", 32, "sm_80"): Config(64, 32, 4, 1),
    Key("backward_keys", "float32", 32, "sm_80"): Config(64, 32, 4, 1),
    Key("dual_backward_queries", "float32", 32, "sm_80"): Config(32, 16, 4, 1),
    Key("dual_backward_keys", "float32", 32, "sm_80"): Config(32, 16, 4, 1, part=16),
    Key("forward", "float32", 64, "sm_80"): Config(64, 32, 4, 1),
    Key("dual_forward", "float32", 64, "sm_80"): Config(32, 32, 8, 1, part=32),
    Key("backward_queries", "float32", 64, "sm_80"): Config(32, 32, 4, 1),
    Key("backward_keys", "float32", 64, "sm_80"): Config(32, 32, 4, 1),
    Key("dual_backward_queries", "float32", 64, "sm_80"): Config(32, 32, 8, 1, part=32),
    Key("dual_backward_keys", "float32", 64, "sm_80"): Config(32, 32, 8, 1, part=32),
    Key("forward", "float32", 128, "sm_80"): Config(64, 32, 8, 1, part=32),
    Key("dual_forward", "float32", 128, "sm_80"): Config(32, 16, 8, 1, part=32),
    Key("backward_queries", "float32", 128, "sm_80"): Config(64, 32, 8, 1, part=32),
    Key("backward_keys", "float32", 128, "sm_80"): Config(64, 32, 8, 1, part=32),
    Key("dual_backward_queries", "float32", 128, "sm_80"): Config(32, 16, 8, 1, part=32),
    Key("dual_backward_keys", "float32", 128, "sm_80"): Config(32, 16, 8, 1, apart=True, part=32),
    Key("forward", "float32", 256, "sm_80"): Config(64, 32, 8, 1, part=32),
    Key("dual_forward", "float32", 256, "sm_80"): Config(16, 16, 8, 1, part=32),
    Key("backward_queries", "float32", 256, "sm_80"): Config(64, 32, 8, 1, part=32),
    Key("backward_keys", "float32", 256, "sm_80"): Config(32, 16, 8, 1, part=32),
    Key("dual_backward_queries", "float32", 256, "sm_80"): Config(32, 16, 8, 1, part=32),
    Key("dual_backward_keys", "float32", 256, "sm_80"): Config(16, 16, 8, 1, apart=True, part=32),
}

#: Small tiles, since tests are small; float64 too.
INTERPRETER = Config(32, 32, 4, 1)

_overrides: dict[str, Config] = {}


def choose(kernel: str, dtype: str, head_dim: int, architecture: str) -> Config:
    """The configuration of a kernel for this class of dtypes and this head dimension."""
    if kernel in _overrides:
        return _overrides[kernel]
    if architecture == "interpreter":
        return INTERPRETER
    head_class = next(d for d in HEAD_DIMS if head_dim <= d)
    return CONFIGS[Key(kernel, dtype, head_class, architecture)]


def dtype_class(dtype: torch.dtype) -> str:
    """The class of a dtype, following PyTorch's float32 matmul precision. (The interpreter's float64 needs none.)"""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@contextlib.contextmanager
def override(**configs: Config) -> Iterator[None]:
    """Runs kernels with these configurations inside the ``with`` block, whatever the table says (for tuning)."""
    unknown = configs.keys() - set(KERNELS)
    if unknown:
        raise ValueError(f"override: expected kernels of {', '.join(KERNELS)}, got {', '.join(sorted(unknown))}")
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
