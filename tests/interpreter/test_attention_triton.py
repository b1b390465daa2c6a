"""The Triton attention kernels against float64 formulas, in the interpreter: all options, tiles and orders."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from second_order import (
    CHECKS,
    assert_close,
    check_dual,
    check_dual_gradcheck,
    check_dual_once,
    check_empty,
    check_gradcheck,
    check_precision,
    check_transforms,
    check_values,
    derivatives,
    every_check,
    random_like,
)
from test_attention import (  # noqa: F401 - run here too
    CASES,
    calls,
    case,
    test_constant_rows_receive_zeros,
    test_hidden_contents_do_not_matter,
    test_keeps_no_matrix,
    test_kernels_take_any_two_ranges_of_rows,
    test_packed_under_vmap,
    test_queries_without_keys_give_zeros,
    test_scores_far_from_zero,
    test_tangent_rows_inside_grad_rows,
    test_tangents_outside_their_rows_are_not_read,
)

from gradmem_kernels import attention_dual
from gradmem_kernels import backend as backends
from gradmem_kernels.backend import BackendError
from gradmem_kernels.decoder.halves import join
from gradmem_kernels.triton import attention_configs as table
from gradmem_kernels.triton import common
from gradmem_kernels.triton.attention_configs import CONFIGS, KERNELS, Config, override

OP = "attention"
BACKENDS = ("triton",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
#: Together they have every option; checks that ask the kernels a hundred times run on these.
THOROUGH = {
    "window_softcap_bias_dropout": {"lengths": (2, 2), "d": 1, "window": 2, "softcap": 0.9, "bias": (1, 1, 2, 2),
                                    "dropout": 0.3, "dropout_seed": 3},
    "causal_grouped_few_queries": {"heads": (2, 1), "lengths": (1, 2), "d": 1, "causal": True}}
PACKED = {"lengths": (2, 2), "d": 1, "cu_seqlens": (0, 1, 2)}


#: Options of a call of the kernels themselves.
PLAIN = {"causal": True, "scale": 0.7, "window": None, "softcap": None, "dropout": 0.0, "seed": 0, "grad_rows": None,
         "tangent_rows": None}


def test_the_interpreter_runs_them():
    assert common.INTERPRETED
    assert backends.select(OP, "triton").__name__ == "gradmem_kernels.triton.attention"


@every_check((check_values, check_dual_once), **CASES)
def test_values(check, options, backend):
    check(case(backend, **options))


@every_check((check_dual, check_dual_gradcheck), **THOROUGH, packed=PACKED)
def test_thorough(check, options, backend):
    check(case(backend, **options))


# each takes half a minute: one that vmap folds into the batch, and one that it runs one by one
@every_check((check_gradcheck,), packed=PACKED)
def test_gradcheck(check, options, backend):
    check(case(backend, **options))


@every_check((check_transforms,), **THOROUGH)
def test_transforms(check, options, backend):
    check(case(backend, **options))


@every_check([check for check in CHECKS if check not in (check_values, check_dual, check_gradcheck,
                                                         check_dual_gradcheck, check_transforms)],
             causal_grouped={"heads": (2, 1), "lengths": (3, 3), "causal": True, "softcap": 0.8},
             padded={"batch": 2, "lengths": (3, 3), "seqlens": (3, 1), "window": 2, "bias": (2, 1, 3, 3)})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@every_check((check_values, check_dual_once),
             first={"lengths": (4, 4), "grad_rows": (0, 2)},
             all_features={"heads": (4, 2), "lengths": (4, 4), "grad_rows": (1, 3), "causal": True, "window": 3,
                           "softcap": 0.9, "bias": (1, 4, 4, 4), "dropout": 0.3, "dropout_seed": 3},
             across_tiles={"heads": (2, 1), "lengths": (70, 70), "grad_rows": (33, 40), "causal": True})
def test_constant_rows(check, options, backend):
    check(case(backend, **options))


@every_check((check_dual_once,),
             first={"heads": (2, 1), "lengths": (70, 70), "tangent_rows": (0, 5), "causal": True},
             middle={"lengths": (70, 70), "tangent_rows": (30, 36), "softcap": 0.9, "dropout": 0.3, "dropout_seed": 3})
def test_tangent_rows(check, options, backend):
    check(case(backend, **options))


@every_check((check_values, check_dual_once),
             causal={"heads": (2, 1), "lengths": (150, 150), "d": 20, "causal": True},
             few_queries={"lengths": (37, 100), "d": 16, "causal": True, "window": 40},
             many_queries={"lengths": (100, 37), "d": 40, "causal": True},
             window={"lengths": (100, 100), "d": 8, "window": 11},
             padded={"batch": 2, "lengths": (70, 70), "d": 8, "seqlens": (70, 33), "causal": True},
             packed={"lengths": (100, 110), "d": 8, "cu_seqlens": (0, 10, 10, 45, 96), "causal": True,
                     "cu_seqlens_k": (0, 20, 25, 55, 108), "mask": (1, 1, 1, 110)})
def test_across_tiles(check, options, backend):
    check(case(backend, **options))


@given(options=calls())
@settings(max_examples=4)
def test_any_call(backend, options):
    any_case = case(backend, **options)
    check_values(any_case)
    check_dual_once(any_case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("options", [
    {"heads": (4, 2), "lengths": (33, 33), "d": 16, "causal": True},
    {"lengths": (150, 150), "d": 24, "window": 100, "softcap": 2.0, "dropout": 0.2, "dropout_seed": 1}],
    ids=["causal", "long"])
def test_precision(options, dtype, backend):
    check_precision(case(backend, **options), dtype, only_rounds=False)


TILES = sorted({(kernel, config.own, config.other) for (kernel, *_), config in CONFIGS.items()})


@pytest.mark.parametrize(("kernel", "own", "other"), TILES, ids=str)
def test_every_shipped_tile(kernel, own, other, backend):
    """Tiles as large as those that run on a GPU, with and without the tangents' cotangents apart."""
    for apart in {False, kernel == "dual_backward_keys"}:
        with override(**{kernel: Config(own, other, 4, 1, apart)}):
            rows = min(140, 2 * max(own, other) + 12)
            tiled = case(backend, lengths=(rows, rows), d=8, causal=True)
            (check_dual_once if kernel.startswith("dual") else check_values)(tiled)


