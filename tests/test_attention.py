from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from second_order import (
    CHECKS,
    Case,
    assert_close,
    check_dual,
    check_dual_gradcheck,
    check_empty,
    check_gradcheck,
    check_needs,
    check_precision,
    check_values,
    derivatives,
    every_check,
    narrow_dtypes,
    randn,
    random_like,
)

from benchmarks.live_memory import peak_live_bytes
from gradmem_kernels import backend as backends
from gradmem_kernels.attention import attention, attention_dual
from gradmem_kernels.reference import attention as reference
from gradmem_kernels.reference import visible

OP = "attention"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain(q, k, v, *, cu_seqlens=None, cu_seqlens_k=None, mask=None, bias=None, dropout=0.0, dropout_seed=0,
          grad_rows=None, **options):
    shape = (*q.shape[:3], k.shape[2])
    factors = torch.from_numpy(kept_weights(shape, dropout, dropout_seed)).to(q.dtype) / (1 - dropout)
    shown = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    bias = torch.zeros(shape, dtype=q.dtype) if bias is None else bias.expand(shape)
    if grad_rows is not None:
        inside = within(grad_rows, q.shape[2])
        q, k, v = (torch.where(inside, t, t.detach()) for t in (q, k, v))
    if cu_seqlens is None:
        return one_sequence(q, k, v, shown, bias, factors, **options)
    cu, cu_k = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    parts = []
    for rows, keys in zip(map(slice, cu, cu[1:]), map(slice, cu_k, cu_k[1:]), strict=True):
        parts.append(one_sequence(q[:, :, rows], k[:, :, keys], v[:, :, keys],
                                  *(t[:, :, rows, keys] for t in (shown, bias, factors)), **options))
    return torch.cat((*parts, 0 * q[:, :, cu[-1]:]), 2)


def one_sequence(q, k, v, shown, bias, factors, causal=False, scale=None, window=None, softcap=None, seqlens=None):
    queries, keys = q.shape[-2], k.shape[-2]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    shown = shown & (bias > -torch.inf)
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    if causal:
        shown = shown & (distance >= 0)
    if window is not None:
        shown = shown & (distance.abs() < window)
    if seqlens is not None:
        valid = torch.arange(keys) < seqlens[:, None]
        shown = shown & valid[:, None, None, :]
        if queries == keys:
            shown = shown & valid[:, None, :, None]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores + bias.masked_fill(bias == -torch.inf, 0)
    return (scores.masked_fill(~shown, torch.finfo(q.dtype).min).softmax(-1) * shown * factors) @ v


def within(rows, length):
    i = torch.arange(length)[:, None]
    return (rows[0] <= i) & (i < rows[1])


def mix(h):
    """The finalizer of MurmurHash3."""
    h = np.asarray(h, np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def kept_weights(shape, dropout, seed):
    b, h, i, j = np.ogrid[tuple(slice(n) for n in shape)]
    row = mix(mix(mix([[[[seed]]]]) ^ (b * shape[1] + h).astype(np.uint32)) ^ i.astype(np.uint32))
    return mix(row + j.astype(np.uint32) * np.uint32(0x9E3779B9)) >= np.uint32(round(dropout * 2**32))


@dataclass(frozen=True)
class TangentRows(Case):
    """A case whose dual takes the tangents of the rows outside ``rows`` as 0."""

    rows: tuple[int, int] = (0, 0)

    def run_plain_dual(self, *x_and_tangents):
        n = len(self.inputs)
        return super().run_plain_dual(*x_and_tangents[:n], *(
            None if t is None else torch.where(within(self.rows, t.shape[2]), t, 0) for t in x_and_tangents[n:]))


def case(backend, batch=1, heads=(1, 1), lengths=(3, 3), d=2, tangent_rows=None, **options):
    """``seqlens`` and boundaries are tuples, ``mask`` and ``bias`` tensors or the shapes of random ones."""
    q, k, v = randn(batch, heads[0], lengths[0], d), *(randn(batch, heads[1], lengths[1], d) for _ in "kv")
    tensors = {name: options.pop(name) for name in ("seqlens", "cu_seqlens", "cu_seqlens_k", "mask", "bias")
               if options.get(name) is not None}
    for name, value in tensors.items():
        if name in ("mask", "bias") and isinstance(value, tuple):
            shown = torch.rand(value) < 0.7
            tensors[name] = shown if name == "mask" else randn(*value).masked_fill(~shown, -torch.inf)
        elif not isinstance(value, torch.Tensor):
            tensors[name] = torch.tensor(value, dtype=torch.int32)
    aux = {name: tensors.pop(name) for name in ("seqlens", "mask", "bias")
           if name in tensors and tensors[name].shape[0] == batch}

    def of(q, more):
        return {name: t.to(q.dtype) if name == "bias" else t for name, t in {**tensors, **more}.items()}

    one = Case(
        OP, inputs=(q, k, v), active=(0, 1, 2), batched=(True,) * 3, aux=aux,
        plain=lambda *x, **aux: plain(*x, **of(x[0], aux), **options),
        op=lambda *x, **aux: attention(*x, **of(x[0], aux), **options, backend=backend),
        dual=lambda *x, **aux: attention_dual(*x, **of(x[0], aux), **options, tangent_rows=tangent_rows,
                                              backend=backend))
    return one if tangent_rows is None else TangentRows(**vars(one), rows=tangent_rows)


LEFT_PADDING = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool).view(3, 1, 1, 4)


