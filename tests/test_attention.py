from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from second_order import (
    Case,
    assert_close,
    check_dual,
    check_empty,
    check_needs,
    check_precision,
    check_values,
    derivatives,
    every_check,
    narrow_dtypes,
    randn,
    random_like,
    refused,
)

from gradmem_kernels import backend as backends
from gradmem_kernels.attention import attention, attention_dual
from gradmem_kernels.reference import visible

OP = "attention"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain(q, k, v, causal, scale, seqlens):
    queries, keys = q.shape[-2], k.shape[-2]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    visible = torch.ones(q.shape[0], 1, queries, keys, dtype=torch.bool)
    if causal:
        visible = visible.tril(keys - queries)
    if seqlens is not None:
        valid = torch.arange(keys) < seqlens[:, None]
        visible = visible & valid[:, None, None, :]
        if queries == keys:
            visible = visible & valid[:, None, :, None]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~visible, torch.finfo(q.dtype).min).softmax(-1) * visible) @ v


def case(backend, batch=1, heads=(1, 1), lengths=(3, 3), d=2, causal=False, scale=None, seqlens=None):
    options = {"causal": causal, "scale": scale, "backend": backend}
    q, k, v = randn(batch, heads[0], lengths[0], d), *(randn(batch, heads[1], lengths[1], d) for _ in "kv")
    return Case(
        OP, inputs=(q, k, v), active=(0, 1, 2), batched=(True,) * 3,
        aux={} if seqlens is None else {"seqlens": torch.tensor(seqlens, dtype=torch.int32)},
        plain=lambda q, k, v, seqlens=None: plain(q, k, v, causal, scale, seqlens),
        op=lambda q, k, v, seqlens=None: attention(q, k, v, seqlens=seqlens, **options),
        dual=lambda *x, seqlens=None: attention_dual(*x, seqlens=seqlens, **options))


@every_check(
    full={"heads": (2, 2)},
    causal={"batch": 2, "lengths": (4, 4), "d": 1, "causal": True},
    grouped_few_queries={"heads": (4, 2), "lengths": (2, 4), "causal": True},
    shared_many_queries={"heads": (3, 1), "lengths": (4, 2), "causal": True},
    cross={"batch": 2, "lengths": (2, 5), "d": 3, "scale": -0.7},
    padded={"batch": 3, "heads": (2, 1), "seqlens": (3, 0, 2)},
    padded_causal={"batch": 2, "lengths": (4, 4), "causal": True, "seqlens": (2, 4)},
    padded_keys={"batch": 3, "lengths": (2, 4), "causal": True, "seqlens": (4, 0, 1)},
    one_key={"lengths": (2, 1), "d": 3},
    peaked={"lengths": (3, 4), "d": 3, "scale": 40.0})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@narrow_dtypes
@pytest.mark.parametrize("options", [{}, {"causal": True, "seqlens": (33, 20)}], ids=["full", "causal_padded"])
def test_precision(options, dtype, backend):
    # the backward kernels read the output, which is rounded
    check_precision(case(backend, 2, (4, 2), (33, 33), 16, **options), dtype, only_rounds=False)


@pytest.mark.parametrize("options", [
    {"batch": 0}, {"heads": (0, 1)}, {"lengths": (0, 3)}, {"lengths": (0, 0), "causal": True, "seqlens": (0,)},
    {"lengths": (3, 0)}, {"lengths": (3, 0), "seqlens": (0,)}, {"batch": 0, "causal": True, "seqlens": ()}], ids=str)
def test_empty(options, backend):
    check_empty(case(backend, **options))


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_samples_at_a_time(at_a_time, monkeypatch):
    """However many samples the reference kernels work on at once, the results are the same."""
    monkeypatch.setattr(visible, "SCORES", {"cpu": at_a_time * 2 * 4 * 4})
    split = case("reference", batch=3, heads=(2, 1), lengths=(4, 4), causal=True, seqlens=(4, 1, 2))
    for check in (check_values, check_dual, check_needs):
        check(split)


sizes = st.integers(0, 6)


@given(data=st.data(), batch=st.integers(1, 3), groups=st.integers(1, 2), group=st.integers(1, 3),
       lengths=st.one_of(st.tuples(sizes, sizes), sizes.map(lambda s: (s, s))), d=st.integers(1, 5),
       causal=st.booleans(), padded=st.booleans(), scale=st.none() | st.floats(-2, 2))
