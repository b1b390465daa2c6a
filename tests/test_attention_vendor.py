"""PyTorch's fused attention as the first order: the same guarantees, and a clear word where it does not serve."""

from dataclasses import replace

import pytest
import torch
from second_order import (
    CHECKS,
    assert_close,
    check_needs,
    check_precision,
    check_values,
    every_check,
    narrow_dtypes,
    refused,
)
from test_attention import case

from gradmem_kernels import backend as backends
from gradmem_kernels.attention import attention
from gradmem_kernels.backend import BackendError, use_backend
from gradmem_kernels.native.common import refusal as native_refusal
from gradmem_kernels.reference import attention as reference
from gradmem_kernels.vendor import attention as vendor

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SERVED = {"full": {"heads": (2, 2)}, "causal": {"batch": 2, "lengths": (4, 4), "d": 1, "causal": True},
          "grouped": {"heads": (4, 2), "lengths": (4, 4), "causal": True}, "cross": {"lengths": (2, 5), "d": 3}}


def vendor_case(first_order="cpu_flash", **options):
    shape = ("batch", "heads", "lengths", "d", "seqlens")
    flags = {name: value for name, value in options.items() if name not in shape}
    return replace(case(None, **options),
                   op=lambda *x, **aux: attention(*x, **aux, **flags, first_order=first_order))


@pytest.fixture
def vendor_calls(monkeypatch):
    """Counts the calls of CPU flash attention."""
    calls = {"forward": 0, "backward": 0}
    flash = vendor.VENDORS["cpu_flash"]

    def count(name):
        def run(*args):
            calls[name] += 1
            return getattr(flash, name)(*args)

        return run

    counted = vendor.Vendor(count("forward"), count("backward"), flash.refusal)
    monkeypatch.setitem(vendor.VENDORS, "cpu_flash", counted)
    return calls


# check_needs: a vendor computes all three gradients, whichever are wanted
@every_check(checks=[check for check in CHECKS if check is not check_needs], **SERVED)
def test_guarantees(check, options):
    check(vendor_case(**options))


@narrow_dtypes
def test_precision(dtype):
    check_precision(vendor_case(batch=2, heads=(4, 2), lengths=(33, 33), d=16, causal=True), dtype, only_rounds=False)


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED.keys())
def test_the_vendor_runs_the_first_order_and_nothing_else(options, vendor_calls):
    check_values(vendor_case(**options))
    assert vendor_calls == {"forward": 1, "backward": 1}


def test_rows_of_gradients_are_left_to_the_backend(vendor_calls):
    """The vendor's forward, and a backward that skips what is constant."""
    check_values(vendor_case(batch=2, lengths=(5, 5), causal=True, grad_rows=(1, 3)))
    assert vendor_calls == {"forward": 1, "backward": 0}


def test_saved_rows_are_those_of_the_backends():
    """The log-sum-exp of a vendor serves the kernels of every backend, and theirs the vendor."""
    x = tuple(t.detach() for t in vendor_case(heads=(4, 2), lengths=(5, 5), d=3).inputs)
    options = {"causal": True, "scale": 0.7, "window": None, "softcap": None, "dropout": 0.0, "seed": 0,
               "grad_rows": None, "tangent_rows": None}
    paired = vendor.choose("cpu_flash", reference, x, (None,) * 5, options, automatic=False)
    (o,), (lse,) = reference.forward(x, (None,) * 5, **options)
    (of_vendor,), (lse_of_vendor,) = paired.forward(x, (None,) * 5, **options)
    assert_close({"o": of_vendor, "lse": lse_of_vendor}, {"o": o, "lse": lse})
    assert lse_of_vendor.is_contiguous()


def test_the_automatic_choice(vendor_calls, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", ("triton", "reference"))
    x = vendor_case(heads=(2, 2)).inputs
    attention(*x)
    assert vendor_calls["forward"] == 1, "no vendor although no backend was asked for"
    attention(*x, backend="reference")
    attention(*x, first_order="own")
    attention(*x, window=1)
    with use_backend("reference"):
        attention(*x)
    assert vendor_calls["forward"] == 1, "a vendor although a backend was asked for by name, or it cannot serve"
    attention(*x, backend="reference", first_order="cpu_flash")
    assert vendor_calls["forward"] == 2


@pytest.mark.skipif(native_refusal(None) is not None, reason=str(native_refusal(None)))
def test_a_faster_backend_runs_its_own_first_order(vendor_calls):
    x = vendor_case(heads=(2, 2)).inputs
    attention(*x)
    assert vendor_calls["forward"] == 0
    attention(*x, first_order="cpu_flash")
    assert vendor_calls["forward"] == 1


def test_mapped_tensors_go_to_the_backend(vendor_calls):
    x = tuple(torch.stack((t, t)) for t in vendor_case().inputs)
    mapped = torch.func.vmap(lambda *x: attention(*x, first_order="cpu_flash"))(*x)
    assert vendor_calls["forward"] == 0
    torch.testing.assert_close(mapped[0], attention(*(t[0] for t in x)))


@pytest.mark.parametrize(("options", "reason"), [
    ({"causal": True, "lengths": (2, 3)}, "aligns causal queries top-left"), ({"scale": -0.7}, "a positive scale"),
    ({"window": 2}, "no window"), ({"softcap": 1.0, "dropout": 0.5}, "no softcap and dropout"),
    ({"seqlens": (2,)}, "no padding, packing, mask or bias"),
    ({"lengths": (0, 3)}, "a tensor is empty")], ids=str)
def test_what_a_vendor_does_not_serve_raises_when_asked_for(options, reason):
    asked = vendor_case(**options)
    with pytest.raises(BackendError, match=rf"first_order: 'cpu_flash' cannot serve this call: .*{reason}"):
        asked.run_op(*asked.inputs)


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_a_vendor_of_another_device_raises(name):
    asked = vendor_case(name)
    with pytest.raises(BackendError, match=f"{name!r} cannot serve this call: it runs on a CUDA device, not on cpu"):
        asked.run_op(*asked.inputs)


def test_unknown_first_order_raises():
    x = vendor_case().inputs
    refused(lambda: attention(*x, first_order="math"), "attention", "first_order",
            "one of own, cpu_flash, flash, cudnn or None", "'math'")


def test_every_default_is_a_vendor():
    assert set(vendor.DEFAULTS.values()) <= set(vendor.CHOICES)
    assert backends.requested() is None
