"""Linear cross-entropy with rows of logits in C++: the launches of their kernels. The products are PyTorch's.

Derivation and names: docs/linear_cross_entropy.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradmem_kernels.checks import Checker
from gradmem_kernels.native.common import DTYPES, address, is_cuda, launch, view
from gradmem_kernels.native.common import refusal as refusal_of
from gradmem_kernels.operators.linear_cross_entropy import LinearCrossEntropy, Rows


def refusal(hidden: Tensor | None = None, *_: Tensor | None) -> str | None:
    """Why these kernels cannot serve such tensors; ``None`` if they can: on a CPU logits are never half precision."""
    return refusal_of(None if hidden is not None and hidden.device.type == "cpu" else hidden)


def _launch_forward(z: Tensor, z_t: Tensor | None, label: Tensor, a: Tensor | None, b: Tensor | None, wanted: bool,
                    row: Tensor, row_t: Tensor | None, lse: Tensor, mu: Tensor | None) -> None:
    _check(label, z)
    arguments, _alive = _arguments(z, z_t, label, a, b, lse, mu)
    launch("cross_entropy_forward", z, {**arguments, "row": address(row), "row_t": address(row_t), "wanted": wanted})


def _launch_backward(*tensors: Tensor | None) -> None:
    _check(tensors[2], tensors[0])
    arguments, _alive = _arguments(*tensors)
    launch("cross_entropy_backward", tensors[0], arguments)


def _check(label: Tensor, z: Tensor) -> None:
    """Where labels had no values when the op was called, in a compiled graph or a transform of ``torch.func``, they are
    looked at here: a kernel on a CPU would write elsewhere than in its row. One on CUDA gives NaN.
    """
    if is_cuda(z):
        return
    low, high = map(int, label.aminmax())
    if low < 0 or high >= z.shape[1]:
        Checker("linear_cross_entropy").fail("labels", f"values in 0 .. {z.shape[1] - 1}, or ignore_index",
                                             low if low < 0 else high)


def _arguments(z: Tensor, z_t: Tensor | None, label: Tensor, *stats: Tensor | None) -> tuple[dict[str, Any], Any]:
    """What both kernels are told; and the tensors that they will read."""
    # products of matrices have dense rows
    assert all(t is None or t.stride(1) == 1 or t.shape[1] == 1 for t in (z, z_t))
    dense = [None if t is None else t.contiguous() for t in (label, *stats)]
    return {"dtype": DTYPES[z.dtype], "rows": z.shape[0], "width": z.shape[1], "z": view(z, 1), "z_t": view(z_t, 1),
            **dict(zip(("label", "a", "b", "lse", "mu"), map(address, dense), strict=True))}, dense


_kernels = LinearCrossEntropy(Rows("native", _launch_forward, _launch_backward))
forward, backward = _kernels.forward, _kernels.backward
dual_forward, dual_backward = _kernels.dual_forward, _kernels.dual_backward
double_backward = _kernels.double_backward
