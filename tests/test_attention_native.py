"""Attention in C++, beyond what every backend is asked: many tiles, threads, instruction sets."""

from __future__ import annotations

import pytest
import torch
from second_order import assert_close, random_like
from test_attention import OP, case
from test_rows_native import operators

from gradmem_kernels import backend as backends
from gradmem_kernels.native.common import refusal

missing = refusal(None)
pytestmark = [pytest.mark.skipif(missing is not None, reason=str(missing)), pytest.mark.usefixtures("poisoned_memory")]

#: Several tiles of 48 rows and keys, the last not full, in several tasks.
CALLS = {
    "full": {"batch": 2, "heads": (2, 2), "lengths": (100, 100)},
    "causal_grouped": {"batch": 2, "heads": (4, 2), "lengths": (150, 150), "causal": True, "d": 17},
    "few_queries": {"heads": (2, 1), "lengths": (50, 200), "causal": True},
    "many_queries": {"heads": (2, 1), "lengths": (250, 60), "causal": True},
    "window": {"lengths": (200, 200), "window": 30},
    "window_causal": {"heads": (3, 3), "lengths": (200, 200), "window": 60, "causal": True},
    "padded": {"batch": 3, "lengths": (110, 110), "seqlens": (110, 0, 49), "causal": True},
    "packed": {"lengths": (160, 160), "cu_seqlens": (0, 48, 48, 101, 150), "causal": True},
    "packed_other_keys": {"lengths": (120, 170), "cu_seqlens": (0, 70, 110), "cu_seqlens_k": (0, 100, 170)},
    "softcap_bias": {"heads": (2, 2), "lengths": (100, 60), "softcap": 0.9, "bias": (1, 2, 100, 60)},
    "mask_dropout": {"batch": 2, "lengths": (70, 100), "mask": (2, 1, 70, 100), "dropout": 0.3, "dropout_seed": 7},
    "everything": {"heads": (4, 2), "lengths": (120, 120), "grad_rows": (50, 110), "causal": True, "window": 70,
                   "softcap": 0.9, "bias": (1, 4, 120, 120), "dropout": 0.3, "dropout_seed": 3},
    "constant_rows": {"batch": 2, "heads": (2, 1), "lengths": (130, 130), "grad_rows": (0, 20), "causal": True},
    "few_tangent_rows": {"heads": (2, 2), "lengths": (130, 130), "tangent_rows": (60, 70), "causal": True},
    "many_rows": {"heads": (2, 1), "lengths": (500, 130), "d": 5}}


def everything(one, dtype=torch.float64, backend="native", flags=(True,) * 3, flags_t=(True,) * 3, tangents=(0, 1, 2)):
    """All results of all kernels in one call of each."""
    options = {"causal": False, "scale": 0.3, "window": None, "softcap": None, "dropout": 0.0, "seed": 0,
               "grad_rows": None, "tangent_rows": None, **one}
    x, aux = options.pop("x"), options.pop("aux")
    torch.manual_seed(1)
    x_t = tuple(random_like(t) if i in tangents else None for i, t in enumerate(x))
    x, aux, x_t, (a, b) = (tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)
                           for tensors in (x, aux, x_t, (random_like(x[0]), random_like(x[0]))))
    kernels = backends.select(OP, backend, *x)
    y, saved = kernels.forward(x, aux, **options)
    out = {"forward": (*y, *saved)}
    if any(flags):
        out["backward"] = kernels.backward(x, aux, y, saved, (b,), flags, **options)
    y, y_t, saved_t = kernels.dual_forward(x, aux, x_t, **options)
    out["dual_forward"] = (*y, *y_t, *saved_t)
    bars = kernels.dual_backward(x, aux, x_t, y, y_t, saved_t, (a,), (b,), flags, flags_t, **options)
    out["dual_backward"] = (*bars[0], *bars[1])
    bars, y_t = kernels.double_backward(x, aux, x_t, y, saved, (b,), flags, **options)
    out["double_backward"] = (*bars, *y_t)
    return {f"{name} {i}": t for name, results in out.items() for i, t in enumerate(results) if t is not None}


