"""The autograd functions made from four kernels, on an op that exists only here, and what torch does around them."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
from second_order import Case, assert_close, every_check, randn, spy_kernels
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from gradmem_kernels import backend as backends
from gradmem_kernels.attention import attention
from gradmem_kernels.autograd import Op
from gradmem_kernels.derivatives import HigherOrderError, last_derivative
from gradmem_kernels.linear_op import LinearOp
from gradmem_kernels.rms_norm import rms_norm, rms_norm_dual
from gradmem_kernels.swiglu import swiglu

OP = "toy"
TOY = Op(OP, x=("x", "w", "bias"), aux=("index",), y=("y", "z"))
INDEX = torch.tensor([2, 0, 2])


def formula(x, aux, power):
    """Two outputs, an input that may be absent, an integer tensor beside them."""
    (x, w, bias), (index,) = x, aux
    y = x.sin() * w if bias is None else x.sin() * w + bias**2
    return y, (x**power * w).index_select(-1, index)


class FormulaKernels:
    """The four kernels of the formula, right by construction."""

    @staticmethod
    def forward(x, aux, **options):
        assert not torch.is_grad_enabled()
        return formula(x, aux, **options), (x[0].cos(),)

    @staticmethod
    def backward(x, aux, y, saved, y_bar, needs, **options):
        assert not torch.is_grad_enabled()
        given, f = _of_given(_with_saved(x, saved), aux, options)
        y, pull = torch.func.vjp(f, *given)
        return _needed(pull(_or_zeros(y_bar, y)), x, needs)

    @staticmethod
    def dual_forward(x, aux, x_t, **options):
        assert not torch.is_grad_enabled()
        assert any(t is not None for t in x_t)
        given, f = _of_given(x, aux, options)
        y, y_t = _derivative(f, given, _or_zeros(_present(x_t, x), given))
        return y, y_t, (x[0].cos(),)

    @staticmethod
    def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, **options):
        assert not torch.is_grad_enabled()
        given, f = _of_given(_with_saved(x, saved), aux, options)
        (y, y_t), pull = torch.func.vjp(lambda x, x_t: _derivative(f, x, x_t), given,
                                        _or_zeros(_present(x_t, x), given))
        x_bar, x_t_bar = pull((_or_zeros(y_bar, y), _or_zeros(y_t_bar, y_t)))
        return _needed(x_bar, x, needs), _needed(x_t_bar, x, needs_t)


class FusedFormulaKernels(FormulaKernels):
    """With the optional kernel for the double backward; its forward saves other tensors than its dual forward."""

    @staticmethod
    def dual_forward(x, aux, x_t, **options):
        y, y_t, saved = FormulaKernels.dual_forward(x, aux, x_t, **options)
        return y, y_t, (*saved, x[0].sin())

    @staticmethod
    def double_backward(x, aux, x_t, y, saved, y_bar, needs, **options):
        assert not torch.is_grad_enabled()
        assert len(saved) == 1
        given, f = _of_given(_with_saved(x, saved), aux, options)
        tangents = _or_zeros(_present(x_t, x), given)
        (y, y_t), pull = torch.func.vjp(lambda *given: _derivative(f, given, tangents), *given)
        return _needed(pull((tuple(map(torch.zeros_like, y)), _or_zeros(y_bar, y))), x, needs), y_t


def _derivative(f, x, x_t):
    """``f(x)`` and its tangent, by reverse mode twice: forward mode does not nest in forward mode."""
    y, pull = torch.func.vjp(f, *x)
    _, pull_again = torch.func.vjp(pull, tuple(map(torch.zeros_like, y)))
    return y, pull_again(x_t)[0]


def _with_saved(x, saved):
    """``x``, shifted unless the forward's saved tensor is what came back."""
    return x[0] + (saved[0] - x[0].cos()), *x[1:]


def _of_given(x, aux, options):
    def f(*given):
        rest = iter(given)
        return formula(tuple(None if t is None else next(rest) for t in x), aux, **options)

    return _present(x, x), f


def _present(values, x):
    return tuple(value for value, t in zip(values, x, strict=True) if t is not None)


def _or_zeros(tensors, like):
    return tuple(torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True))


def _needed(bars, x, needs):
    rest = iter(bars)
    bars = [None if t is None else next(rest) for t in x]
    return tuple(bar if need else None for bar, need in zip(bars, needs, strict=True))


@pytest.fixture(autouse=True)
def kernels(request, monkeypatch):
    monkeypatch.setitem(backends._loaded, ("reference", OP), getattr(request, "param", FormulaKernels))


either_double_backward = pytest.mark.parametrize("kernels", [FormulaKernels, FusedFormulaKernels], indirect=True)


def toy(x, w, bias=None):
    return TOY(backends.select(OP, "reference"), (x, w, bias), (INDEX,), power=3)


def toy_dual(x, w, bias, x_t):
    y, y_t = TOY.dual(backends.select(OP, "reference"), (x, w, bias), (x_t, None, None), (INDEX,), power=3)
    return y, y_t


