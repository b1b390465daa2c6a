"""Triton kernels of rms_norm and layer_norm. Formulas: docs/rms_norm.md, docs/layer_norm.md; launched by norm.py.

A program has ``ROWS`` rows ``[ROWS, BLOCK]`` at a time and goes over their columns once for the sums over each row and
once for the results. Where a row is one tile (``D <= BLOCK``) these loops have one step each, and the compiler reads
every element once, as no store comes before a load; wider rows are read again from the cache. rms_norm has no mean
(``p_mean``) and no bias. A residual ``r`` is added to x first, and their sum ``s`` is what is normalised; the backward
kernel finds the sum in the place of x.

Sums over rows, the cotangents of weights, take no atomics: a program adds up what it sees, in the order of its rows,
in a row of its own of ``[programs, D]``. Names: ``p_`` pointers, ``s_`` strides (see rows.as_rows), ``o_`` offsets,
``b_`` tiles, ``_t`` tangents, ``d`` cotangents; ``w`` is the weight, ``c`` the bias, ``a`` and ``b`` are the cotangents
of ``y`` and ``y_t``, ``g`` and ``h`` those of ``s`` and ``s_t``. A pointer that is ``None`` is a known zero, or a
result that nobody asked for.
"""

import triton
import triton.language as tl


@triton.jit
def _load(p_x, s_x, row, inner, o_d, inside, ACC: tl.constexpr):
    """A tile ``[ROWS, BLOCK]`` of x ``[rows, D]``, zero where not ``inside``."""
    o_row = tl.cast(row // inner, tl.int64) * s_x[0] + tl.cast(row % inner, tl.int64) * s_x[1]
    return tl.load((p_x + o_row)[:, None] + o_d[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _load_sum(p_x, p_r, s_x, s_r, row, inner, o_d, inside, ACC: tl.constexpr):
    """A tile of x + r, rounded as it is stored: what is normalised is what the backward kernel will find."""
    b_x = _load(p_x, s_x, row, inner, o_d, inside, ACC)
    if p_r is not None:
        b_x = (b_x + _load(p_r, s_r, row, inner, o_d, inside, ACC)).to(p_x.dtype.element_ty).to(ACC)
    return b_x


@triton.jit
def _load_weight(p_w, o_d, D, ACC: tl.constexpr):
    """``[1, BLOCK]`` of a weight ``[D]``."""
    return tl.load(p_w + o_d, mask=o_d < D, other=0.0).to(ACC)[None, :]


@triton.jit
def _store(p_y, row, o_d, inside, b_y, D):
    p_tile = (p_y + tl.cast(row, tl.int64) * D)[:, None] + o_d[None, :]
    tl.store(p_tile, b_y.to(p_y.dtype.element_ty), mask=inside)


@triton.jit
def _mean(b_x, D):
    """What this tile adds to the means over the rows, ``[ROWS, 1]``."""
    return tl.sum(b_x, 1)[:, None] / D


@triton.jit
def _add_rows(total, p_sums, b_x, o_d, later, D: tl.constexpr, BLOCK: tl.constexpr):
    """Adds a tile to the program's sum over rows: kept in ``total`` if a row is one tile, else in memory."""
    if D <= BLOCK:
        total += b_x
    else:
        p_sum = p_sums + tl.program_id(0) * D + o_d
        before = tl.load(p_sum, mask=(o_d < D) & later, other=0.0)
        tl.store(p_sum, before + tl.sum(b_x, 0), mask=o_d < D)
    return total


@triton.jit
def _store_total(p_sums, total, D: tl.constexpr, BLOCK: tl.constexpr):
    if D <= BLOCK:
        o_d = tl.arange(0, BLOCK)
        tl.store(p_sums + tl.program_id(0) * D + o_d, tl.sum(total, 0), mask=o_d < D)


@triton.jit
def forward_kernel(
        p_x, p_xt, p_r, p_rt,  # [rows, D]
        p_w, p_wt, p_c, p_ct,  # [D]
        p_y, p_yt, p_s, p_st,  # [rows, D], dense
        p_rstd, p_mean,  # [rows]
        s_x, s_xt, s_r, s_rt, rows, inner, eps,
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``y``, ``rstd`` and in layer_norm ``mean``; with a tangent also ``y_t``; with a residual also the sums."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_block = tl.arange(0, BLOCK)
    mean = tl.zeros([ROWS, 1], ACC)
    mean_t = tl.zeros([ROWS, 1], ACC)
    if p_mean is not None:
        for column in range(0, D, BLOCK):
            o_d = column + o_block
            inside = (row < rows)[:, None] & (o_d < D)[None, :]
            mean += _mean(_load_sum(p_x, p_r, s_x, s_r, row, inner, o_d, inside, ACC), D)
            if p_xt is not None:
                mean_t += _mean(_load_sum(p_xt, p_rt, s_xt, s_rt, row, inner, o_d, inside, ACC), D)
    square = tl.zeros([ROWS, 1], ACC)
    product = tl.zeros([ROWS, 1], ACC)
    for column in range(0, D, BLOCK):
        o_d = column + o_block
        inside = (row < rows)[:, None] & (o_d < D)[None, :]
        b_x = tl.where(inside, _load_sum(p_x, p_r, s_x, s_r, row, inner, o_d, inside, ACC) - mean, 0.0)
        square += _mean(b_x * b_x, D)
        if p_xt is not None:
            product += _mean(b_x * _load_sum(p_xt, p_rt, s_xt, s_rt, row, inner, o_d, inside, ACC), D)
    rstd = 1 / tl.sqrt(square + eps)
    for column in range(0, D, BLOCK):
        o_d = column + o_block
        inside = (row < rows)[:, None] & (o_d < D)[None, :]
        b_s = _load_sum(p_x, p_r, s_x, s_r, row, inner, o_d, inside, ACC)
        b_n = (b_s - mean) * rstd
        b_w = _load_weight(p_w, o_d, D, ACC)
        b_y = b_n * b_w
        b_yt = tl.zeros([ROWS, BLOCK], ACC)
        if p_c is not None:
            b_y += _load_weight(p_c, o_d, D, ACC)
        # y_t = n_t * w + n * w_t + c_t,  n_t = r * (x_t - mean(x_t) - n * mean(n * x_t))
        if p_xt is not None:
            b_st = _load_sum(p_xt, p_rt, s_xt, s_rt, row, inner, o_d, inside, ACC)
            b_yt += rstd * (b_st - mean_t - b_n * (rstd * product)) * b_w
        if p_wt is not None:
            b_yt += b_n * _load_weight(p_wt, o_d, D, ACC)
        if p_ct is not None:
            b_yt += _load_weight(p_ct, o_d, D, ACC)
        _store(p_y, row, o_d, inside, b_y, D)
        if p_yt is not None:
            _store(p_yt, row, o_d, inside, b_yt, D)
        if p_s is not None:
            _store(p_s, row, o_d, inside, b_s, D)
        if p_st is not None:
            _store(p_st, row, o_d, inside, b_st, D)
    tl.store(p_rstd + row[:, None], rstd, mask=(row < rows)[:, None])
    if p_mean is not None:
        tl.store(p_mean + row[:, None], mean, mask=(row < rows)[:, None])


@triton.jit
def _row_means(p_x, p_xt, p_a, p_b, p_w, p_wt, p_mean, p_dx, p_dxt, s_x, s_xt, s_a, s_b, row, rows, inner, rstd, mean,
               D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Means over the row, ``[ROWS, 1]``, of dn, n * dn, dn_t, n * dn_t, x_t, n * x_t and n_t * dn_t, where needed."""
    o_block = tl.arange(0, BLOCK)
    dn_1 = tl.zeros([ROWS, 1], ACC)
    dn_n = tl.zeros([ROWS, 1], ACC)
    dnt_1 = tl.zeros([ROWS, 1], ACC)
    dnt_n = tl.zeros([ROWS, 1], ACC)
    xt_1 = tl.zeros([ROWS, 1], ACC)
    xt_n = tl.zeros([ROWS, 1], ACC)
    xt_dnt = tl.zeros([ROWS, 1], ACC)
    for column in range(0, D, BLOCK):
        o_d = column + o_block
        inside = (row < rows)[:, None] & (o_d < D)[None, :]
        # every product below has a factor that is zero outside
        b_n = (_load(p_x, s_x, row, inner, o_d, inside, ACC) - mean) * rstd
        b_b = _load(p_b, s_b, row, inner, o_d, inside, ACC)
        b_w = _load_weight(p_w, o_d, D, ACC)
        if p_xt is not None:
            b_xt = _load(p_xt, s_xt, row, inner, o_d, inside, ACC)
            xt_n += _mean(b_n * b_xt, D)
            if p_mean is not None:
                xt_1 += _mean(b_xt, D)
        if p_dx is not None or p_dxt is not None:
            # dn_t = b * w
            dnt_n += _mean(b_n * b_b * b_w, D)
            if p_mean is not None:
                dnt_1 += _mean(b_b * b_w, D)
            if p_xt is not None:
                xt_dnt += _mean(b_xt * b_b * b_w, D)
        if p_dx is not None and (p_a is not None or p_wt is not None):
            # dn = a * w + b * w_t
            b_dn = tl.zeros([ROWS, BLOCK], ACC)
            if p_a is not None:
                b_dn += _load(p_a, s_a, row, inner, o_d, inside, ACC) * b_w
            if p_wt is not None:
                b_dn += b_b * _load_weight(p_wt, o_d, D, ACC)
            dn_n += _mean(b_n * b_dn, D)
            if p_mean is not None:
                dn_1 += _mean(b_dn, D)
    # n_t = r * (x_t - mean(x_t) - n * mean(n * x_t))
    nt_dnt = rstd * (xt_dnt - xt_1 * dnt_1 - xt_n * dnt_n)
    return dn_1, dn_n, dnt_1, dnt_n, xt_1, xt_n, nt_dnt


@triton.jit
def backward_kernel(
        p_x, p_xt, p_a, p_b, p_g, p_h,  # [rows, D]
        p_w, p_wt, p_ct,  # [D]
        p_rstd, p_mean,  # [rows]
        p_dx, p_dxt, p_yt,  # [rows, D], dense
        p_dw, p_dwt, p_dc, p_dct,  # [programs, D]
        s_x, s_xt, s_a, s_b, s_g, s_h, rows, inner, programs,
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Cotangents of inputs and tangents, and ``y_t``, as far as asked for."""
    o_block = tl.arange(0, BLOCK)
    sum_w = tl.zeros([ROWS, BLOCK], ACC)
    sum_wt = tl.zeros([ROWS, BLOCK], ACC)
    sum_c = tl.zeros([ROWS, BLOCK], ACC)
    sum_ct = tl.zeros([ROWS, BLOCK], ACC)
    first = tl.program_id(0) * ROWS
    for start in range(first, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        rstd = tl.load(p_rstd + row, mask=row < rows, other=0.0)[:, None]
        mean = tl.zeros([ROWS, 1], ACC)
        if p_mean is not None:
            mean += tl.load(p_mean + row, mask=row < rows, other=0.0)[:, None]

        dn_1, dn_n, dnt_1, dnt_n, xt_1, xt_n, nt_dnt = _row_means(
            p_x, p_xt, p_a, p_b, p_w, p_wt, p_mean, p_dx, p_dxt, s_x, s_xt, s_a, s_b, row, rows, inner, rstd, mean,
            D, ROWS, BLOCK, ACC)
        for column in range(0, D, BLOCK):
            o_d = column + o_block
            inside = (row < rows)[:, None] & (o_d < D)[None, :]
            b_n = (_load(p_x, s_x, row, inner, o_d, inside, ACC) - mean) * rstd
            b_b = _load(p_b, s_b, row, inner, o_d, inside, ACC)
            b_w = _load_weight(p_w, o_d, D, ACC)
            # e = dn_t - mean(dn_t) - n * mean(n * dn_t),  dx_t = r * e + h
            b_e = b_b * b_w - dnt_1 - b_n * dnt_n
            # dx = r * (dn - mean(dn) - (mean(n * dn) + mean(n_t * dn_t)) * n - c * n_t - r * mean(n * x_t) * e) + g
            b_dx = -dn_1 - (dn_n + nt_dnt) * b_n
            b_dw = tl.zeros([ROWS, BLOCK], ACC)
            b_yt = tl.zeros([ROWS, BLOCK], ACC)
            if p_xt is not None:
                b_nt = rstd * (_load(p_xt, s_xt, row, inner, o_d, inside, ACC) - xt_1 - b_n * xt_n)
                b_dx -= dnt_n * b_nt + rstd * xt_n * b_e
                b_dw += b_b * b_nt
                b_yt += b_nt * b_w
            if p_wt is not None:
                b_wt = _load_weight(p_wt, o_d, D, ACC)
                b_dx += b_b * b_wt
                b_yt += b_n * b_wt
            if p_a is not None:
                b_a = _load(p_a, s_a, row, inner, o_d, inside, ACC)
                b_dx += b_a * b_w
                b_dw += b_a * b_n
            if p_ct is not None:
                b_yt += _load_weight(p_ct, o_d, D, ACC)
            b_dx *= rstd
            b_dxt = rstd * b_e
            if p_g is not None:
                b_dx += _load(p_g, s_g, row, inner, o_d, inside, ACC)
            if p_h is not None:
                b_dxt += _load(p_h, s_h, row, inner, o_d, inside, ACC)
            if p_dx is not None:
                _store(p_dx, row, o_d, inside, b_dx, D)
            if p_dxt is not None:
                _store(p_dxt, row, o_d, inside, b_dxt, D)
            if p_yt is not None:
                _store(p_yt, row, o_d, inside, b_yt, D)
            if p_dw is not None:
                sum_w = _add_rows(sum_w, p_dw, b_dw, o_d, start > first, D, BLOCK)
            if p_dwt is not None:
                sum_wt = _add_rows(sum_wt, p_dwt, b_b * b_n, o_d, start > first, D, BLOCK)
            if p_dc is not None:
                sum_c = _add_rows(sum_c, p_dc, b_a, o_d, start > first, D, BLOCK)
            if p_dct is not None:
                sum_ct = _add_rows(sum_ct, p_dct, b_b, o_d, start > first, D, BLOCK)
        if D > BLOCK:
            tl.debug_barrier()  # the sums in memory are read again by the next rows
    if p_dw is not None:
        _store_total(p_dw, sum_w, D, BLOCK)
    if p_dwt is not None:
        _store_total(p_dwt, sum_wt, D, BLOCK)
    if p_dc is not None:
        _store_total(p_dc, sum_c, D, BLOCK)
    if p_dct is not None:
        _store_total(p_dct, sum_ct, D, BLOCK)
