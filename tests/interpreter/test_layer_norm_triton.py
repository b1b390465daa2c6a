"""The Triton kernels of norms against float64 formulas, in the interpreter, as layer_norm uses them."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from second_order import (
    CHECKS,
    assert_close,
    check_dual_gradcheck,
    check_dual_once,
    check_gradcheck,
    check_layouts,
    check_precision,
    check_transforms,
    check_values,
    derivatives,
    every_check,
    random_like,
)
from test_layer_norm import (  # noqa: F401 - run here too
    case,
    test_a_large_mean_costs_no_precision,
    test_constant_rows,
    test_empty,
    test_vector,
)

from gradmem_kernels import backend as backends
from gradmem_kernels.layer_norm import layer_norm_dual
from gradmem_kernels.triton import norm
from gradmem_kernels.triton.norm import ONE_TILE, Tile, tile

OP = "layer_norm"
BACKENDS = ("triton",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
THOROUGH = (check_gradcheck, check_dual_gradcheck, check_transforms)
#: Rows and columns of a tile: a part of a row, a row, several.
TILES = {"columns": Tile(1, 2, 4), "row": Tile(1, 8, 4), "rows": Tile(2, 8, 4)}


@pytest.fixture(params=TILES)
def tiled(request, monkeypatch):
    """Every kernel with this tile, two programs for the sums over rows."""
    monkeypatch.setattr(norm, "tile", lambda kernel, width: TILES[request.param])
    return TILES[request.param]


def test_the_interpreter_runs_them():
    assert backends.select(OP, None).__name__ == "gradmem_kernels.triton.layer_norm"


@every_check(THOROUGH, one_row={"shape": (1, 2)})
def test_thorough(check, options, backend):
    check(case(backend, **options))


@every_check([check for check in CHECKS if check not in THOROUGH],
             no_bias={"shape": (2, 3), "bias": False, "eps": 0.5}, width_1={"shape": (3, 1), "eps": 0.3})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@every_check((check_values, check_dual_once), bias={"shape": (2, 3, 5)})
def test_tiles(check, options, tiled, backend):
    check(case(backend, **options))


def test_a_weight_s_tangents(tiled, backend):
    """Tangents of weight and bias, which the public dual op does not take, and the cotangents of these tangents."""
    one = case(backend, (5, 5))
    x, u, (a, b) = one.inputs, tuple(map(random_like, one.inputs)), torch.randn(2, 5, 5, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (*x, *u)]
    outputs = torch.func.jvp(one.plain, tuple(leaves[:3]), tuple(leaves[3:]))
    expected = torch.autograd.grad(outputs, leaves, (a, b))
    (y,), (y_t,), saved = norm.operators.dual_forward(x, u, None, None, eps=1e-5, centred=True)
    x_bar, x_t_bar = norm.operators.dual_backward(x, u, saved, (a,), (b,), (True,) * 3, (True,) * 3)
    names = ("y", "y_t", "dx", "dw", "dc", "dx_t", "dw_t", "dc_t")
    assert_close(dict(zip(names, (y, y_t, *x_bar, *x_t_bar), strict=True)),
                 dict(zip(names, (*(t.detach() for t in outputs), *expected), strict=True)))


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=3)), ids=str)
def test_absent_tangents(present, backend):
    """Every choice of the tangents of x, weight and bias, with and without the output's cotangent."""
    one = case(backend, (3, 4))
    x, every = one.inputs, (True,) * 3
    u = tuple(random_like(t) if flag else None for t, flag in zip(x, present, strict=True))
    bars = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    for a, b in (bars, (None, bars[1]), (bars[0], None)):
        results = []
        for name in ("triton", "reference"):
            kernels = backends.select(OP, name)
            tangents = kernels.dual_forward(x, (), u, eps=1e-5)[1] if any(present) else ()
            _, saved = kernels.forward(x, (), eps=1e-5)
            x_bar, x_t_bar = kernels.dual_backward(x, (), u, (None,), (None,), saved, (a,), (b,), every, every,
                                                   eps=1e-5)
            results.append({str(i): t for i, t in enumerate((*tangents, *x_bar, *x_t_bar))})
        assert_close(*results)


def test_saved_rows_serve_the_reference(backend):
    x, options = case(backend, (2, 3, 4)).inputs, {"eps": 1e-5}
    saved = [backends.select(OP, name).forward(x, (), **options)[1] for name in ("triton", "reference")]
    assert_close(*(dict(zip(("rstd", "mean"), rows, strict=True)) for rows in saved))