def case(outputs=(True, True), bias=True):
    """The toy op, of which these outputs are used."""

    def used(y):
        return torch.cat([t for t, flag in zip(y, outputs, strict=True) if flag], -1)

    inputs = randn(2, 3), randn(3), randn(3)
    return Case(
        OP, inputs=inputs if bias else inputs[:2], active=(0,), batched=(True, False, False)[: 2 + bias],
        plain=lambda x, w, b=None: used(formula((x, w, b), (INDEX,), 3)), op=lambda *x: used(toy(*x)),
        dual=lambda *x: tuple(map(used, toy_dual(*(x if bias else (*x[:2], None, x[2]))))))


@either_double_backward
@every_check(both={}, first={"outputs": (True, False)}, second={"outputs": (False, True)}, without_bias={"bias": False})
def test_guarantees(check, options, kernels):
    check(case(**options))


@either_double_backward
@pytest.mark.parametrize("used", [0, 1])
def test_unused_outputs_have_no_cotangent(used, kernels):
    """Neither in the first backward pass, nor in the second, nor in the dual form's."""
    x, w, u = randn(2, 3).requires_grad_(), randn(3).requires_grad_(), randn(2, 3)
    present = [i == used for i in range(2)]

    def given(call, name):
        return [t is not None for t in call.arguments[name]]

    with spy_kernels() as calls:
        y = toy(x, w)[used]
        (first,) = grad(y.sum(), x, create_graph=True)
        grad((first * u).sum(), (x, w))
        _, y_t = toy_dual(x, w, None, u)
        grad(y_t[used].sum(), (x, w))
    backward, second, dual = (call for call in calls if "backward" in call.kernel)
    assert given(backward, "y_bar") == present
    if second.kernel == "double_backward":  # its only cotangent is the first backward's
        assert given(second, "y_bar") == present
    else:
        assert given(second, "y_bar") == [False, False]
        assert given(second, "y_t_bar") == present
    assert given(dual, "y_bar") == [False, False]
    assert given(dual, "y_t_bar") == present
    assert given(second, "x_t") == given(dual, "x_t") == [True, False, False]


@pytest.mark.parametrize(("kernels", "expected"), [
    (FormulaKernels, ["dual_forward", "dual_backward"]), (FusedFormulaKernels, ["double_backward"])],
    indirect=["kernels"])
def test_kernels_of_the_double_backward(kernels, expected):
    x, w = randn(2, 3).requires_grad_(), randn(3)
    with spy_kernels() as calls:
        (first,) = grad(toy(x, w)[0].sum(), x, create_graph=True)
        del calls[:]
        grad(first.sum(), x)
    assert [call.kernel for call in calls] == expected


def test_needs_of_intermediate_tensors():
    """A weight made by other operations gets its gradient when it, or what it was made of, is asked for."""
    base, x = randn(3).requires_grad_(), randn(2, 3).requires_grad_()
    for ask, wanted in (((x,), (True, False, False)), ((base,), (False, True, False)), ("w", (False, True, False)),
                        (None, (True, True, False))):
        w = base.exp()
        with spy_kernels() as calls:
            y, _ = toy(x, w)
            if ask is None:
                y.sum().backward()
            else:
                gradients = grad(y.sum(), (w,) if ask == "w" else ask)
                assert all(torch.count_nonzero(g) == g.numel() for g in gradients)
        assert calls.needs_of(["backward"], 3) == [{"needs": wanted}]
    assert_close({"x": x.grad, "base": base.grad}, {"x": base.exp() * x.detach().cos(),
                                                    "base": x.detach().sin().sum(0) * base.detach().exp()})


def test_backward_into_chosen_leaves():
    x, w = randn(2, 3).requires_grad_(), randn(3).requires_grad_()
    with spy_kernels() as calls:
        toy(x, w)[0].sum().backward(inputs=[w])
    assert calls.needs_of(["backward"], 3) == [{"needs": (False, True, False)}]
    assert x.grad is None
    assert_close({"w": w.grad}, {"w": x.detach().sin().sum(0)})


def test_forward_mode_over_forward_mode_raises():
    x, w, u = randn(2, 3), randn(3), randn(2, 3)

    def slope(x):
        return torch.func.jvp(lambda x: toy(x, w)[0], (x,), (u,))[1]

    with pytest.raises(HigherOrderError, match=r"^toy_dual, forward mode over forward mode: "):
        torch.func.jvp(slope, (x,), (u,))


