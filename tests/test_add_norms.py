"""Norms of a sum, ``add_rms_norm`` and ``add_layer_norm``: both outputs, in every order."""

from __future__ import annotations

import itertools

import pytest
import test_layer_norm
import test_rms_norm
import torch
from second_order import (
    CHECKS,
    Case,
    assert_close,
    check_empty,
    check_precision,
    every_check,
    narrow_dtypes,
    randn,
    random_like,
    refused,
    spy_kernels,
)
from torch.autograd import grad

from gradmem_kernels import backend as backends
from gradmem_kernels import layer_norm, rms_norm
from gradmem_kernels.layer_norm import add_layer_norm, add_layer_norm_dual
from gradmem_kernels.rms_norm import add_rms_norm, add_rms_norm_dual

OP = "layer_norm"  # whose kernels, and those of rms_norm, serve
pytestmark = pytest.mark.usefixtures("poisoned_memory")

NORMS = ("rms", "layer", "layer_no_bias")
every_norm = pytest.mark.parametrize("norm", NORMS)


def case(backend, shape, norm="rms", eps=1e-5):
    """``y`` and ``s`` side by side."""
    rms = norm == "rms"
    of_sum = test_rms_norm.case(backend, shape, eps) if rms else test_layer_norm.case(backend, shape, norm == "layer",
                                                                                      eps)
    op, op_dual = (add_rms_norm, add_rms_norm_dual) if rms else (add_layer_norm, add_layer_norm_dual)

    def named(*bias):
        return {"eps": eps, "backend": backend, **({"bias": bias[0]} if bias else {})}

    def plain(x, residual, *weights):
        return torch.cat((of_sum.plain(x + residual, *weights), x + residual), -1)

    def dual(x, residual, weight, *bias_and_tangents):
        *bias, x_t, residual_t = bias_and_tangents
        y, s, y_t, s_t = op_dual(x, residual, weight, x_t, residual_t, **named(*bias))
        return torch.cat((y, s), -1), torch.cat((y_t, s_t), -1)

    x, *weights = of_sum.inputs
    return Case(
        f"add_{of_sum.name}", plain=plain, dual=dual, inputs=(x, random_like(x), *weights), active=(0, 1),
        op=lambda x, residual, weight, *bias: torch.cat(op(x, residual, weight, **named(*bias)), -1),
        batched=(True, True, *(False for _ in weights)),
        of_kernels=lambda flags: (flags[0] or flags[1], *flags[2:]))


@every_check(
    CHECKS,
    rms={"shape": (2, 3, 4)},
    layer={"shape": (2, 3), "norm": "layer"},
    no_bias={"shape": (3, 4), "norm": "layer_no_bias", "eps": 0.5})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@every_norm
@narrow_dtypes
def test_precision(dtype, norm, backend):
    """The sum is rounded before it is normalised, as in the two steps."""
    check_precision(case(backend, (4, 9, 65), norm), dtype, only_rounds=False)


@every_norm
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)], ids=str)
def test_empty(shape, norm, backend):
    check_empty(case(backend, shape, norm))


@narrow_dtypes
def test_values_are_those_of_the_two_steps(dtype, backend):
    x, residual, weight = (t.to(dtype) for t in case(backend, (4, 9)).inputs)
    try:
        backends.select(OP, backend, x)
    except backends.BackendError as refusal:
        pytest.skip(str(refusal))
    for fused, two_steps in ((add_rms_norm, rms_norm), (add_layer_norm, layer_norm)):
        y, s = fused(x, residual, weight, backend=backend)
        assert torch.equal(s, x + residual)
        assert torch.equal(y, two_steps(s, weight, backend=backend))