CASES = {
    "full": {"heads": (2, 2)},
    "causal": {"batch": 2, "lengths": (4, 4), "d": 1, "causal": True},
    "grouped_few_queries": {"heads": (4, 2), "lengths": (2, 4), "causal": True},
    "shared_many_queries": {"heads": (3, 1), "lengths": (4, 2), "causal": True},
    "cross": {"batch": 2, "lengths": (2, 5), "d": 3, "scale": -0.7},
    "padded": {"batch": 3, "heads": (2, 1), "seqlens": (3, 0, 2)},
    "padded_causal": {"batch": 2, "lengths": (4, 4), "causal": True, "seqlens": (2, 4)},
    "padded_keys": {"batch": 3, "lengths": (2, 4), "causal": True, "seqlens": (4, 0, 1)},
    "one_key": {"lengths": (2, 1), "d": 3},
    "peaked": {"lengths": (3, 4), "d": 3, "scale": 40.0},
    "window": {"lengths": (4, 4), "window": 2},
    "window_causal_grouped": {"heads": (2, 1), "lengths": (5, 5), "window": 3, "causal": True},
    "window_few_queries": {"lengths": (2, 5), "window": 2},
    "window_many_queries": {"batch": 2, "lengths": (5, 2), "window": 1, "causal": True, "seqlens": (2, 1)},
    "softcap": {"lengths": (3, 4), "softcap": 0.8, "scale": 1.5},
    "softcap_bias_causal_grouped": {"heads": (4, 2), "lengths": (3, 3), "softcap": 1.3, "bias": (1, 4, 3, 3),
                                    "causal": True},
    "packed": {"heads": (2, 1), "lengths": (5, 5), "cu_seqlens": (0, 2, 2, 4)},
    "packed_causal": {"lengths": (5, 5), "cu_seqlens": (0, 2, 2, 4), "causal": True},
    "packed_other_keys": {"lengths": (4, 5), "cu_seqlens": (0, 1, 4), "cu_seqlens_k": (0, 3, 4), "causal": True},
    "packed_window_bias": {"lengths": (5, 5), "cu_seqlens": (0, 4, 5), "window": 2, "bias": (1, 1, 1, 5)},
    "mask": {"batch": 2, "heads": (2, 1), "lengths": (2, 3), "mask": (2, 2, 2, 3)},
    "left_padding_causal": {"batch": 3, "lengths": (4, 4), "mask": LEFT_PADDING, "causal": True},
    "bias": {"batch": 2, "heads": (2, 2), "bias": (1, 2, 3, 3)},
    "bias_of_keys": {"batch": 2, "heads": (2, 1), "lengths": (2, 4), "bias": (2, 1, 1, 4), "mask": (1, 2, 2, 4)},
    "dropout": {"lengths": (3, 4), "dropout": 0.4, "dropout_seed": 5},
    "dropout_grouped_window": {"heads": (4, 2), "dropout": 0.3, "dropout_seed": 2**32 - 1, "window": 2},
    "dropout_softcap_causal": {"dropout": 0.3, "dropout_seed": 1, "softcap": 0.9, "causal": True}}