@pytest.mark.parametrize("width", [300, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision(dtype, width, backend):
    check_precision(case(backend, (3, 5, width)), dtype)


@pytest.mark.parametrize(("kernel", "width"), [(kernel, width) for kernel in ONE_TILE if "add" not in kernel
                                               for width in (64, 16384, 20000)], ids=str)
def test_every_shipped_tile(kernel, width, backend, monkeypatch):
    """The tiles that a GPU gets, on rows of that width, for all of the kernels of that order."""
    monkeypatch.setattr(norm, "tile", lambda _, width: tile(kernel, width))
    check_dual_once(case(backend, (3, width)))


def test_rows_that_need_no_copy(backend, monkeypatch):
    """A slice of each sample, a part of each row, and heads inside rows are read where they are."""
    monkeypatch.setattr(norm, "tile", lambda kernel, width: Tile(2, 2, 4))
    many = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    for x in (many[:, 1:3], many[..., 2:4], many.transpose(1, 2)[0]):
        one = case(backend, x.shape)
        moved = replace(one, inputs=(x, *one.inputs[1:]))
        with monkeypatch.context() as patch:
            contiguous = torch.Tensor.contiguous

            def only_weights(t, contiguous=contiguous, **named):
                return contiguous(t, **named) if t.dim() == 1 or t.is_contiguous() else pytest.fail("copied")

            patch.setattr(torch.Tensor, "contiguous", only_weights)
            check_values(moved)


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 1, 2, 3), (4, 1), (3,)], ids=str)
def test_layouts(shape, tiled, backend):
    check_layouts(case(backend, shape))


@given(lead=st.lists(st.integers(0, 3), max_size=3), width=st.integers(0, 9), bias=st.booleans(), dual=st.booleans(),
       shape_of_tile=st.sampled_from([(1, 2), (1, 16), (2, 4), (4, 16)]), order=st.permutations(range(4)))
@settings(max_examples=15)
def test_any_shape(backend, lead, width, bias, dual, shape_of_tile, order):
    """Any shape, with dimensions in any order in memory, cut into tiles anyhow."""
    one, order = case(backend, (*lead, width), bias), [d for d in order if d <= len(lead)]
    moved = one.inputs[0].permute(order).contiguous().permute([order.index(d) for d in range(len(order))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "tile", lambda kernel, width: Tile(*shape_of_tile, 4))
        (check_dual_once if dual else check_values)(replace(one, inputs=(moved, *one.inputs[1:])))


def test_rows_independent_of_the_batch(backend):
    """A row's bits are the same alone and among others; those of sums over rows need not be."""
    many = case(backend, (7, 6))
    a, u = many.cotangent(), tuple(map(random_like, many.inputs))
    together = derivatives(many.run_op, many.inputs, a, u).named()
    for i in range(7):
        rows = slice(i, i + 1)
        alone = derivatives(many.run_op, (many.inputs[0][rows], *many.inputs[1:]), a[rows], (u[0][rows], *u[1:]))
        for name, t in alone.named().items():
            assert t.shape != a[rows].shape or torch.equal(t, together[name][rows])


def test_primal_and_tangent_are_halves_of_one_allocation():
    x, x_t, weight, bias = (torch.randn(shape).requires_grad_() for shape in ((2, 3), (2, 3), (3,), (3,)))
    y, y_t = layer_norm_dual(x, weight, x_t, bias=bias)
    for primal, tangent in ((y, y_t), torch.autograd.grad((y, y_t), (x, x_t), (y.detach(), y_t.detach()))):
        assert tangent.data_ptr() == primal.data_ptr() + primal.nbytes
        assert primal.untyped_storage().nbytes() == 2 * primal.nbytes


def test_weight_gradients_are_tensors_of_their_own(backend):
    one = case(backend, (2, 3))
    x = [t.requires_grad_() for t in one.inputs]
    for g in torch.autograd.grad(one.run_op(*x).sum(), x):
        assert not g._is_view()
        assert g.untyped_storage().nbytes() == g.nbytes


def test_tiles_are_what_a_launch_can_have():
    for kernel, width in itertools.product(ONE_TILE, (0, 1, 5, 64, 4096, 5120, 16384, 16385, 10**6)):
        of = tile(kernel, width)
        assert of.block & (of.block - 1) == 0
        assert of.rows & (of.rows - 1) == 0
        assert 4 <= of.warps <= 32
        assert of.rows * of.block <= 16 * 32 * of.warps


@pytest.mark.parametrize("order", ["forward", "dual_forward", "backward", "dual_backward", "double_backward"])
def test_opcheck(order):
    """Schema, fake kernels and dispatch of the operators are right."""
    (x, x_t, a, b), (w, w_t, c, c_t) = torch.randn(4, 2, 3).unbind(0), torch.randn(4, 3).unbind(0)
    if order.endswith("forward"):
        tangents = (x_t, w_t, None) if order == "dual_forward" else (None,) * 3
        torch.library.opcheck(torch.ops.gradmem.triton_norm_forward.default,
                              (x, w, c, *tangents, None, None, 1e-5, True))
        return
    rstd, mean = torch.rand(2, 2, 1).unbind(0)
    dual = order != "backward"
    torch.library.opcheck(
        torch.ops.gradmem.triton_norm_backward.default,
        (x, w, *((x_t, w_t, c_t) if dual else (None,) * 3), rstd, mean, a if order == "dual_backward" else None, b,
         None, None, [dual, order == "dual_backward"], order == "double_backward", [dual, dual, not dual, not dual]))
