"""The Triton rotary kernel against float64 formulas, in the interpreter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from second_order import (
    CHECKS,
    check_dual_once,
    check_gradcheck,
    check_last_derivative,
    check_layouts,
    check_needs,
    check_precision,
    check_values,
    every_check,
)
from test_rotary import (  # noqa: F401 - run here too
    case,
    plain,
    test_empty,
    test_every_order,
    test_scores_depend_on_distance_only,
)

from gradmem_kernels import backend as backends
from gradmem_kernels.backend import BackendError
from gradmem_kernels.rotary import rotary, rotary_tables
from gradmem_kernels.triton import rotary as launched

OP = "rotary"
BACKENDS = ("triton",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_the_interpreter_runs_it():
    assert backends.select(OP, None).__name__ == "gradmem_kernels.triton.rotary"


@every_check(
    # the op is linear in its only input: derivatives of every order exist
    checks=[check for check in CHECKS if check not in (check_last_derivative, check_needs, check_gradcheck)],
    partial={"batch": 1, "heads": 2, "length": 2, "d": 3, "rotated": 2},
    tables_per_sample={"batch": 2, "heads": 1, "length": 2, "d": 2, "rotated": 2, "tables_per_sample": True})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


def test_gradcheck(backend):
    check_gradcheck(case(backend, 1, 1, 2, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision(dtype, backend):
    check_precision(case(backend, 2, 3, 9, 24, 16, tables_per_sample=True), dtype)


def test_float32_tables_beside_half_precision(backend):
    cos, sin = rotary_tables(torch.arange(100, 120), 8)
    x = torch.randn(2, 3, 20, 8).half()
    actual = rotary(x, cos, sin, backend=backend)
    assert torch.equal(actual, plain(x.float(), cos, sin).half())


@pytest.mark.parametrize(("pairs", "heads"), [(4, 2), (64, 3)], ids=str)
def test_several_blocks_and_groups_of_heads(pairs, heads, backend, monkeypatch):
    monkeypatch.setattr(launched, "PAIRS", pairs)
    monkeypatch.setattr(launched, "HEADS", heads)
    for check in (check_values, check_layouts):
        check(case(backend, 2, 5, 3, 9, 6, tables_per_sample=True))


@given(sizes=st.tuples(*(st.integers(0, 4) for _ in range(3))), half=st.integers(0, 4), rest=st.integers(0, 5),
       tables_per_sample=st.booleans(), order=st.permutations(range(4)))
@settings(max_examples=15)
def test_any_shape(backend, sizes, half, rest, tables_per_sample, order):
    """Any shape, with dimensions in any order in memory."""
    one = case(backend, *sizes, 2 * half + rest, 2 * half, tables_per_sample)
    moved = one.inputs[0].permute(order).contiguous().permute([order.index(d) for d in range(4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launched, "PAIRS", 8)
        patch.setattr(launched, "HEADS", 2)
        check_dual_once(replace(one, inputs=(moved,)))


def test_heads_inside_rows_stay_there(backend):
    """The layout of projections, ``[B, S, H, d]`` in memory, is read and kept without a copy."""
    x = torch.randn(2, 3, 2, 4).transpose(1, 2)
    cos, sin = rotary_tables(torch.arange(3), 4)
    y = rotary(x, cos, sin, backend=backend)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, plain(x, cos, sin))


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 1), (2, None)], ids=str)
@pytest.mark.parametrize("tables_per_sample", [False, True])
def test_mapped_tables(in_dims, tables_per_sample, backend):
    """Under vmap tables may be mapped over, be they for all samples or for each."""
    of_x, of_tables = in_dims
    x = torch.randn(2, 3, 4, 6) if of_x is None else torch.randn(5, 2, 3, 4, 6).movedim(0, of_x)
    sizes = (2, 4) if tables_per_sample else (4,)
    positions = torch.randint(0, 50, sizes if of_tables is None else (5, *sizes))
    tables = [t if of_tables is None else t.movedim(0, of_tables) for t in rotary_tables(positions, 4)]
    actual, expected = (torch.func.vmap(f, (of_x, of_tables, of_tables))(x, *tables)
                        for f in (lambda *x: rotary(*x, backend=backend), plain))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    """Schema, fake kernel and dispatch of the operator are right."""
    x, tables = torch.randn(2, 3, 2, 5), torch.randn(2, 3, 2)
    torch.library.opcheck(torch.ops.gradmem.triton_rotary.default, (x.transpose(1, 2), *tables.unbind(0), transposed))


def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(BackendError, match="interpreter is wrong for bfloat16"):
        rotary(torch.ones(1, 1, 1, 2).bfloat16(), torch.ones(1, 1), torch.ones(1, 1), backend="triton")
