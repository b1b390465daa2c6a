"""Triton attention kernels. Formulas: docs/attention.md; launched by gradmem_kernels/triton/attention.py.

Four kernels make all orders. ``forward_kernel`` and ``backward_queries_kernel`` give a block of query rows to a
program, which goes over the keys; ``backward_keys_kernel`` gives it a block of keys, which goes over the queries of
every head of its group. No two programs write to the same place: no atomics, the same bits in every run.

Every kernel calls the rows of its own block "own" and those that it goes over "other". Causal, window, padding and
packing leave each row an interval of the other side, ``lo <= other < hi``, whose ends do not decrease with the row.

Names: ``p_`` pointers, ``s_`` their strides (batch, head, row), ``o_`` offsets, ``b_`` tiles, ``_t`` tangents, ``d``
cotangents; ``a`` and ``b`` are the cotangents of ``o`` and ``o_t``. A pointer that is ``None`` is a known zero, or a
result that nobody asked for. ``grad_rows`` and ``tangent_rows`` are (first query, last query + 1, first key, last
key + 1). Scores are in units of log 2, since ``exp2`` is what the hardware has. Loops compute addresses anew
(``disable_licm``): hoisted ones take the registers that tiles need.
"""

import triton
import triton.language as tl

from gradmem_kernels.triton.attention_tiles import (
    LN2,
    LOG2E,
    STATS,
    bounds,
    dot,
    dot_if,
    dropped,
    load_rows,
    product,
    product_if,
    random_states,
    scores,
    statistics_pointers,
    store_rows,
    tangent,
    through_cap,
    touches,
    valid,
)

#: Arguments whose values compile no kernel of their own.
VALUES = ("window", "first", "blocks", "seed", "threshold")