def test_any_shape(backend, data, batch, groups, group, lengths, d, causal, padded, scale):
    seqlens = data.draw(st.tuples(*[st.integers(0, lengths[1])] * batch)) if padded else None
    any_case = case(backend, batch, (groups * group, groups), lengths, d, causal, scale, seqlens)
    check_values(any_case)
    check_dual(any_case)


@pytest.mark.parametrize(("options", "rows"), [
    ({"lengths": (4, 2), "causal": True}, (slice(None), slice(None), slice(0, 2))),
    ({"batch": 2, "seqlens": (0, 3)}, (0,)),
    ({"batch": 2, "lengths": (2, 3), "seqlens": (0, 3)}, (0,)),
    ({"batch": 2, "seqlens": (1, 3)}, (0, slice(None), slice(1, None)))], ids=str)
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

        one = derivatives(lambda *x: plain(*x, causal, None, None), tuple(map(cut, padded.inputs)), cut(a),
                          tuple(map(cut, u)))
        assert_close({name: cut(t) for name, t in results.items()}, one.named())
        assert all(torch.count_nonzero(t[b, :, length:]) == 0 for t in results.values())


def test_padding_contents_do_not_matter(backend):
    padded = case(backend, batch=2, lengths=(4, 4), seqlens=(2, 4))
    a, u = padded.cotangent(), tuple(map(random_like, padded.inputs))
    expected = derivatives(padded.run_op, padded.inputs, a, u).named()
    for t in (*padded.inputs, a, *u):
        t[0, :, 2:] = 1e3
    actual = derivatives(padded.run_op, padded.inputs, a, u).named()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


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


def test_keeps_no_matrix(backend):
    """What stays alive between the passes grows with the number of rows, not with its square."""
    saved = []

    def pack(t):
        saved.append(t.numel())
        return t

    long = case(backend, lengths=(64, 64), d=4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        derivatives(long.run_op, long.inputs, long.cotangent(), long.inputs)
        long.run_dual(*(t.requires_grad_() for t in long.inputs), *long.inputs)
    assert 0 < max(saved) <= 64 * 4


Q, K = torch.ones(2, 4, 3, 5), torch.ones(2, 2, 6, 5)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"q": None}, "q", "a tensor", "NoneType"),
    ({"q": Q[0]}, "q", "shape [B, Hq, Sq, d]", "[4, 3, 5]"),
    ({"q": Q.long()}, "q", "float64", "int64"),
    ({"q": Q[:, :3]}, "q", "multiple of k's, 2", "3"),
    ({"k": K[:, :0], "v": K[:, :0]}, "q", "multiple of k's, 0", "4"),
    ({"k": K[..., :4]}, "k", "d=5", "[2, 2, 6, 4]"),
    ({"k": K[:1]}, "k", "B=2", "[1, 2, 6, 5]"),
    ({"k": K.half()}, "k", "the dtype of q, float32", "float16"),
    ({"v": K[:, :1]}, "v", "Hkv=2", "[2, 1, 6, 5]"),
    ({"v": K[:, :, :5]}, "v", "Sk=6", "[2, 2, 5, 5]"),
    ({"v": K.to("meta")}, "v", "the device of q, cpu", "meta"),
    ({"causal": 1}, "causal", "True or False", "1"),
    ({"scale": float("inf")}, "scale", "a finite number", "inf"),
    ({"scale": torch.tensor(1.0)}, "scale", "a number", "Tensor"),
    ({"seqlens": [3, 3]}, "seqlens", "a tensor", "list"),
    ({"seqlens": torch.tensor([3.0, 3.0])}, "seqlens", "int32", "float32"),
    ({"seqlens": torch.tensor([3])}, "seqlens", "B=2", "[1]"),
    ({"seqlens": torch.tensor([3, 7])}, "seqlens", "0..6", "3..7"),
    ({"seqlens": torch.tensor([-1, 3])}, "seqlens", "0..6", "-1..3")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"q": Q, "k": K, "v": K, **arguments}
    refused(lambda: attention(**arguments), "attention", argument, expected, got)
    refused(lambda: attention_dual(**arguments, q_t=None, k_t=None, v_t=None), "attention_dual", argument, expected,
            got)


@pytest.mark.parametrize("argument", ["q_t", "k_t", "v_t"])
def test_bad_tangents(argument):
    tangents = {"q_t": None, "k_t": None, "v_t": None, argument: torch.ones(2, 3)}
    refused(lambda: attention_dual(Q, K, K, **tangents), "attention_dual", argument, "shape [2, ", "[2, 3]")
