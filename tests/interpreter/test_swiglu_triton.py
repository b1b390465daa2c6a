"""The Triton kernels of gated activations against float64 formulas, in the interpreter, as swiglu uses them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from second_order import (
    assert_close,
    check_determinism,
    check_dual_once,
    check_layouts,
    check_precision,
    check_values,
    every_check,
    random_like,
)
from test_swiglu import case, test_empty, test_far_from_zero  # noqa: F401 - run here too

from gradmem_kernels import backend as backends
from gradmem_kernels.backend import BackendError
from gradmem_kernels.swiglu import swiglu, swiglu_dual
from gradmem_kernels.triton import activation

OP = "swiglu"
BACKENDS = ("triton",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_the_interpreter_runs_them():
    assert backends.select(OP, None).__name__ == "gradmem_kernels.triton.swiglu"


@every_check(two={"shape": (2, 1)})
def test_guarantees(check, options, backend):
    check(case(backend, *options["shape"]))


@every_check((check_values, check_dual_once, check_determinism), tiles={"shape": (3, 700)},
             one_tile={"shape": (8, 128)})
def test_several_programs(check, options, backend):
    check(case(backend, *options["shape"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision(dtype, backend):
    check_precision(case(backend, 33, 65), dtype)


def test_halves_of_one_projection_are_not_copied(backend, monkeypatch):
    """Rows at a stride of their own, in several programs each, are read where they are."""
    monkeypatch.setattr(activation, "BLOCK", 4)
    both = torch.randn(2, 2, 12, dtype=torch.float64)
    halves = replace(case(backend, 1), inputs=both.chunk(2, -1))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, **_: pytest.fail("copied"))
    check_values(halves)
    check_dual_once(halves)


@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 3), (4, 1), (1, 4), (5,)], ids=str)
def test_layouts(shape, backend, monkeypatch):
    monkeypatch.setattr(activation, "BLOCK", 2)
    check_layouts(case(backend, *shape))


@given(shape=st.lists(st.integers(0, 4), max_size=3), block=st.sampled_from([1, 2, 16]),
       order=st.permutations(range(3)), dual=st.booleans())
@settings(max_examples=15)
def test_any_shape(backend, shape, block, order, dual):
    """Any shape (a scalar too), with dimensions in any order in memory, cut into tiles anyhow."""
    one, order = case(backend, *shape), [d for d in order if d < len(shape)]
    moved = [t.permute(order).contiguous().permute([order.index(d) for d in range(len(order))]) for t in one.inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "BLOCK", block)
        (check_dual_once if dual else check_values)(replace(one, inputs=tuple(moved)))


def test_primal_and_tangent_are_halves_of_one_allocation():
    gate, up, *x_t = (random_like(torch.empty(2, 3)).requires_grad_() for _ in range(4))
    y, y_t = swiglu_dual(gate, up, *x_t)
    grads = torch.autograd.grad((y, y_t), (gate, x_t[0], up, x_t[1]), (y.detach(), y_t.detach()))
    for primal, tangent in ((y, y_t), grads[:2], grads[2:]):
        assert tangent.data_ptr() == primal.data_ptr() + primal.nbytes
        assert primal.untyped_storage().nbytes() == 2 * primal.nbytes
    alone = swiglu(gate, up)
    assert not alone._is_view()
    alone += 1  # what users do to a result that is theirs


def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(BackendError, match="interpreter is wrong for bfloat16"):
        swiglu(torch.ones(2).bfloat16(), torch.ones(2).bfloat16(), backend="triton")


def test_one_of_the_tangents_under_vmap(backend):
    """Neither tangent nor cotangent need be mapped over."""
    one = case(backend, 2, 3)
    gate, up = one.inputs
    tangents = torch.randn(3, 4, 2, dtype=torch.float64)
    actual, expected = (torch.func.vmap(lambda t, f=f: f(gate, up, t, None)[1], in_dims=1, out_dims=2)(
        tangents.transpose(0, 2)) for f in (one.run_dual, one.run_plain_dual))
    assert_close({"y_t": actual}, {"y_t": expected})


@pytest.mark.parametrize("order", ["forward", "dual_forward", "backward", "dual_backward", "double_backward"])
def test_opcheck(order):
    """Schema, fake kernels and dispatch of the operators are right."""
    gate, up, gate_t, up_t, a, b = torch.randn(6, 2, 3).unbind(0)
    if order.endswith("forward"):
        tangents = (gate_t, None) if order == "dual_forward" else (None, None)
        torch.library.opcheck(torch.ops.gradmem.triton_activation_forward.default, (gate, up, *tangents, "silu"))
        return
    dual = order != "backward"
    torch.library.opcheck(
        torch.ops.gradmem.triton_activation_backward.default,
        (gate, up, *((gate_t, up_t) if dual else (None, None)), a if order == "dual_backward" else None, b,
         [dual, dual], [order != "double_backward", False], order == "double_backward", "silu"))