def call(batch=1, heads=(1, 1), lengths=(3, 3), d=8, **options):
    """The arguments of kernels, from those of test_attention.case."""
    one = case("native", batch, heads, lengths, d, **options)
    tensors = {name: options.get(name) for name in ("seqlens", "cu_seqlens", "cu_seqlens_k", "mask", "bias")}
    aux = [one.aux.get(name) for name in tensors]
    for i, (name, value) in enumerate(tensors.items()):
        if aux[i] is None and value is not None:
            aux[i] = torch.tensor(value) if "seqlens" in name else torch.randn(value)
            if name == "mask":
                aux[i] = aux[i] > -0.5
    if aux[1] is not None and aux[2] is None:
        aux[2] = aux[1]
    rest = {name: value for name, value in options.items() if name not in tensors}
    if "dropout_seed" in rest:
        rest["seed"] = rest.pop("dropout_seed")
    if "grad_rows" in rest:
        rest["tangent_rows"] = (rest["grad_rows"][0], rest["grad_rows"][1] - 3)
    return {"x": one.inputs, "aux": tuple(aux), **rest}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_many_tiles(options):
    one = call(**options)
    assert_close(everything(one), everything(one, backend="reference"))


@pytest.mark.parametrize("tangents", [(0,), (1,), (2,), (0, 1)], ids=str)
@pytest.mark.parametrize("options", [CALLS["causal_grouped"], CALLS["few_tangent_rows"], CALLS["softcap_bias"]],
                         ids=["causal_grouped", "few_tangent_rows", "softcap_bias"])
def test_some_tangents(options, tangents):
    one = call(**options)
    assert_close(everything(one, tangents=tangents), everything(one, backend="reference", tangents=tangents))


@pytest.mark.parametrize("flags", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3],
                         ids=str)
def test_some_cotangents(flags):
    one = call(**CALLS["causal_grouped"])
    for flags_t in (flags, tuple(not flag for flag in flags)):
        if not any(flags + flags_t):
            continue
        ours, expected = (everything(one, backend=name, flags=flags, flags_t=flags_t)
                          for name in ("native", "reference"))
        assert ours.keys() == expected.keys()
        assert_close(ours, expected)


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_bits_do_not_depend_on_threads(options):
    """With more threads than heads, rows and keys become tasks of their own."""
    one, before = call(**options), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(everything(one, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [CALLS["causal_grouped"], CALLS["everything"]], ids=["grouped", "everything"])
def test_every_instruction_set(options, dtype):
    from gradmem_kernels.native import _cpu

    one, before = call(**options), _cpu.instruction_set()
    results = {}
    try:
        for isa in _cpu.instruction_sets():
            _cpu.use(isa)
            results[isa] = everything(one, dtype)
    finally:
        _cpu.use(before)
    assert "baseline" in results
    expected = everything(one, backend="reference")
    for found in results.values():
        for name, t in found.items():
            torch.testing.assert_close(t, expected[name], check_dtype=False, **(
                {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}))


def test_boundaries_beyond_the_keys():
    """Transforms of torch.func hide boundaries from checks: what they say of keys that are not there is ignored."""
    one = call(lengths=(60, 100), cu_seqlens=(0, 60), cu_seqlens_k=(0, 100))
    outside = {**one, "aux": (*one["aux"][:2], torch.tensor([-5, 200]), *one["aux"][3:])}
    expected = everything(one)
    assert all(torch.equal(t, expected[name]) for name, t in everything(outside).items())


def test_an_unknown_instruction_set_is_refused():
    from gradmem_kernels.native import _cpu

    with pytest.raises(ValueError, match=r"instruction set: expected one of .*baseline, got 'avx3'"):
        _cpu.use("avx3")


def test_float16_is_refused():
    half = case("native").to(torch.float16)
    with pytest.raises(backends.BackendError, match=r"take float64, float32, bfloat16 on a CPU, not torch.float16"):
        half.run_op(*half.inputs)


@pytest.mark.parametrize("order", ["forward", "dual_forward", "known", "backward", "dual_backward"])
def test_opcheck(order):
    """Schema, fake kernels and dispatch of the operators are right."""
    ops = operators("attention")
    q, k, v = (t.detach() for t in case("native", heads=(2, 1), lengths=(3, 3)).inputs)
    x_t, aux, options = (q + 1, k + 1, None), (None,) * 5, (True, 0.5, None, 0.9, 0.0, 0, None, None)
    (o, o_t), lse, mu = ops.native_attention_forward(q, k, v, *x_t, None, None, *aux, *options)
    forward = {"forward": ((None,) * 3, None, None), "dual_forward": (x_t, None, None), "known": (x_t, o, lse)}
    if order in forward:
        tangents, *known = forward[order]
        torch.library.opcheck(ops.native_attention_forward.default, (q, k, v, *tangents, *known, *aux, *options))
        return
    dual = order == "dual_backward"
    torch.library.opcheck(
        ops.native_attention_backward.default,
        (q, k, v, *(x_t if dual else (None,) * 3), o, o_t if dual else None, lse, mu if dual else None, None, o + 1,
         [dual] * 3, [True, True, not dual], *aux, *options))