@every_check(**CASES)
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@every_check(
    # finite differences see what grad_rows declares constant
    [check for check in CHECKS if check not in (check_gradcheck, check_dual_gradcheck)],
    first={"lengths": (4, 4), "grad_rows": (0, 2)},
    middle_causal_grouped={"heads": (2, 1), "lengths": (4, 4), "grad_rows": (1, 3), "causal": True},
    last_padded={"batch": 2, "grad_rows": (2, 3), "seqlens": (3, 2)},
    all_features={"heads": (4, 2), "lengths": (4, 4), "grad_rows": (1, 3), "causal": True, "window": 3, "softcap": 0.9,
                  "bias": (1, 4, 4, 4), "dropout": 0.3, "dropout_seed": 3})
def test_constant_rows(check, options, backend):
    check(case(backend, **options))


@every_check(
    (check_dual, check_dual_gradcheck, check_needs),
    some={"batch": 2, "lengths": (4, 4), "tangent_rows": (1, 3)},
    causal_grouped={"heads": (2, 1), "lengths": (4, 4), "tangent_rows": (0, 2), "causal": True},
    softcap_dropout={"tangent_rows": (1, 3), "softcap": 0.9, "dropout": 0.3, "dropout_seed": 3})
def test_tangent_rows(check, options, backend):
    check(case(backend, **options))


def test_tangent_rows_inside_grad_rows(backend):
    check_dual(case(backend, heads=(2, 1), lengths=(5, 5), grad_rows=(1, 5), tangent_rows=(2, 4), causal=True))


@narrow_dtypes
@pytest.mark.parametrize("options", [
    {}, {"causal": True, "seqlens": (33, 20)},
    {"window": 9, "softcap": 2.0, "bias": (2, 1, 33, 33), "dropout": 0.2, "dropout_seed": 1}],
    ids=["full", "causal_padded", "window_softcap_bias_dropout"])
def test_precision(options, dtype, backend):
    # the backward kernels read the output, which is rounded
    check_precision(case(backend, 2, (4, 2), (33, 33), 16, **options), dtype, only_rounds=False)


@pytest.mark.parametrize("options", [
    {"batch": 0}, {"heads": (0, 1)}, {"lengths": (0, 3)}, {"lengths": (0, 0), "causal": True, "seqlens": (0,)},
    {"lengths": (3, 0)}, {"lengths": (3, 0), "seqlens": (0,)}, {"batch": 0, "causal": True, "seqlens": ()},
    {"batch": 0, "window": 2, "softcap": 1.0, "mask": (1, 1, 3, 3), "dropout": 0.5},
    {"heads": (0, 1), "bias": (1, 1, 3, 3)}, {"lengths": (0, 0), "cu_seqlens": (0, 0)},
    {"lengths": (0, 3), "mask": (1, 1, 0, 3), "dropout": 0.5},
    {"lengths": (3, 0), "cu_seqlens": (0, 2), "cu_seqlens_k": (0, 0), "bias": (1, 1, 1, 0)},
    {"batch": 0, "grad_rows": (1, 2)}], ids=str)
def test_empty(options, backend):
    check_empty(case(backend, **options))


def rows_of(first, last):
    return st.integers(first, last - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(start + 1, last)))