@pytest.mark.parametrize("options", [
    {"lengths": (40, 50), "d": 24, "causal": True},
    {"lengths": (40, 40), "d": 32, "tangent_rows": (0, 5), "grad_rows": (0, 9)}], ids=["ragged", "rows"])
def test_factors_read_by_columns(options, backend):
    with override(**{kernel: Config(32, 32, 4, 1, kernel == "dual_backward_keys", 16) for kernel in KERNELS}):
        by_columns = case(backend, **options)
        check_values(by_columns)
        check_dual_once(by_columns)


@pytest.mark.parametrize("options", [{"batch": 0}, {"lengths": (0, 3)}, {"lengths": (3, 0), "causal": True},
                                     {"lengths": (0, 0), "cu_seqlens": (0, 0)}], ids=str)
def test_empty(options, backend):
    check_empty(case(backend, **options))


@pytest.mark.parametrize("d", [16, 80, 256])
def test_head_dims(d, backend):
    check_values(case(backend, lengths=(5, 6), d=d))


def test_layouts_that_differ_between_primal_and_tangent(backend):
    """Strides are shared by a tensor and its tangent; where they differ, both are copied."""
    one = case(backend, heads=(2, 1), lengths=(5, 5), causal=True)
    x_t = tuple(map(random_like, one.inputs))
    moved = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in x_t)
    assert x_t[0].stride() != moved[0].stride()
    for a, b in zip(one.run_dual(*one.inputs, *moved), one.run_dual(*one.inputs, *x_t), strict=True):
        assert torch.equal(a, b)


def test_primal_and_tangent_lie_together(backend):
    """So that who stacks them need not copy."""
    x = tuple(t.detach().requires_grad_() for t in case(backend, batch=2, heads=(2, 1), lengths=(3, 3)).inputs)
    x_t = tuple(torch.ones_like(t, requires_grad=True) for t in x)
    o = attention_dual(*x, *x_t, backend=backend)
    gradients = torch.autograd.grad(o, (*x, *x_t), tuple(map(torch.ones_like, o)))
    for primal, tangent in (o, *zip(gradients[:3], gradients[3:], strict=True)):
        assert join(primal, tangent).untyped_storage().data_ptr() == primal.untyped_storage().data_ptr()


def test_a_known_output_may_have_another_layout():
    """That of a vendor's may be laid out row by row; the double backward reads it, and writes its tangent."""
    x = tuple(t.detach() for t in case("triton", batch=2, heads=(2, 2), lengths=(5, 5), d=3).inputs)
    u, kernels = tuple(map(random_like, x)), backends.select(OP, "triton")
    (o,), saved = kernels.forward(x, (None,) * 5, **PLAIN)
    moved = o.transpose(1, 2).contiguous().transpose(1, 2)
    assert moved.stride() != o.stride()
    (*found, (o_t,)), (*expected, (expected_t,)) = (
        kernels.double_backward(x, (None,) * 5, u, (y,), saved, (u[0],), (True,) * 3, **PLAIN) for y in (moved, o))
    for ours, theirs in zip((*found[0], o_t), (*expected[0], expected_t), strict=True):
        assert torch.equal(ours, theirs)


