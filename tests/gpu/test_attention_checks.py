"""The checks of the GPU tests, on the CPU: they pass on the reference kernels and find planted errors."""

import pytest
import torch
from attention_checks import (
    FEATURES,
    Call,
    check_batch,
    check_errors,
    check_memory,
    check_repeatable,
    feature,
    formula,
    ours,
    results,
    same_bits,
)

from benchmarks.live_memory import peak_live_bytes

HOW = {"backend": "reference", "first_order": "own"}


@pytest.mark.parametrize("name", FEATURES)
def test_features_on_the_cpu(name):
    check_errors(feature(name, d=16), "cpu", **HOW)


@pytest.mark.parametrize("name", ["packed_keys", "seqlens", "everything"])
def test_the_formula_is_exact(name):
    """In float64 the two agree to rounding, so that the formula hides nothing."""
    call = feature(name, d=8, dtype=torch.float64)
    found, exact = (results(f, call.data("cpu")) for f in (ours(call, "cpu", **HOW), formula(call, "cpu")))
    for key, t in exact.items():
        torch.testing.assert_close(found[key], t, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_bits_and_memory_on_the_cpu():
    call = feature("causal", d=16, lengths=(65, 65))
    check_repeatable(call, "cpu", **HOW)
    check_batch(call, "cpu", **HOW)
    check_memory(Call(batch=1, heads=(1, 1), d=16, options={"causal": True}), "cpu", (2048, 4096), peak_live_bytes,
                 **HOW)


def test_one_key_on_the_cpu():
    """Gradients that cancel to 0."""
    check_errors(Call(lengths=(1, 1), d=16), "cpu", **HOW)


def test_errors_are_found():
    """A wrong option, and an element that nobody wrote."""
    with pytest.raises(AssertionError, match=r"^o of "):
        check_errors(feature("scale", d=16), "cpu", **HOW, causal=True)
    call = feature("causal", d=16)
    found = results(ours(call, "cpu", **HOW), call.data("cpu"))
    unwritten = {name: t.clone() for name, t in found.items()}
    unwritten["dual o_t"][1, 2, 199, 15] = torch.nan
    with pytest.raises(AssertionError, match="dual o_t differs"):
        same_bits(found, unwritten)