def test_higher_order_error_says_what_to_do():
    x = randn(2).requires_grad_()

    def f(x):
        return last_derivative("thing", lambda x: (x.exp(),), x)[0]

    for derivative in (lambda: grad(f(x).sum(), x), lambda: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(HigherOrderError, match=r"^thing: .* differentiable twice, .* or detach"):
            derivative()


@pytest.mark.parametrize("keeps_x", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("keeps_y", [True, False])
def test_only_what_is_kept_stays_alive(keeps_x, keeps_y):
    class Kernels:
        @staticmethod
        def forward(x, aux, **options):
            return (x[0] * 2, x[0] * 3), (x[0] * 4,)

        @staticmethod
        def backward(x, aux, y, saved, y_bar, needs, **options):
            assert tuple(t is not None for t in x) == keeps_x
            assert all((t is not None) == keeps_y for t in (*y,))
            assert saved[0] is not None
            return tuple(torch.zeros(2, 3) if need else None for need in needs)

    op = Op("keeper", x=("x", "w", "bias"), y=("y", "z"), keeps_x=lambda x, options: keeps_x, keeps_y=keeps_y)
    leaves = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    x = [t * 1 for t in leaves]
    y, z = op(Kernels, tuple(x))
    dead = [weakref.ref(t.untyped_storage()) for t in (*x, z)]
    loss = y.sum()
    del x, y, z
    assert tuple(ref() is not None for ref in dead) == (*keeps_x, keeps_y)
    grad(loss, leaves)


def test_graphs_are_freed_without_the_garbage_collector():
    x, w = randn(2, 3).requires_grad_(), randn(3).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        y, z = toy(x, w)
        (first,) = grad(y.sum() + z.sum(), x, create_graph=True)
        _, y_t = toy_dual(x, w, None, first)
        alive = [weakref.ref(t.grad_fn) for t in (y, first, y_t[0])]
        del y, z, first, y_t, _
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_calls_inspect_no_signature(monkeypatch):
    """PyTorch's own apply does, which takes longer than a small kernel."""
    x, w, turn = randn(2, 8).requires_grad_(), randn(8).requires_grad_(), LinearOp("turn")

    def calls():
        (x_bar,) = grad(rms_norm(x, w).square().sum(), x, create_graph=True)
        grad(x_bar.square().sum(), (x, w))
        y, y_t = rms_norm_dual(x, w, randn(2, 8))
        grad((y * y_t).sum(), (x, w))
        (x_bar,) = grad(turn(torch.mul, torch.mul, x, x.detach()).square().sum(), x, create_graph=True)
        grad(x_bar.sum(), x)

    calls()  # kernels are loaded, which may inspect them
    for name in ("signature", "_signature_from_callable"):
        monkeypatch.setattr(inspect, name, lambda *_, **__: pytest.fail("a signature was inspected"))
    calls()


def test_what_a_transform_left_behind_is_a_plain_tensor():
    kept = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(x := randn(2, 8))
    assert torch.equal(rms_norm(kept[0], x[0]), rms_norm(x, x[0]))


def test_checkpointing_recomputes_the_op():
    x, w = randn(2, 3).requires_grad_(), randn(3).requires_grad_()
    expected = grad(toy(x, w)[0].sum(), (x, w))
    with spy_kernels() as calls:
        y, _ = checkpoint(toy, x, w, use_reentrant=False)
        actual = grad(y.sum(), (x, w))
    assert [call.kernel for call in calls] == ["forward", "forward", "backward"]
    assert all(map(torch.equal, actual, expected))


def test_compiled_functions_get_first_order_gradients():
    """Dynamo leaves the ops alone and compiles what is around them."""

    def block(x, weight, up):
        normed = rms_norm(x * 2, weight)
        mixed = attention(normed, normed.sin(), normed, causal=True)
        return (swiglu(mixed, up) ** 2).sum()

    tensors = [t.requires_grad_() for t in (randn(1, 2, 3, 4), randn(4), randn(1, 2, 3, 4))]
    expected = grad(block(*tensors), tensors)
    actual = grad(torch.compile(block, backend="aot_eager")(*tensors), tensors)
    assert_close({"x": actual[0], "weight": actual[1], "up": actual[2]},
                 {"x": expected[0], "weight": expected[1], "up": expected[2]})


def test_linear_op_has_derivatives_of_every_order():
    turn = LinearOp("turn")
    matrix = randn(3, 3)

    def f(x, matrix):
        return x @ matrix

    def transpose(x, matrix):
        return x @ matrix.mT

    def third(product, x):
        s = (product(x) ** 3).sum()
        for _ in range(3):
            (g,) = grad(s, x, create_graph=True)
            s = (g * torch.arange(1.0, 4.0)).sum()
        return g

    x, u = randn(2, 3).requires_grad_(), randn(2, 3)

    def turned(x):
        return turn(f, transpose, x, matrix)

    assert_close({"third": third(turned, x)}, {"third": third(lambda x: x @ matrix, x)})
    y, y_t = torch.func.jvp(turned, (x,), (u,))
    assert_close({"y": y, "y_t": y_t}, {"y": x @ matrix, "y_t": u @ matrix})


@pytest.mark.usefixtures("poisoned_memory")
def test_poisoned_memory_is_not_a_number():
    x = torch.ones(3)
    allocated = (torch.empty(3), torch.empty_like(x), torch.empty_strided((3,), (2,)), x.new_empty(3),
                 x.new_empty_strided((3,), (1,)))
    assert all(t.isnan().all() for t in allocated)
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