@triton.jit(do_not_specialize=VALUES)
def forward_kernel(
        p_q, p_k, p_v,  # [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, D]
        p_qt, p_kt, p_vt,  # like q, k, v
        p_o, p_ot,  # like q; with KNOWN p_o is read
        p_lse, p_mu,  # [B, Hq, Sq]; with KNOWN p_lse is read
        p_seqlens,  # [B]
        p_rows,  # [3, Sq], see bounds
        p_bias, p_mask,  # [B, Hq, Sq, Sk], broadcast by strides of 0
        s_q, s_k, s_v, s_o, s_bias, s_mask,
        Hq, Sq, Sk, group, scale, cap, window, tangent_rows, first, blocks, seed, threshold, inverse,
        DUAL: tl.constexpr, KNOWN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
        DROPOUT: tl.constexpr, SOME_T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ACC: tl.constexpr,
        PRECISION: tl.constexpr, PART: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """``o``, ``lse``; with ``DUAL`` also ``o_t``, ``mu``. With ``KNOWN``, ``o_t`` and ``mu`` from known ``o``, ``lse``.

    With ``SOME_T`` only rows in ``tangent_rows`` have a tangent.
    """
    # the last rows see most keys: they start first
    start = first + (blocks - 1 - tl.program_id(0) % blocks) * OWN
    head = tl.program_id(0) // blocks
    batch = tl.cast(head // Hq, tl.int64)
    h = tl.cast(head % Hq, tl.int64)
    p_k += batch * s_k[0] + h // group * s_k[1]
    p_v += batch * s_v[0] + h // group * s_v[1]
    p_o += batch * s_o[0] + h * s_o[1]
    p_lse += tl.cast(head, tl.int64) * Sq
    if p_bias is not None:
        p_bias += batch * s_bias[0] + h * s_bias[1]
    if p_mask is not None:
        p_mask += batch * s_mask[0] + h * s_mask[1]
    q = (p_q + batch * s_q[0] + h * s_q[1], s_q[2], start, 0, Sq)
    b_q = load_rows(q, OWN, D, DP)
    own_t = touches(start, OWN, tangent_rows[0], tangent_rows[1])
    if p_qt is not None:
        qt = (p_qt + batch * s_q[0] + h * s_q[1], s_q[2], start, tangent_rows[0], tangent_rows[1])
        b_qt = load_rows(qt, OWN, D, DP)
    if p_kt is not None:
        p_kt += batch * s_k[0] + h // group * s_k[1]
    if p_vt is not None:
        p_vt += batch * s_v[0] + h // group * s_v[1]

    i = start + tl.arange(0, OWN)
    valid_q, valid_k = valid(p_seqlens, batch, Sq, Sk)
    lo, hi = bounds(i, Sq, Sk, valid_q, valid_k, Sk - Sq, window, p_rows, True, CAUSAL, WINDOW)
    if DROPOUT:
        row_keys = random_states(seed, head, i)[:, None]
    if KNOWN:
        lse = tl.load(p_lse + i, mask=i < Sq, other=float("inf")) * LOG2E
    top = tl.full([OWN], -float("inf"), ACC)
    total = tl.zeros([OWN], ACC)
    mu = tl.zeros([OWN], ACC)
    acc = tl.zeros([OWN, DP], ACC)
    acc_t = tl.zeros([OWN, DP], ACC)
    for other in tl.range(tl.min(lo, 0) // OTHER * OTHER, tl.max(hi, 0), OTHER, disable_licm=True):
        k = (p_k, s_k[2], other, 0, Sk)
        b_k = load_rows(k, OTHER, D, DP)
        v = (p_v, s_v[2], other, 0, Sk)
        b_v = load_rows(v, OTHER, D, DP)
        raw = product(q, k, b_q, b_k, tl.zeros([OWN, OTHER], ACC), D, PART, PRECISION)
        s, u = scores(raw, start, other, lo, hi, Sq, Sk, scale, cap, p_bias, s_bias[2:], p_mask, s_mask[2:], OWN,
                       OTHER, CAP)
        if KNOWN:
            p = tl.exp2(s - lse[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1))
            # a row that has seen no key yet: exp2(-inf - 0) = 0
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
            decay = tl.exp2(top - base)
            top = new_top
            total = total * decay + tl.sum(p, 1)
            acc = acc * decay[:, None]
            mu = mu * decay
            acc_t = acc_t * decay[:, None]
        kept = p
        if DROPOUT:
            j = (other + tl.arange(0, OTHER))[None, :]
            kept = dropped(p, row_keys, j, threshold, inverse)
        if not KNOWN:
            acc = dot(kept.to(b_v.dtype), b_v, acc, PRECISION)
        if DUAL:
            other_t = touches(other, OTHER, tangent_rows[2], tangent_rows[3])
            if p_qt is not None or p_kt is not None:
                # S_t = scale * (q_t k^T + q k_t^T)
                raw_t = tl.zeros([OWN, OTHER], ACC)
                if p_qt is not None:
                    raw_t = product_if(own_t, qt, k, b_qt, b_k, raw_t, SOME_T, D, PART, PRECISION)
                if p_kt is not None:
                    kt = (p_kt, s_k[2], other, tangent_rows[2], tangent_rows[3])
                    b_kt = load_rows(kt, OTHER, D, DP)
                    raw_t = product_if(other_t, q, kt, b_q, b_kt, raw_t, SOME_T, D, PART, PRECISION)
                s_t = raw_t * scale
                if CAP:
                    s_t = s_t * (1 - u * u)
                # mu = rowsum(P * S_t),  o_t = (P * S_t) v - mu * o + P v_t
                ps = p * s_t
                mu += tl.sum(ps, 1)
                if DROPOUT:
                    ps = dropped(ps, row_keys, j, threshold, inverse)
                acc_t = dot_if(own_t | other_t, ps.to(b_v.dtype), b_v, acc_t, SOME_T, PRECISION)
            if p_vt is not None:
                vt = (p_vt, s_v[2], other, tangent_rows[2], tangent_rows[3])
                b_vt = load_rows(vt, OTHER, D, DP)
                acc_t = dot_if(other_t, kept.to(b_vt.dtype), b_vt, acc_t, SOME_T, PRECISION)

    if KNOWN:
        b_o = load_rows((p_o, s_o[2], start, 0, Sq), OWN, D, DP).to(ACC)
    else:
        none = total == 0
        total = tl.where(none, 1.0, total)
        inverse_total = 1 / total
        b_o = acc * inverse_total[:, None]
        mu = mu * inverse_total
        acc_t = acc_t * inverse_total[:, None]
        lse = tl.where(none, float("inf"), (top + tl.log2(total)) * LN2)
        store_rows((p_o, s_o[2], start, 0, Sq), b_o, OWN, D, DP)
        tl.store(p_lse + i, lse, mask=i < Sq)
    if DUAL:
        b_ot = acc_t - mu[:, None] * b_o
        store_rows((p_ot + batch * s_o[0] + h * s_o[1], s_o[2], start, 0, Sq), b_ot, OWN, D, DP)
        tl.store(p_mu + tl.cast(head, tl.int64) * Sq + i, mu, mask=i < Sq)


@triton.jit
def row_statistics_kernel(
        p_o, p_ot, p_a, p_b,  # [B, Hq, Sq, D]
        p_lse, p_mu,  # [B, Hq, Sq]
        p_stats,  # [B, Hq, blocks, 4, STATS]
        s_o, s_ot, s_b, Hq, Sq,
        D: tl.constexpr, DP: tl.constexpr, ACC: tl.constexpr, OWN: tl.constexpr):
    """``lse`` (of log 2), ``mu``, ``D = rowsum(b * o)`` and ``D_t = rowsum(a * o + b * o_t)``, side by side.

    In blocks of rows, so that one address serves all four; rows beyond the last have ``P = exp2(S - inf) = 0``.
    """
    blocks = tl.cdiv(Sq, STATS) * (STATS // OWN)
    start = tl.program_id(0) % blocks * OWN
    head = tl.program_id(0) // blocks
    batch = tl.cast(head // Hq, tl.int64)
    h = tl.cast(head % Hq, tl.int64)
    i = start + tl.arange(0, OWN)
    o_row = tl.cast(head, tl.int64) * Sq + i
    p_row = statistics_pointers(p_stats, head, Sq, start, 0, OWN)
    lse = tl.load(p_lse + o_row, mask=i < Sq, other=float("inf"))
    tl.store(p_row, lse * LOG2E)
    o = (p_o + batch * s_o[0] + h * s_o[1], s_o[2], start, 0, Sq)
    b_o = load_rows(o, OWN, D, DP).to(ACC)
    b = (p_b + batch * s_b[0] + h * s_b[1], s_b[2], start, 0, Sq)
    b_b = load_rows(b, OWN, D, DP).to(ACC)
    tl.store(p_row + 2 * STATS, tl.sum(b_b * b_o, 1))
    if p_mu is not None:
        tl.store(p_row + STATS, tl.load(p_mu + o_row, mask=i < Sq, other=0.0))
        d_t = tl.zeros([OWN, DP], ACC)
        if p_a is not None:
            a = (p_a + batch * s_b[0] + h * s_b[1], s_b[2], start, 0, Sq)
            b_a = load_rows(a, OWN, D, DP).to(ACC)
            d_t += b_a * b_o
        ot = (p_ot + batch * s_ot[0] + h * s_ot[1], s_ot[2], start, 0, Sq)
        b_ot = load_rows(ot, OWN, D, DP).to(ACC)
        tl.store(p_row + 3 * STATS, tl.sum(d_t + b_b * b_ot, 1))


@triton.jit(do_not_specialize=VALUES)
def backward_queries_kernel(
        p_q, p_k, p_v,  # [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, D]
        p_qt, p_kt, p_vt,  # like q, k, v
        p_a, p_b,  # like q
        p_dq, p_dqt,  # like q
        p_stats,  # [B, Hq, blocks, 4, STATS], see row_statistics_kernel
        p_seqlens,  # [B]
        p_rows,  # [3, Sq], see bounds
        p_bias, p_mask,  # [B, Hq, Sq, Sk], broadcast by strides of 0
        s_q, s_k, s_v, s_b, s_dq, s_bias, s_mask,
        Hq, Sq, Sk, group, scale, cap, window, grad_rows, tangent_rows, first, blocks, seed, threshold, inverse,
        CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, SOME_T: tl.constexpr,
        D: tl.constexpr, DP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr):
    """The cotangents of ``q`` and ``q_t`` in ``blocks`` blocks of rows from row ``first`` on.

    ``dq_t = scale * dS k`` is the first-order backward with ``b`` in the place of ``do``.
    """
    start = first + (blocks - 1 - tl.program_id(0) % blocks) * OWN
    head = tl.program_id(0) // blocks
    batch = tl.cast(head // Hq, tl.int64)
    h = tl.cast(head % Hq, tl.int64)
    p_k += batch * s_k[0] + h // group * s_k[1]
    p_v += batch * s_v[0] + h // group * s_v[1]
    if p_bias is not None:
        p_bias += batch * s_bias[0] + h * s_bias[1]
    if p_mask is not None:
        p_mask += batch * s_mask[0] + h * s_mask[1]
    q = (p_q + batch * s_q[0] + h * s_q[1], s_q[2], start, 0, Sq)
    b_q = load_rows(q, OWN, D, DP)
    b = (p_b + batch * s_b[0] + h * s_b[1], s_b[2], start, 0, Sq)
    b_b = load_rows(b, OWN, D, DP)
    if p_a is not None:
        a = (p_a + batch * s_b[0] + h * s_b[1], s_b[2], start, 0, Sq)
        b_a = load_rows(a, OWN, D, DP)
    own_t = touches(start, OWN, tangent_rows[0], tangent_rows[1])
    if p_qt is not None:
        qt = (p_qt + batch * s_q[0] + h * s_q[1], s_q[2], start, tangent_rows[0], tangent_rows[1])
        b_qt = load_rows(qt, OWN, D, DP)
    if p_kt is not None:
        p_kt += batch * s_k[0] + h // group * s_k[1]
    if p_vt is not None:
        p_vt += batch * s_v[0] + h // group * s_v[1]

    i = start + tl.arange(0, OWN)
    p_row = statistics_pointers(p_stats, head, Sq, start, 0, OWN)
    lse = tl.load(p_row)[:, None]
    d = tl.load(p_row + 2 * STATS)[:, None]
    HAS_ST: tl.constexpr = p_qt is not None or p_kt is not None
    if p_dq is not None:
        d_t = tl.load(p_row + 3 * STATS)[:, None]
    if HAS_ST:
        mu = tl.load(p_row + STATS)[:, None]
    if DROPOUT:
        row_keys = random_states(seed, head, i)[:, None]
    valid_q, valid_k = valid(p_seqlens, batch, Sq, Sk)
    lo, hi = bounds(i, Sq, Sk, valid_q, valid_k, Sk - Sq, window, p_rows, True, CAUSAL, WINDOW)
    acc = tl.zeros([OWN, DP], ACC)
    acc_t = tl.zeros([OWN, DP], ACC)
    for other in tl.range(tl.min(lo, 0) // OTHER * OTHER, tl.max(hi, 0), OTHER, disable_licm=True):
        k = (p_k, s_k[2], other, 0, Sk)
        b_k = load_rows(k, OTHER, D, DP)
        v = (p_v, s_v[2], other, 0, Sk)
        b_v = load_rows(v, OTHER, D, DP)
        other_t = touches(other, OTHER, tangent_rows[2], tangent_rows[3])
        raw = product(q, k, b_q, b_k, tl.zeros([OWN, OTHER], ACC), D, PART, PRECISION)
        s, u = scores(raw, start, other, lo, hi, Sq, Sk, scale, cap, p_bias, s_bias[2:], p_mask, s_mask[2:], OWN,
                       OTHER, CAP)
        p = tl.exp2(s - lse)
        s_t = p
        if HAS_ST:
            raw_t = tl.zeros([OWN, OTHER], ACC)
            if p_qt is not None:
                raw_t = product_if(own_t, qt, k, b_qt, b_k, raw_t, SOME_T, D, PART, PRECISION)
            if p_kt is not None:
                kt = (p_kt, s_k[2], other, tangent_rows[2], tangent_rows[3])
                b_kt = load_rows(kt, OTHER, D, DP)
                raw_t = product_if(other_t, q, kt, b_q, b_kt, raw_t, SOME_T, D, PART, PRECISION)
            s_t, p_t = tangent(p, u, raw_t, mu, scale, CAP)
        # dS = P * (dP - D),  dP = b v^T
        j = (other + tl.arange(0, OTHER))[None, :]
        dp = product(b, v, b_b, b_v, tl.zeros([OWN, OTHER], ACC), D, PART, PRECISION)
        if DROPOUT:
            dp = dropped(dp, row_keys, j, threshold, inverse)
        dp -= d
        ds = p * dp
        ds_t = ds
        if p_dq is not None:
            # dS_t = P_t * (dP - D) + P * (dP_t - D_t),  dP_t = a v^T + b v_t^T
            dp_t = tl.zeros([OWN, OTHER], ACC)
            if p_a is not None:
                dp_t = product(a, v, b_a, b_v, dp_t, D, PART, PRECISION)
            if p_vt is not None:
                vt = (p_vt, s_v[2], other, tangent_rows[2], tangent_rows[3])
                b_vt = load_rows(vt, OTHER, D, DP)
                dp_t = product_if(other_t, b, vt, b_b, b_vt, dp_t, SOME_T, D, PART, PRECISION)
            if DROPOUT:
                dp_t = dropped(dp_t, row_keys, j, threshold, inverse)
            ds_t = p * (dp_t - d_t)
            if HAS_ST:
                ds_t += p_t * dp
        if CAP:
            ds, ds_t = through_cap(ds, ds_t, u, s_t, cap, HAS_ST)
        ds = ds.to(b_k.dtype)
        if p_dq is not None:
            # dq = scale * (dS_t k + dS k_t)
            acc = dot(ds_t.to(b_k.dtype), b_k, acc, PRECISION)
            if p_kt is not None:
                acc = dot_if(other_t, ds, b_kt, acc, SOME_T, PRECISION)
        if p_dqt is not None:
            acc_t = dot(ds, b_k, acc_t, PRECISION)
    if p_dq is not None:
        out = (p_dq + batch * s_dq[0] + h * s_dq[1], s_dq[2], start, grad_rows[0], grad_rows[1])
        store_rows(out, acc * scale, OWN, D, DP)
    if p_dqt is not None:
        out = (p_dqt + batch * s_dq[0] + h * s_dq[1], s_dq[2], start, tangent_rows[0], tangent_rows[1])
        store_rows(out, acc_t * scale, OWN, D, DP)


@triton.jit(do_not_specialize=VALUES)
def backward_keys_kernel(
        p_q, p_k, p_v,  # [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, D]
        p_qt, p_kt, p_vt,  # like q, k, v
        p_a, p_b,  # like q
        p_dk, p_dv, p_dkt, p_dvt,  # like k
        p_stats,  # [B, Hq, blocks, 4, STATS], see row_statistics_kernel
        p_seqlens,  # [B]
        p_rows,  # [3, Sk], see bounds
        p_bias, p_mask,  # [B, Hq, Sq, Sk], broadcast by strides of 0
        s_q, s_k, s_v, s_b, s_dk, s_dv, s_bias, s_mask,
        Hq, Sq, Sk, group, scale, cap, window, grad_rows, tangent_rows, first, blocks, seed, threshold, inverse,
        CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, SOME_T: tl.constexpr,
        D: tl.constexpr, DP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr):
    """The cotangents of ``k, v, k_t, v_t`` in ``blocks`` blocks of rows from row ``first`` on.

    Score tiles are transposed, ``[keys, queries]``, so that they stay in registers as left operands of products.
    """
    start = first + tl.program_id(0) % blocks * OWN
    kv_heads = Hq // group
    kv_head = tl.program_id(0) // blocks
    batch = tl.cast(kv_head // kv_heads, tl.int64)
    kv_h = tl.cast(kv_head % kv_heads, tl.int64)
    k = (p_k + batch * s_k[0] + kv_h * s_k[1], s_k[2], start, 0, Sk)
    b_k = load_rows(k, OWN, D, DP)
    v = (p_v + batch * s_v[0] + kv_h * s_v[1], s_v[2], start, 0, Sk)
    b_v = load_rows(v, OWN, D, DP)
    own_t = touches(start, OWN, tangent_rows[2], tangent_rows[3])
    if p_kt is not None:
        kt = (p_kt + batch * s_k[0] + kv_h * s_k[1], s_k[2], start, tangent_rows[2], tangent_rows[3])
        b_kt = load_rows(kt, OWN, D, DP)
    if p_vt is not None:
        vt = (p_vt + batch * s_v[0] + kv_h * s_v[1], s_v[2], start, tangent_rows[2], tangent_rows[3])
        b_vt = load_rows(vt, OWN, D, DP)
    HAS_ST: tl.constexpr = p_qt is not None or p_kt is not None
    o_j = start + tl.arange(0, OWN)
    valid_q, valid_k = valid(p_seqlens, batch, Sq, Sk)
    lo, hi = bounds(o_j, Sk, Sq, valid_k, valid_q, Sq - Sk, window, p_rows, False, CAUSAL, WINDOW)
    j = o_j[:, None]
    dk = tl.zeros([OWN, DP], ACC)
    dv = tl.zeros([OWN, DP], ACC)
    dk_t = tl.zeros([OWN, DP], ACC)
    dv_t = tl.zeros([OWN, DP], ACC)
    for g in range(group):
        h = kv_h * group + g
        head = batch * Hq + h
        for other in tl.range(tl.min(lo, 0) // OTHER * OTHER, tl.max(hi, 0), OTHER, disable_licm=True):
            q = (p_q + batch * s_q[0] + h * s_q[1], s_q[2], other, 0, Sq)
            b_q = load_rows(q, OTHER, D, DP)
            b = (p_b + batch * s_b[0] + h * s_b[1], s_b[2], other, 0, Sq)
            b_b = load_rows(b, OTHER, D, DP)
            other_t = touches(other, OTHER, tangent_rows[0], tangent_rows[1])
            i = other + tl.arange(0, OTHER)
            p_row = statistics_pointers(p_stats, head, Sq, other, 0, OTHER)
            lse = tl.load(p_row)[None, :]
            raw = product(k, q, b_k, b_q, tl.zeros([OWN, OTHER], ACC), D, PART, PRECISION)
            p_bias_h = p_bias
            p_mask_h = p_mask
            if p_bias is not None:
                p_bias_h = p_bias + batch * s_bias[0] + h * s_bias[1]
            if p_mask is not None:
                p_mask_h = p_mask + batch * s_mask[0] + h * s_mask[1]
            s, u = scores(raw, start, other, lo, hi, Sk, Sq, scale, cap, p_bias_h, (s_bias[3], s_bias[2]), p_mask_h,
                           (s_mask[3], s_mask[2]), OWN, OTHER, CAP)
            p = tl.exp2(s - lse)
            kept = p
            if DROPOUT:
                row_keys = random_states(seed, head, i)[None, :]
                kept = dropped(p, row_keys, j, threshold, inverse)
            kept = kept.to(b_q.dtype)
            s_t = p
            if p_qt is not None:
                qt = (p_qt + batch * s_q[0] + h * s_q[1], s_q[2], other, tangent_rows[0], tangent_rows[1])
                b_qt = load_rows(qt, OTHER, D, DP)
            if HAS_ST:
                raw_t = tl.zeros([OWN, OTHER], ACC)
                if p_qt is not None:
                    raw_t = product_if(other_t, k, qt, b_k, b_qt, raw_t, SOME_T, D, PART, PRECISION)
                if p_kt is not None:
                    raw_t = product_if(own_t, kt, q, b_kt, b_q, raw_t, SOME_T, D, PART, PRECISION)
                mu = tl.load(p_row + STATS)[None, :]
                s_t, p_t = tangent(p, u, raw_t, mu, scale, CAP)
            if p_a is not None:
                a = (p_a + batch * s_b[0] + h * s_b[1], s_b[2], other, 0, Sq)
                b_a = load_rows(a, OTHER, D, DP)
            if p_dvt is not None:
                dv_t = dot(kept, b_b, dv_t, PRECISION)
            if p_dv is not None:
                # dv = P_t^T b + P^T a
                if p_a is not None:
                    dv = dot(kept, b_a, dv, PRECISION)
                if HAS_ST:
                    kept_t = p_t
                    if DROPOUT:
                        kept_t = dropped(p_t, row_keys, j, threshold, inverse)
                    dv = dot(kept_t.to(b_q.dtype), b_b, dv, PRECISION)
            if p_dk is not None or p_dkt is not None:
                # dS = P * (dP - D),  dP = b v^T
                dp = product(v, b, b_v, b_b, tl.zeros([OWN, OTHER], ACC), D, PART, PRECISION)
                if DROPOUT:
                    dp = dropped(dp, row_keys, j, threshold, inverse)
                dp -= tl.load(p_row + 2 * STATS)[None, :]
                ds = p * dp
                ds_t = ds
                if p_dk is not None:
                    # dS_t = P_t * (dP - D) + P * (dP_t - D_t),  dP_t = a v^T + b v_t^T
                    dp_t = tl.zeros([OWN, OTHER], ACC)
                    if p_a is not None:
                        dp_t = product(v, a, b_v, b_a, dp_t, D, PART, PRECISION)
                    if p_vt is not None:
                        dp_t = product_if(own_t, vt, b, b_vt, b_b, dp_t, SOME_T, D, PART, PRECISION)
                    if DROPOUT:
                        dp_t = dropped(dp_t, row_keys, j, threshold, inverse)
                    ds_t = p * (dp_t - tl.load(p_row + 3 * STATS)[None, :])
                    if HAS_ST:
                        ds_t += p_t * dp
                if CAP:
                    ds, ds_t = through_cap(ds, ds_t, u, s_t, cap, HAS_ST)
                ds = ds.to(b_q.dtype)
                if p_dkt is not None:
                    dk_t = dot(ds, b_q, dk_t, PRECISION)
                if p_dk is not None:
                    # dk = scale * (dS_t^T q + dS^T q_t)
                    if p_qt is not None:
                        dk = dot_if(other_t, ds, b_qt, dk, SOME_T, PRECISION)
                    dk = dot(ds_t.to(b_q.dtype), b_q, dk, PRECISION)
    if p_dk is not None:
        out = (p_dk + batch * s_dk[0] + kv_h * s_dk[1], s_dk[2], start, grad_rows[2], grad_rows[3])
        store_rows(out, dk * scale, OWN, D, DP)
    if p_dv is not None:
        out = (p_dv + batch * s_dv[0] + kv_h * s_dv[1], s_dv[2], start, grad_rows[2], grad_rows[3])
        store_rows(out, dv, OWN, D, DP)
    if p_dkt is not None:
        out = (p_dkt + batch * s_dk[0] + kv_h * s_dk[1], s_dk[2], start, tangent_rows[2], tangent_rows[3])
        store_rows(out, dk_t * scale, OWN, D, DP)
    if p_dvt is not None:
        out = (p_dvt + batch * s_dv[0] + kv_h * s_dv[1], s_dv[2], start, tangent_rows[2], tangent_rows[3])
        store_rows(out, dv_t, OWN, D, DP)
