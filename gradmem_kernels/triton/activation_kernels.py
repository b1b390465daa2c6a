"""Triton kernels of gated activations, ``y = f(x) * up``, and of plain ones, where ``up`` is absent: 1.

Formulas: docs/swiglu.md, docs/gelu.md; launched by gradmem_kernels/triton/activation.py. Each kernel reads and writes
every tensor of the call once. Names: ``p_`` pointers, ``s_`` strides of rows, ``b_`` tiles, ``_t`` tangents, ``d``
cotangents; ``a`` and ``b`` are the cotangents of ``y`` and ``y_t``. A pointer that is ``None`` is a known zero, or a
result that nobody asked for. Inputs are rows ``[rows, D]`` at any stride, results are dense.
"""

import triton
import triton.language as tl

RSQRT_2 = tl.constexpr(0.7071067811865476)
RSQRT_2_PI = tl.constexpr(0.3989422804014327)
#: Twice sqrt(2 / pi), and with it the factor of x^3 in the approximation by tanh.
LINEAR = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715 * 1.5957691216057308)


@triton.jit
def _sigmoid(x):
    """sigmoid(x), and 1 less it, both without cancellation and overflow."""
    e = tl.exp(-tl.abs(x))
    large = 1 / (1 + e)
    return tl.where(x < 0, e * large, large), tl.where(x < 0, large, e * large)


@triton.jit
def _derivatives(x, FORM: tl.constexpr):
    """f, f' and f'' at x; what the caller does not use, the compiler leaves out."""
    if FORM == "gelu":
        # f = x * Phi, f' = Phi + x * phi, f'' = phi * (2 - x^2)
        f0 = 0.5 + 0.5 * tl.erf(x * RSQRT_2)
        phi = tl.exp(-0.5 * x * x) * RSQRT_2_PI
        f1 = f0 + x * phi
        f2 = phi * (2 - x * x)
    else:
        # f = x * s, s = sigmoid(v): v = x, or v = 2 u of the approximation by tanh, (1 + tanh(u)) / 2 = sigmoid(2 u)
        if FORM == "silu":
            f0, rest = _sigmoid(x)
            slope = f0 * rest
            f1 = f0 + x * slope
            f2 = slope * (2 + x * (rest - f0))
        else:
            f0, rest = _sigmoid(x * (LINEAR + CUBIC * x * x))
            v1 = LINEAR + 3 * CUBIC * x * x
            v2 = 6 * CUBIC * x
            slope = f0 * rest
            # s' = slope * v1,  s'' = slope * ((1 - 2 s) * v1^2 + v2),  f' = s + x * s',  f'' = 2 s' + x * s''
            f1 = f0 + x * slope * v1
            f2 = slope * (2 * v1 + x * ((rest - f0) * v1 * v1 + v2))
    return x * f0, f1, f2


@triton.jit
def _tile(D, tiles, BLOCK: tl.constexpr):
    """This program's row, its first column, and which of the ``BLOCK`` columns there are; starts in 64 bits."""
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)
    column = tl.cast(tl.program_id(0) % tiles, tl.int64) * BLOCK
    return row, column, column + tl.arange(0, BLOCK) < D


@triton.jit
def _load(p_x, stride, row, column, inside, BLOCK: tl.constexpr, ACC: tl.constexpr):
    return tl.load(p_x + (row * stride + column) + tl.arange(0, BLOCK), mask=inside, other=0.0).to(ACC)


@triton.jit
def _store(p_x, D, row, column, inside, b_x, BLOCK: tl.constexpr):
    tl.store(p_x + (row * D + column) + tl.arange(0, BLOCK), b_x.to(p_x.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
        p_x, p_up, p_xt, p_upt,  # [rows, D]
        p_y, p_yt,  # [rows, D], dense
        s_x, s_up, s_xt, s_upt, D, tiles,
        FORM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """``y``, and with a tangent ``y_t``."""
    row, column, inside = _tile(D, tiles, BLOCK)
    f, f1, _ = _derivatives(_load(p_x, s_x, row, column, inside, BLOCK, ACC), FORM)
    b_up = tl.full([BLOCK], 1.0, ACC)
    if p_up is not None:
        b_up = _load(p_up, s_up, row, column, inside, BLOCK, ACC)
    _store(p_y, D, row, column, inside, f * b_up, BLOCK)
    if p_yt is not None:
        # y_t = f' * x_t * up + f * up_t
        b_yt = tl.zeros([BLOCK], ACC)
        if p_xt is not None:
            b_yt += f1 * _load(p_xt, s_xt, row, column, inside, BLOCK, ACC) * b_up
        if p_upt is not None:
            b_yt += f * _load(p_upt, s_upt, row, column, inside, BLOCK, ACC)
        _store(p_yt, D, row, column, inside, b_yt, BLOCK)


@triton.jit
def backward_kernel(
        p_x, p_up, p_xt, p_upt, p_a, p_b,  # [rows, D]
        p_dx, p_dxt, p_dup, p_dupt, p_yt,  # [rows, D], dense
        s_x, s_up, s_xt, s_upt, s_a, s_b, D, tiles,
        FORM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Cotangents of inputs and tangents, and ``y_t``, as far as asked for."""
    row, column, inside = _tile(D, tiles, BLOCK)
    f, f1, f2 = _derivatives(_load(p_x, s_x, row, column, inside, BLOCK, ACC), FORM)
    b_b = _load(p_b, s_b, row, column, inside, BLOCK, ACC)
    b_up = tl.full([BLOCK], 1.0, ACC)
    if p_up is not None:
        b_up = _load(p_up, s_up, row, column, inside, BLOCK, ACC)
    # dx_t = f' * up * b,  dup_t = f * b
    if p_dxt is not None:
        _store(p_dxt, D, row, column, inside, f1 * b_up * b_b, BLOCK)
    if p_dupt is not None:
        _store(p_dupt, D, row, column, inside, f * b_b, BLOCK)

    # dx = f' * (a * up + b * up_t) + f'' * b * x_t * up,  dup = f * a + f' * b * x_t,  y_t = f' * x_t * up + f * up_t
    b_dx = tl.zeros([BLOCK], ACC)
    b_dup = tl.zeros([BLOCK], ACC)
    b_yt = tl.zeros([BLOCK], ACC)
    if p_a is not None:
        b_a = _load(p_a, s_a, row, column, inside, BLOCK, ACC)
        b_dx += f1 * b_a * b_up
        b_dup += f * b_a
    if p_upt is not None:
        b_upt = _load(p_upt, s_upt, row, column, inside, BLOCK, ACC)
        b_dx += f1 * b_b * b_upt
        b_yt += f * b_upt
    if p_xt is not None:
        b_xt = _load(p_xt, s_xt, row, column, inside, BLOCK, ACC)
        b_dx += f2 * b_b * b_xt * b_up
        b_dup += f1 * b_b * b_xt
        b_yt += f1 * b_xt * b_up
    if p_dx is not None:
        _store(p_dx, D, row, column, inside, b_dx, BLOCK)
    if p_dup is not None:
        _store(p_dup, D, row, column, inside, b_dup, BLOCK)
    if p_yt is not None:
        _store(p_yt, D, row, column, inside, b_yt, BLOCK)
