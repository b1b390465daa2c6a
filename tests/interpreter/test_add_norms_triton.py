"""Norms of a sum by the Triton kernels, in the interpreter; see also test_layer_norm_triton.py."""

from dataclasses import replace

import pytest
import torch
from second_order import (
    CHECKS,
    assert_close,
    check_dual_once,
    check_layouts,
    check_precision,
    check_values,
    every_check,
)
from test_add_norms import (  # noqa: F401 - run here too
    case,
    every_norm,
    test_a_first_derivative_keeps_no_cotangent_of_the_sum,
    test_absent_cotangents_of_the_dual_form,
    test_absent_cotangents_reach_the_kernels_as_none,
    test_cotangents_given_by_the_caller_stay_theirs,
    test_empty,
    test_forward_mode_along_a_cotangent_of_the_sum,
    test_gradients_of_the_terms_share_no_memory,
    test_one_output_alone,
    test_primal_and_tangent_lie_together,
    test_the_sum_is_kept_in_the_place_of_its_terms,
    test_values_are_those_of_the_two_steps,
)
from test_layer_norm_triton import THOROUGH, tiled  # noqa: F401 - a fixture

from gradmem_kernels.rms_norm import add_rms_norm_dual
from gradmem_kernels.triton import norm
from gradmem_kernels.triton.norm import ONE_TILE, Tile, tile

OP = "layer_norm"
BACKENDS = ("triton",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@every_check([check for check in CHECKS if check not in THOROUGH], rms={"shape": (2, 3)})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@every_norm
@pytest.mark.parametrize("check", [check_values, check_dual_once])
def test_tiles(check, norm, tiled, backend):  # noqa: F811 - the fixture
    check(case(backend, (2, 3, 5), norm))


@pytest.mark.parametrize(("kernel", "width"), [(kernel, width) for kernel in ONE_TILE if "add" in kernel
                                               for width in (64, 8192, 10000)], ids=str)
def test_every_shipped_tile(kernel, width, backend, monkeypatch):
    """The tiles that a GPU gets, on rows of that width, for all of the kernels of that order."""
    monkeypatch.setattr(norm, "tile", lambda _, width: tile(kernel, width))
    check_dual_once(case(backend, (3, width), "layer"))


def test_layouts(tiled, backend):  # noqa: F811 - the fixture
    check_layouts(case(backend, (2, 2, 3), "layer"))


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision(dtype, norm, backend):
    check_precision(case(backend, (3, 5, 65), norm), dtype, only_rounds=False)


@pytest.mark.parametrize("present", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_absent_tangents(present, backend):
    """Of x, the residual and the weight; a sum without tangent has one of zeros."""
    one = case(backend, (3, 4))
    u = [torch.randn_like(t) if flag else None for t, flag in zip(one.inputs, present, strict=True)]
    x, residual, weight = one.inputs
    kernels = {"residual": residual, "residual_t": u[1]}
    (y, s), (y_t, s_t), _ = norm.operators.dual_forward((x, weight, None), (u[0], u[2], None), **kernels, eps=1e-5,
                                              centred=False)
    zeros = tuple(torch.zeros_like(t) if d is None else d for t, d in zip(one.inputs, u, strict=True))
    expected = torch.func.jvp(one.run_plain, one.inputs, zeros)
    assert_close({"y and s": torch.cat((y, s), -1), "tangents": torch.cat((y_t, s_t), -1)},
                 dict(zip(("y and s", "tangents"), expected, strict=True)))


def test_terms_that_need_no_copy(backend, monkeypatch):
    """Terms that lie differently in memory are read where they are."""
    monkeypatch.setattr(norm, "tile", lambda kernel, width: Tile(2, 2, 4))
    one, (many, more) = case(backend, (2, 2, 3)), (torch.randn(2, n, 3, dtype=torch.float64) for n in (4, 5))
    moved = replace(one, inputs=(many[:, 1:3], more[:, :2], *one.inputs[2:]))
    contiguous = torch.Tensor.contiguous

    def only_dense(t, **named):
        return contiguous(t, **named) if t.dim() == 1 or t.is_contiguous() else pytest.fail("copied")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", only_dense)
        x, residual, weight = moved.inputs
        add_rms_norm_dual(x, residual, weight, residual, x, backend=backend)
    check_values(moved)


@pytest.mark.parametrize("order", ["forward", "dual_forward", "backward", "dual_backward"])
def test_opcheck(order):
    x, r, x_t, r_t, a, b, g, h = torch.randn(8, 2, 3).unbind(0)
    w, rstd, dual = torch.randn(3), torch.rand(2, 1), order.startswith("dual")
    if order.endswith("forward"):
        arguments = (x, w, None, x_t if dual else None, None, None, r, r_t if dual else None, 1e-5, False)
        torch.library.opcheck(torch.ops.gradmem.triton_norm_forward.default, arguments)
        return
    torch.library.opcheck(
        torch.ops.gradmem.triton_norm_backward.default,
        (x, w, x_t if dual else None, None, None, rstd, None, a if dual else None, b, g if dual else None, h,
         [dual, True], False, [dual, False, not dual, False]))