@st.composite
def calls(draw):
    """Shapes and options of every kind, together."""
    length = st.integers(0, 6)
    queries, keys = draw(st.one_of(st.tuples(length, length), length.map(lambda s: (s, s))))
    groups, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["full", "padded", "packed"]))
    batch = 1 if kind == "packed" else draw(st.integers(1, 3))
    heads = groups * group
    options = {"batch": batch, "heads": (heads, groups), "lengths": (queries, keys), "d": draw(st.integers(1, 5)),
               "causal": draw(st.booleans()), "scale": draw(st.none() | st.floats(-2, 2)),
               "window": draw(st.none() | st.integers(1, 6)), "softcap": draw(st.none() | st.floats(0.3, 3))}
    if kind == "padded":
        options["seqlens"] = draw(st.tuples(*[st.integers(0, keys)] * batch))
    if kind == "packed":
        n = draw(st.integers(0, 3))
        options["cu_seqlens"], options["cu_seqlens_k"] = (
            (0, *sorted(draw(st.tuples(*[st.integers(0, size)] * n)))) for size in (queries, keys))
        if queries == keys and draw(st.booleans()):
            del options["cu_seqlens_k"]
    for name in ("mask", "bias"):
        if draw(st.booleans()):
            options[name] = (*(draw(st.sampled_from([1, size])) for size in (batch, heads, queries)), keys)
    if draw(st.booleans()):
        options |= {"dropout": draw(st.floats(0.05, 0.95)), "dropout_seed": draw(st.integers(0, 2**32 - 1))}
    if queries == keys > 0 and kind != "packed":
        options["grad_rows"] = draw(st.none() | rows_of(0, keys))
        options["tangent_rows"] = draw(st.none() | rows_of(*options["grad_rows"] or (0, keys)))
    return options


@given(options=calls())
def test_any_call(backend, options):
    any_case = case(backend, **options)
    check_values(any_case)
    check_dual(any_case)


@given(options=calls(), rows=st.integers(1, 3), scores=st.sampled_from([1, 30, 2**20]))
@settings(max_examples=60)
def test_blocks(options, rows, scores):
    """However many rows and samples the reference kernels work on at once, the results are the same."""
    with mock.patch.dict(visible.ROWS, cpu=rows), mock.patch.dict(visible.SCORES, cpu=scores):
        test_any_call.hypothesis.inner_test("reference", options)


@pytest.mark.parametrize("options", [
    {"batch": 3, "lengths": (4, 4), "causal": True, "seqlens": (4, 1, 2)},
    {"batch": 3, "lengths": (4, 4), "causal": True, "grad_rows": (1, 3), "mask": (3, 1, 4, 4)},
    {"lengths": (4, 5), "cu_seqlens": (0, 1, 4), "cu_seqlens_k": (0, 3, 4), "softcap": 0.9}], ids=str)
def test_needs_in_blocks(options, monkeypatch):
    monkeypatch.setitem(visible.ROWS, "cpu", 2)
    check_needs(case("reference", heads=(2, 1), **options))


@pytest.mark.parametrize(("options", "seen", "seen_backward"), [
    ({"causal": True}, 16 * (16 + 32 + 48 + 64), 16 * (16 + 32 + 48 + 64)),
    ({"window": 8}, 16 * (23 + 30 + 30 + 23), 16 * (23 + 30 + 30 + 23)),
    ({"window": 8, "causal": True}, 16 * (16 + 3 * 23), 16 * (16 + 3 * 23)),
    ({"cu_seqlens": (0, 16, 32, 48, 64)}, 64 * 16, 64 * 16),
    ({"cu_seqlens": (0, 32), "causal": True}, 16 * (16 + 32), 16 * (16 + 32)),
    ({"grad_rows": (16, 32)}, 64 * 64, 16 * 64 + 48 * 16),
    ({"grad_rows": (16, 32), "causal": True}, 16 * (16 + 32 + 48 + 64), 16 * 32 + 32 * 16)], ids=str)
def test_what_cannot_matter_costs_nothing(options, seen, seen_backward, monkeypatch):
    """Pairs of a query and a key that the reference kernels look at, of 64 x 64, in blocks of 16 rows."""
    monkeypatch.setitem(visible.ROWS, "cpu", 16)
    x = case("reference", lengths=(64, 64), **options)
    q, k, v = (t.requires_grad_() for t in x.inputs)
    pairs = []

    def scores_of(block, *args):
        pairs.append((block.rows.stop - block.rows.start) * (block.keys.stop - block.keys.start))
        return visible.scores_of(block, *args)

    monkeypatch.setattr(reference, "scores_of", scores_of)
    o = x.run_op(q, k, v)
    assert sum(pairs) == seen
    for _ in range(2):
        pairs.clear()
        o = sum(g.sum() for g in torch.autograd.grad(o.sum(), (q, k, v), create_graph=True))
        assert sum(pairs) == seen_backward