def test_head_dimensions_beyond_256_are_refused():
    with pytest.raises(BackendError, match=r"head dimension 257; the Triton kernels take at most 256"):
        case("triton", d=257).run_op(*case("triton", d=257).inputs)


def test_bfloat16_is_refused_in_the_interpreter():
    half = case("triton").to(torch.bfloat16)
    with pytest.raises(BackendError, match="interpreter is wrong for bfloat16"):
        half.run_op(*half.inputs)


def test_rows_independent_of_the_batch(backend):
    """A sample's bits are the same alone and in a batch."""
    many = case(backend, batch=3, heads=(2, 1), lengths=(40, 40), causal=True)
    a, u = many.cotangent(), tuple(map(random_like, many.inputs))
    together = derivatives(many.run_op, many.inputs, a, u).named()
    for b in range(3):
        rows = slice(b, b + 1)
        alone = derivatives(many.run_op, tuple(t[rows] for t in many.inputs), a[rows], tuple(t[rows] for t in u))
        assert all(torch.equal(t, together[name][rows]) for name, t in alone.named().items())


@pytest.mark.parametrize("order", ["forward", "dual_forward", "known", "backward", "dual_backward"])
def test_opcheck(order):
    """Schema, fake kernels and dispatch of the operators are right."""
    q, k, v = (t.detach() for t in case("triton", heads=(2, 1), lengths=(3, 3)).inputs)
    x_t, aux = (q + 1, k + 1, None), (None,) * 5
    options = (True, 0.5, None, 0.9, 0.0, 0, None, None)
    ops = torch.ops.gradmem
    (o, o_t), lse, mu = ops.triton_attention_forward(q, k, v, *x_t, None, None, *aux, *options)
    forward = {"forward": ((None,) * 3, None, None), "dual_forward": (x_t, None, None), "known": (x_t, o, lse)}
    if order in forward:
        tangents, *known = forward[order]
        torch.library.opcheck(ops.triton_attention_forward.default, (q, k, v, *tangents, *known, *aux, *options))
        return
    dual = order == "dual_backward"
    torch.library.opcheck(
        ops.triton_attention_backward.default,
        (q, k, v, *(x_t if dual else (None,) * 3), o, o_t if dual else None, lse, mu if dual else None, None, o + 1,
         [dual] * 3, [True, True, not dual], *aux, *options))


def test_saved_rows_serve_the_reference():
    """Saved rows have one convention: a backward of the reference takes those of Triton."""
    x = tuple(t.detach() for t in case("triton", heads=(2, 1), lengths=(4, 2)).inputs)
    results = []
    for saver, reader in itertools.product(("triton", "reference"), repeat=2):
        (o,), saved = backends.select(OP, saver).forward(x, (None,) * 5, **PLAIN)
        assert torch.equal(saved[0].isinf(), torch.tensor([True, True, False, False]).expand(1, 2, 4))
        grads = backends.select(OP, reader).backward(x, (None,) * 5, (o,), saved, (o + 1,), (True,) * 3, **PLAIN)
        results.append({f"gradient {i}": g for i, g in enumerate(grads)})
    for other in results[1:]:
        assert_close(other, results[0])


def test_every_kernel_class_and_architecture_has_a_configuration():
    keys = itertools.starmap(table.Key, itertools.product(KERNELS, table.DTYPES, table.HEAD_DIMS, ("sm_80", "sm_90")))
    assert set(CONFIGS) == set(keys)
    for config in CONFIGS.values():
        assert 128 % config.own == 0
        assert 128 % config.other == 0
        assert config.part in (None, 16, 32, 64, 128)


def test_the_dtype_class_follows_the_matmul_precision():
    assert table.dtype_class(torch.bfloat16) == "half"
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", ("float32", "tf32x3")), ("high", ("tf32", "tf32"))):
            torch.set_float32_matmul_precision(setting)
            assert (table.dtype_class(torch.float32), common.dot_precision(torch.float32)) == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_kernels_are_not_overridden():
    with pytest.raises(ValueError, match=r"expected kernels of forward, .*got sideways"), \
            override(sideways=Config(32, 32, 4, 1)):
        pass
