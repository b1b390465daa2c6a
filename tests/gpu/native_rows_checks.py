"""What the CUDA C++ kernels of ops on rows are asked, on a GPU (test_native_rows_gpu.py) and, the same kernels compiled
for a CPU, without one (test_native_cuda_on_cpu.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import test_add_norms
import test_gelu
import test_inner_sgd
import test_layer_norm
import test_linear_cross_entropy
import test_rms_norm
import test_rotary
import test_swiglu
import torch
from second_order import (
    Case,
    check_batch,
    check_dual,
    check_layouts,
    check_needs,
    check_no_graph,
    check_precision,
    check_retained_graph,
    check_values,
    derivatives,
)
from torch import Tensor

#: Of the shared checks, those that every device can take and that a kernel can fail.
CHECKS = (check_values, check_layouts, check_dual, check_needs, check_batch, check_no_graph, check_retained_graph)

CLIPS = {"clip_value": 0.8, "clip_norm": 0.9}
#: Of tensors ``shape``, whose last dimension is the row, which is one of logits in the head's loss.
ROWS: dict[str, Callable[..., Case]] = {
    "inner_sgd": lambda *shape: test_inner_sgd.case("native", shape),
    "inner_sgd_clipped": lambda *shape: test_inner_sgd.case("native", shape, **CLIPS),
    "inner_sgd_rate": lambda *shape: test_inner_sgd.case("native", shape, (), **CLIPS),
    "inner_sgd_rate_of_channels": lambda *shape: test_inner_sgd.case("native", shape, shape[-1:], **CLIPS),
    "inner_sgd_rate_of_samples": lambda *shape: test_inner_sgd.case("native", shape, (shape[0], 1, 1)),
    "rms_norm": lambda *shape: test_rms_norm.case("native", shape),
    "layer_norm": lambda *shape: test_layer_norm.case("native", shape),
    "layer_norm_no_bias": lambda *shape: test_layer_norm.case("native", shape, bias=False),
    "add_rms_norm": lambda *shape: test_add_norms.case("native", shape),
    "add_layer_norm": lambda *shape: test_add_norms.case("native", shape, "layer"),
    "swiglu": lambda *shape: test_swiglu.case("native", *shape),
    "gelu": lambda *shape: test_gelu.case("native", *shape),
    "gelu_tanh": lambda *shape: test_gelu.case("native", *shape, approximate="tanh"),
    "linear_cross_entropy": lambda *shape: _cross_entropy(*shape),
    "linear_cross_entropy_no_bias": lambda *shape: _cross_entropy(*shape, bias=False),
}
#: d, channels that are turned, and whether samples have tables of their own.
ROTARY = {"odd": (7, 4, False), "whole": (64, 64, True), "partial": (64, 16, False), "nothing": (5, 0, False)}
#: Rows of every layout (csrc/cuda/rows.cuh), for 2 and 4 bytes an element: kept by a warp, by blocks of 128, 256 and
#: 512 threads, not kept; and those whose elements are read one by one.
WIDTHS = (65, 128, 1024, 2048, 4096, 8192, 8200, 9001)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _cross_entropy(*shape: int, bias: bool = True) -> Case:
    *positions, classes = shape
    labels = test_linear_cross_entropy.random_labels(*positions, classes=classes)
    return test_linear_cross_entropy.case("native", labels, classes, d=8, bias=bias)


def rotary_case(name: str) -> Case:
    d, rotated, per_sample = ROTARY[name]
    return test_rotary.case("native", 2, 3, 5, d, rotated, tables_per_sample=per_sample)


def on(case: Case, device: str) -> Case:
    return replace(case, inputs=tuple(t.to(device) for t in case.inputs),
                   aux={name: t.to(device) for name, t in case.aux.items()})


def unaligned(x: Tensor) -> Tensor:
    """The same values, one element behind an address of whole vectors; around them NaN, as nobody reads it."""
    nan = x.new_full((1,), torch.nan)
    return torch.cat([nan, x.flatten(), nan])[1:-1].view(x.shape)


def padded(x: Tensor) -> Tensor:
    """The same values in rows with 16 elements between them, NaN."""
    return torch.nn.functional.pad(x, (0, 16), value=torch.nan)[..., : x.shape[-1]] if x.dim() else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"dense": lambda x: x, "unaligned": unaligned, "padded": padded}


def laid_out(case: Case, layout: str) -> Case:
    """The same call of the op on tensors that lie otherwise."""
    lay_out = LAYOUTS[layout]

    def lay(x: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else lay_out(t) for t in x)

    return replace(case, op=lambda *x, **aux: case.op(*lay(x), **aux),
                   dual=lambda *x, **aux: case.dual(*lay(x), **aux))


def check_rounding(case: Case, layout: str, dtype: torch.dtype) -> None:
    """The shared rule of precision. Of few logits' cotangents, those at labels, errors are luck: in float32 they are
    within a bound.
    """
    if case.name == test_linear_cross_entropy.OP and dtype == torch.float32:
        _check_near(laid_out(case, layout).to(dtype))
    else:
        # half-precision results are rounded once, unless the hardware's exp is what errs
        check_precision(laid_out(case, layout), dtype, only_rounds=False)


def _check_near(case: Case) -> None:
    exact = case.to(torch.float64)
    a, u = case.cotangent(), tuple(map(torch.randn_like, case.inputs))
    actual = derivatives(case.run_op, case.inputs, a, u).named()
    truth = derivatives(exact.run_plain, exact.inputs, a.double(), tuple(t.double() for t in u)).named()
    for name, expected in truth.items():
        error, size = (actual[name] - expected).norm(), expected.norm()
        assert error <= 1e-5 * size, f"{name}: error {error:.2e} of {size:.2e}"