@pytest.mark.parametrize(("options", "rows"), [
    ({"lengths": (4, 2), "causal": True}, (slice(None), slice(None), slice(0, 2))),
    ({"batch": 2, "seqlens": (0, 3)}, (0,)),
    ({"batch": 2, "lengths": (2, 3), "seqlens": (0, 3)}, (0,)),
    ({"batch": 2, "seqlens": (1, 3)}, (0, slice(None), slice(1, None))),
    ({"lengths": (5, 3), "window": 2}, (0, slice(None), slice(0, 1))),
    ({"cu_seqlens": (0, 2)}, (0, slice(None), slice(2, None))),
    ({"lengths": (3, 2), "cu_seqlens": (0, 2, 3), "cu_seqlens_k": (0, 0, 2)}, (0, slice(None), slice(0, 2))),
    ({"batch": 2, "mask": torch.tensor([False, True]).view(2, 1, 1, 1).expand(2, 1, 1, 3)}, (0,)),
    ({"batch": 2, "bias": torch.tensor([-torch.inf, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3), "softcap": 1.0}, (0,))],
    ids=str)
def test_queries_without_keys_give_zeros(options, rows, backend):
    masked = case(backend, heads=(2, 1), **options)
    x, a, u = masked.inputs, masked.cotangent(), tuple(map(random_like, masked.inputs))
    d = derivatives(masked.run_op, x, a, u)
    o, o_t = masked.run_dual(*x, *u)
    for of_query in (d.y, d.first[0], d.second[0], d.second[-1], o, o_t):
        assert of_query[rows].numel() > 0
        assert torch.count_nonzero(of_query[rows]) == 0
        assert torch.count_nonzero(of_query) > 0
    if rows == (0,):  # its keys and values are used by no query either
        for of_key in (*d.first[1:], *d.second[1:3]):
            assert torch.count_nonzero(of_key[0]) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(sign, backend):
    """``exp`` of the scores, 784 and more, overflows; of their negatives it is 0."""
    far = case(backend, lengths=(2, 3), scale=1.0)
    q, k, _ = far.inputs
    q[..., 0], k[..., 0] = 28, 28 * sign
    check_values(far)
    check_dual(far)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_as_good_as_absent(causal, backend):
    lengths = (5, 3, 0)
    padded = case(backend, batch=3, heads=(2, 1), lengths=(5, 5), causal=causal, seqlens=lengths)
    a, u = padded.cotangent(), tuple(map(random_like, padded.inputs))
    results = derivatives(padded.run_op, padded.inputs, a, u).named()
    for b, length in enumerate(lengths):
        def cut(t, rows=slice(b, b + 1), length=length):
            return t[rows, :, :length]

        one = derivatives(lambda *x: plain(*x, causal=causal), tuple(map(cut, padded.inputs)), cut(a),
                          tuple(map(cut, u)))
        assert_close({name: cut(t) for name, t in results.items()}, one.named())
        assert all(torch.count_nonzero(t[b, :, length:]) == 0 for t in results.values())


@pytest.mark.parametrize("options", [
    {"seqlens": (2, 4)}, {"mask": torch.tensor([1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.bool).view(2, 1, 1, 4)}], ids=str)
def test_hidden_contents_do_not_matter(options, backend):
    hidden = case(backend, batch=2, lengths=(4, 4), **options)
    a, u = hidden.cotangent(), tuple(map(random_like, hidden.inputs))
    expected = derivatives(hidden.run_op, hidden.inputs, a, u).named()
    queries = [hidden.inputs[0], a, u[0]] if "seqlens" in options else []
    for t in (*hidden.inputs[1:], *u[1:], *queries):
        t[0, :, 2:] = 1e3
    actual = derivatives(hidden.run_op, hidden.inputs, a, u).named()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("grad_rows", "tangent_rows"), [
    ((0, 1), (2, 4)), ((1, 3), (0, 2)), (None, (1, 2)), ((1, 2), None)])
def test_kernels_take_any_two_ranges_of_rows(grad_rows, tangent_rows, backend):
    """For kernels, ``grad_rows`` say which cotangents are wanted, ``tangent_rows`` which tangents there are."""
    x, x_t, (a, b) = (tuple(randn(1, 1, 4, 2) for _ in range(n)) for n in (3, 3, 2))
    options = {"causal": False, "scale": 0.7, "window": None, "softcap": 0.9, "dropout": 0.0, "seed": 0,
               "grad_rows": grad_rows, "tangent_rows": tangent_rows}
    kernels, aux = backends.select(OP, backend), (None,) * 5
    leaves = tuple(t.clone().requires_grad_() for t in (*x, *x_t))
    inside = within(tangent_rows or (0, 4), 4)
    formula = torch.func.jvp(lambda *x: plain(*x, scale=0.7, softcap=0.9), leaves[:3],
                             tuple(torch.where(inside, t, 0) for t in leaves[3:]))
    y, y_t, saved = kernels.dual_forward(x, aux, x_t, **options)
    assert_close({"y": y[0], "y_t": y_t[0]}, {"y": formula[0], "y_t": formula[1]})
    expected = torch.autograd.grad(formula, leaves, (a, b))
    for needs, needs_t in (((True,) * 3,) * 2, ((True,) * 3, (False,) * 3), ((False,) * 3, (True,) * 3)):
        bars = kernels.dual_backward(x, aux, x_t, y, y_t, saved, (a,), (b,), needs, needs_t, **options)
        for name, rows, actual, formula in (("input", grad_rows, bars[0], expected[:3]),
                                            ("tangent", tangent_rows, bars[1], expected[3:])):
            wanted = within(rows or (0, 4), 4)
            for i, t in enumerate(actual):
                if t is not None:
                    assert_close({f"{name} {i}": t}, {f"{name} {i}": torch.where(wanted, formula[i], 0)})


def test_tangents_outside_their_rows_are_not_read(backend):
    for options in ({"grad_rows": (1, 3)}, {"tangent_rows": (1, 3)}, {"tangent_rows": (1, 3), "causal": True}):
        rows = case(backend, heads=(2, 1), lengths=(4, 4), **options)
        u = tuple(t.requires_grad_() for t in map(random_like, rows.inputs))
        nan = [torch.where(within((1, 3), 4), t, torch.nan).detach().requires_grad_() for t in u]
        expected, actual = (torch.cat(rows.run_dual(*rows.inputs, *x_t)) for x_t in (u, nan))
        assert torch.equal(actual, expected)
        for t, of in ((actual, nan), (expected, u)):
            for g in torch.autograd.grad(t.sum(), of):
                assert torch.count_nonzero(g[:, :, 1:3])
                assert not torch.count_nonzero(torch.where(within((1, 3), 4), 0, g))


def test_constant_rows_receive_zeros(backend):
    rows = case(backend, heads=(2, 1), lengths=(4, 4), grad_rows=(1, 3))
    d = derivatives(rows.run_op, rows.inputs, rows.cotangent(), tuple(map(random_like, rows.inputs)))
    for g in (*d.first, *d.second[:3]):
        assert torch.count_nonzero(g[:, :, 1:3])
        assert not torch.count_nonzero(torch.where(within((1, 3), 4), 0, g))


def test_packed_under_vmap(backend):
    """Boundaries may differ between what ``vmap`` maps over."""
    packed = case(backend, lengths=(5, 5), causal=True)
    boundaries = torch.tensor([[0, 2, 2, 4], [0, 1, 4, 5]])
    a, u = packed.cotangent(), tuple(map(random_like, packed.inputs))

    def tangents(f, cu):
        return torch.func.jvp(torch.func.grad(lambda *x: (f(*x, cu_seqlens=cu) * a).sum(), (0, 1, 2)), packed.inputs, u)

    actual = torch.vmap(lambda cu: tangents(packed.op, cu))(boundaries)
    for n, cu in enumerate(boundaries):
        for name, ours, formula in zip(("gradient", "its tangent"), actual, tangents(packed.plain, cu), strict=True):
            assert_close({f"{name} {i}": t[n] for i, t in enumerate(ours)},
                         {f"{name} {i}": t for i, t in enumerate(formula)})


def test_hash():
    """Known values of MurmurHash3's finalizer, here and in the formula of these tests."""
    for h, mixed in ((0, 0), (1, 0x514E28B7), (0xFFFFFFFF, 0x81F16F39)):
        assert visible._mix(h) == int(visible._mix(torch.tensor(h))) == int(mix([h])[0]) == mixed


@pytest.mark.parametrize("dropout", [0.1, 0.9])
def test_dropout_keeps_its_share(dropout, backend):
    """Weights are kept or dropped as the hash says, whatever the dtype; as many as asked for."""
    shape, seed = (2, 4, 16, 128), 12345
    q, k = torch.zeros(2, 4, 16, 1), torch.zeros(2, 2, 128, 1)
    expected = kept_weights(shape, dropout, seed)
    assert abs(expected.mean() - (1 - dropout)) < 0.01
    for j in (0, 77, 127):
        v = torch.zeros(2, 2, 128, 1)
        v[:, :, j] = 128 * (1 - dropout)
        o = attention(q, k, v, dropout=dropout, dropout_seed=seed, backend=backend)
        torch.testing.assert_close(o[..., 0], torch.from_numpy(expected[..., j]).float())


def test_dropout_seed_is_drawn(backend):
    """Without a seed one is drawn from the default generator, once for the forward pass and all its derivatives."""
    drawn = case(backend, heads=(2, 1), lengths=(3, 4), dropout=0.5)
    torch.manual_seed(7)
    seed = int(torch.randint(2**32, ()))
    a, u = drawn.cotangent(), tuple(map(random_like, drawn.inputs))
    torch.manual_seed(7)
    actual = derivatives(drawn.run_op, drawn.inputs, a, u)
    expected = derivatives(lambda *x: plain(*x, dropout=0.5, dropout_seed=seed), drawn.inputs, a, u)
    assert_close(actual.named(), expected.named())
    assert not torch.equal(drawn.run_op(*drawn.inputs), actual.y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_rows(dtype, backend):
    """The log-sum-exp that backends share: natural log, at least float32, +inf where a query sees no key."""
    narrow = case(backend, heads=(2, 1), lengths=(4, 2), d=2).to(dtype)
    q, k, v = narrow.inputs
    kernels = backends.select(OP, backend)
    _, (lse, *_) = kernels.forward((q, k, v), (None,) * 5, causal=True, scale=0.5, window=None, softcap=None,
                                    dropout=0.0, seed=0, grad_rows=None, tangent_rows=None)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scores = 0.5 * q.double() @ k.double().mT
    expected = torch.stack((torch.full((1, 2), torch.inf), torch.full((1, 2), torch.inf), scores[:, :, 2, 0],
                            scores[:, :, 3].logsumexp(-1)), dim=-1)
    torch.testing.assert_close(lse.double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [
    {}, {"causal": True, "window": 9, "softcap": 2.0, "dropout": 0.1, "grad_rows": (3, 40)},
    {"cu_seqlens": (0, 20, 60)}, {"seqlens": (60,)}], ids=str)
def test_keeps_no_matrix(options, backend):
    """What stays alive between the passes grows with the number of rows, not with its square."""
    saved = []

    def pack(t):
        saved.append(t.numel())
        return t

    long = case(backend, lengths=(64, 64), d=4, **options)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        derivatives(long.run_op, long.inputs, long.cotangent(), long.inputs)
        long.run_dual(*(t.requires_grad_() for t in long.inputs), *long.inputs)
    assert 0 < max(saved) <= 64 * 4


def test_memory_of_a_double_backward_is_linear_in_the_length():
    """Its live tensors are counted on the meta device, which computes nothing."""
    def peak(length):
        x = tuple(torch.zeros(1, 4, length, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
                  for _ in range(3))

        def work():
            o = attention(*x, causal=True)
            first = torch.autograd.grad(o, x, torch.ones_like(o), create_graph=True)
            torch.autograd.grad(first, x, tuple(map(torch.ones_like, first)))

        return peak_live_bytes(work)

    short, *peaks = map(peak, (2**10, 2**13, 2**16))
    for factor, long in zip((2**3, 2**6), peaks, strict=True):
        assert long < 1.05 * factor * short