@every_norm
@pytest.mark.parametrize("used", ["y", "s"])
def test_one_output_alone(used, norm, backend):
    """Derivatives of both orders where the other output has no cotangent."""
    one = case(backend, (2, 3), norm)
    part = slice(0, 3) if used == "y" else slice(3, 6)
    x = [t.requires_grad_() for t in one.inputs]
    u = [random_like(t) for t in x]
    results = []
    for f in (one.run_op, one.run_plain):
        first = grad((f(*x)[..., part] ** 2).sum(), x, create_graph=True, materialize_grads=True)
        second = grad(sum((t * d).sum() for t, d in zip(first, u, strict=True)), x, materialize_grads=True)
        results.append({str(i): t.detach() for i, t in enumerate((*first, *second))})
    assert_close(*results)


def test_forward_mode_along_a_cotangent_of_the_sum(backend):
    """The gradient moves with it, and nothing else."""
    x, residual, weight = case(backend, (2, 3)).inputs
    a, u = randn(2, 3), randn(2, 3)

    def gradients(bar):
        def loss(*x):
            y, s = add_rms_norm(*x, backend=backend)
            return (y * a).sum() + (s * bar).sum()

        return torch.func.grad(loss, (0, 1, 2))(x, residual, weight)

    tangents = torch.func.jvp(gradients, (randn(2, 3),), (u,))[1]
    assert_close(dict(zip("xrw", tangents, strict=True)), {"x": u, "r": u, "w": torch.zeros(3).double()})


@every_norm
@pytest.mark.parametrize("present", [flags for flags in itertools.product((True, False), repeat=4) if any(flags)],
                         ids=str)
def test_absent_cotangents_of_the_dual_form(present, norm, backend):
    one = case(backend, (2, 3), norm)
    leaves = [t.requires_grad_() for t in (*one.inputs, *(random_like(one.inputs[i]) for i in one.active))]
    bars = [randn(2, 3) for _ in present]
    results = []
    for f in (one.run_dual, one.run_plain_dual):
        outputs = [half for both in f(*leaves) for half in both.split(3, -1)]  # y, s, y_t, s_t
        used = sum((t * bar).sum() for t, bar, flag in zip(outputs, bars, present, strict=True) if flag)
        results.append({str(i): t for i, t in enumerate(grad(used, leaves, materialize_grads=True))})
    assert_close(*results)


def test_absent_cotangents_reach_the_kernels_as_none(backend):
    x, residual, weight = (t.requires_grad_() for t in case(backend, (2, 3)).inputs)
    u = random_like(x)

    def run(use):
        with spy_kernels() as calls:
            y, s = add_rms_norm(x, residual, weight, backend=backend)
            (first,) = grad(use(y, s).sum(), x, create_graph=True, materialize_grads=True)
            if first.requires_grad:
                grad((first * u).sum(), (x, weight), materialize_grads=True)
        return calls

    calls = run(lambda y, s: y)
    assert [t is None for t in calls[1].arguments["y_bar"]] == [False, True]
    # the second order goes on through the sum, which needs no kernel
    assert [call.kernel for call in calls if call.kernel == "backward"] == ["backward"]
    assert [call.kernel for call in run(lambda y, s: s)] == ["forward"]
    with spy_kernels() as calls:
        _, _, y_t, s_t = add_rms_norm_dual(x, residual, weight, u, None, backend=backend)
        grad((y_t * s_t).sum(), x)
    arguments = calls[-1].arguments
    assert all(t is None for t in arguments["y_bar"])
    assert all(t is not None for t in arguments["y_t_bar"])


@every_norm
def test_gradients_of_the_terms_share_no_memory(norm, backend):
    """One cotangent serves both terms; what leaves keep of it is their own."""
    one = case(backend, (2, 3), norm)
    x = [t.requires_grad_() for t in one.inputs]
    x_t = [random_like(t).requires_grad_() for t in x[:2]]
    a = randn(2, 6)
    for loss in ((one.run_op(*x) * a).sum(), (one.run_op(*x)[..., 3:] * a[:, :3]).sum(),
                 sum((t * a).sum() for t in one.run_dual(*x, *x_t)),
                 sum((t[..., 3:] * a[..., 3:]).sum() for t in one.run_dual(*x, *x_t))):
        leaves = (*x, *x_t)
        for t in leaves:
            t.grad = None
        expected = grad(loss, leaves, retain_graph=True, materialize_grads=True)
        expected = [t.clone() for t in expected]
        loss.backward()
        given = [t for t in leaves if t.grad is not None]
        for t in given:
            before = [other.grad.clone() for other in given]
            t.grad.add_(1)
            for other, old in zip(given, before, strict=True):
                assert other is t or torch.equal(other.grad, old)
            t.grad.sub_(1)
        for t, e in zip(leaves, expected, strict=True):
            torch.testing.assert_close(torch.zeros_like(t) if t.grad is None else t.grad, e)


