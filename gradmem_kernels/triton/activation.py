"""What swiglu and gelu share on Triton: the launches of their kernels. Derivations: docs/swiglu.md, docs/gelu.md."""

from __future__ import annotations

import triton

from gradmem_kernels.operators.activation import Activation
from gradmem_kernels.operators.rows import flat_or_rows
from gradmem_kernels.triton import activation_kernels as kernels
from gradmem_kernels.triton.common import accumulator, on_device

#: Elements and warps of a program: a thread has 16 bytes of each half-precision tensor, the widest access.
BLOCK, WARPS = 1024, 4


def _launch_forward(tensors, results, form):
    _launch(kernels.forward_kernel, tensors, results, form)


def _launch_backward(tensors, results, form):
    _launch(kernels.backward_kernel, tensors, results, form)


def _launch(kernel, inputs, outputs, form):
    rows, width, inputs, strides = flat_or_rows(*inputs)
    tiles = triton.cdiv(width, BLOCK)
    with on_device(inputs[0]):
        kernel[rows * tiles,](*inputs, *outputs, *strides, width, tiles, FORM=form, ACC=accumulator(inputs[0].dtype),
                              BLOCK=BLOCK, num_warps=WARPS)


operators = Activation("triton", _launch_forward, _launch_backward)