def test_cotangents_given_by_the_caller_stay_theirs(backend):
    """The sum passes its cotangent on; leaves copy it."""
    x, residual, weight, x_t = (t.requires_grad_() for t in (*case(backend, (2, 3)).inputs, randn(2, 3)))
    bars = randn(2, 2, 3).unbind()
    before = [bar.clone() for bar in bars]
    torch.autograd.backward(add_rms_norm(x, residual, weight, backend=backend)[1], bars[0])
    outputs = add_rms_norm_dual(x, residual, weight, x_t, None, backend=backend)
    for use in ((1,), (3,), (1, 3)):
        torch.autograd.backward([outputs[i] for i in use], bars[: len(use)], retain_graph=True)
        for t in (x, residual, weight, x_t):
            if t.grad is not None:
                t.grad.add_(1)
                t.grad = None
    assert all(map(torch.equal, bars, before))


def test_the_sum_is_kept_in_the_place_of_its_terms(backend):
    x, residual, weight = (t.requires_grad_() for t in case(backend, (2, 3)).inputs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, s = add_rms_norm(x, residual, weight, backend=backend)
    assert [t.data_ptr() for t in kept if t.shape == s.shape] == [s.data_ptr()]


def test_a_first_derivative_keeps_no_cotangent_of_the_sum(backend):
    x, residual, weight = (t.requires_grad_() for t in case(backend, (2, 3)).inputs)
    a, p = (randn(2, 3).requires_grad_() for _ in range(2))
    y, s = add_rms_norm(x, residual, weight, backend=backend)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grad((y, s), (x, weight), (a, p), create_graph=True)
    assert {t.data_ptr() for t in kept if t.shape == s.shape} == {s.data_ptr(), a.data_ptr()}


def test_primal_and_tangent_lie_together(backend):
    x, residual, x_t, residual_t = randn(4, 2, 3).unbind()
    for tangents in ((x_t, residual_t), (x_t, None), (None, residual_t)):
        _, s, _, s_t = add_rms_norm_dual(x, residual, randn(3), *tangents, backend=backend)
        assert s_t.data_ptr() == s.data_ptr() + s.nbytes


X, W = torch.ones(2, 3), torch.ones(3)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"residual": 1.0}, "residual", "a tensor", "float"),
    ({"residual": torch.ones(3)}, "residual", "the shape of x, [2, 3]", "[3]"),
    ({"residual": torch.ones(2, 4)}, "residual", "D=3", "[2, 4]"),
    ({"residual": X.double()}, "residual", "the dtype of x, float32", "float64"),
    ({"weight": torch.ones(4)}, "weight", "D=3", "[4]"),
    ({"eps": -1.0}, "eps", ">= 0", "-1.0")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"x": X, "residual": X, "weight": W, **arguments}
    for op, dual in ((add_rms_norm, add_rms_norm_dual), (add_layer_norm, add_layer_norm_dual)):
        refused(lambda op=op: op(**arguments), op.__name__, argument, expected, got)
        refused(lambda dual=dual: dual(**arguments, x_t=None, residual_t=None), dual.__name__, argument, expected, got)


@pytest.mark.parametrize("name", ["x_t", "residual_t"])
def test_bad_tangents(name):
    tangents = {"x_t": None, "residual_t": None, name: torch.ones(3)}
    for dual in (add_rms_norm_dual, add_layer_norm_dual):
        refused(lambda dual=dual: dual(X, X, W, **tangents), dual.__name__, name, "[2, 3]", "[3]")
