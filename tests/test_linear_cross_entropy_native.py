"""Rows of linear_cross_entropy in C++, beyond what every backend is asked: wide rows, threads, instruction sets."""

from __future__ import annotations

import pytest
import torch
from second_order import assert_close
from test_rows_native import close, instruction_set, on_threads, operators

from gradmem_kernels import linear_cross_entropy
from gradmem_kernels.checks import ArgumentError
from gradmem_kernels.native.common import refusal
from gradmem_kernels.reference.linear_cross_entropy import RowKernels

missing = refusal(None)
pytestmark = [pytest.mark.skipif(missing is not None, reason=str(missing)), pytest.mark.usefixtures("poisoned_memory")]

#: Rows and logits: several blocks of a row, the last not full; several tasks.
SHAPES = {"wide": (3, 20001), "narrow": (1501, 37), "one": (2, 1)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def native_rows():
    from gradmem_kernels.native import linear_cross_entropy

    return linear_cross_entropy._kernels._rows


def tensors(shape, dtype=torch.float64):
    """``z, z_t, label, a, b``; the largest logit is anywhere, and some have no weight at all."""
    z, z_t = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    z = 5 * z
    z[:, ::3] = -torch.inf
    z[:, 0] = 1
    label = torch.randint(shape[1], (shape[0], 1))
    label[z.gather(1, label).isinf()] = 0
    a, b = torch.randn(2, shape[0], 1, dtype=torch.float64).unbind(0)
    return z.to(dtype), z_t.to(dtype), label, a.to(dtype), b.to(dtype)


def everything(rows, z, z_t, label, a, b):
    """All results of both kernels, with and without tangents and cotangents."""
    out = {}
    for name, (of_z_t, of_a, of_b) in {"plain": (None, a, None), "unit": (None, None, None), "dual": (z_t, a, b),
                                       "tangent": (z_t, None, b), "no tangent": (None, a, b),
                                       "no cotangent": (z_t, a, None)}.items():
        for wanted in (False, True):
            logits = z.clone(), None if of_z_t is None else of_z_t.clone()
            stats, bars = rows.forward(*logits, label, of_a, of_b, wanted)
            out[f"{name} forward {wanted}"] = (*stats, *bars)
        logits = z.clone(), None if of_z_t is None else of_z_t.clone()
        out[f"{name} backward"] = rows.backward(*logits, label, *stats[2:], of_a, of_b)
    return {f"{kernel} {i}": t for kernel, results in out.items() for i, t in enumerate(results) if t is not None}


@every_shape
def test_rows(shape):
    arguments = tensors(shape)
    assert_close(everything(native_rows(), *arguments), everything(RowKernels(), *arguments))


@every_shape
def test_bits_do_not_depend_on_threads(shape):
    arguments = tensors(shape, torch.float32)
    on_threads(lambda: everything(native_rows(), *arguments))


def test_bits_of_a_row_do_not_depend_on_the_batch():
    arguments = tensors((301, 93), torch.float32)
    whole = everything(native_rows(), *arguments)
    part = everything(native_rows(), *(t[100:107] for t in arguments))
    assert all(torch.equal(t, whole[name][100:107]) for name, t in part.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_instruction_set(dtype):
    from gradmem_kernels.native import _cpu

    z, z_t, label, a, b = tensors((5, 4100), dtype)
    expected = everything(RowKernels(), z.double(), z_t.double(), label, a.double(), b.double())
    for isa in _cpu.instruction_sets():
        with instruction_set(isa):
            close(everything(native_rows(), z, z_t, label, a, b), expected, dtype)


def test_logits_of_any_size():
    """Neither overflow nor a loss of digits where logits are large."""
    z = torch.tensor([[1e4, 1e4 - 1, -1e4], [-3e4, -3e4, -3e4]])
    (row, _, lse, _), (dz, _) = native_rows().forward(z.clone(), None, torch.tensor([[1], [2]]), None, None, True)
    expected = z.double().log_softmax(-1)
    torch.testing.assert_close(row[:, 0].double(), -expected[[0, 1], [1, 2]], rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, z.logsumexp(-1, keepdim=True))
    torch.testing.assert_close(dz.double(), expected.exp() - torch.eye(3).double()[[1, 2]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("label", [5, -1, 5_000_000])
def test_labels_that_nobody_could_look_at(label):
    """Inside a transform of torch.func the op does not see values: the kernel must not write beside its row."""
    hidden, weight, labels = torch.randn(1, 2, 4), torch.randn(5, 4), torch.tensor([[1, label]])
    with pytest.raises(ArgumentError, match=rf"labels: expected values in 0 .. 4, or ignore_index, got {label}$"):
        torch.func.grad(lambda *x: linear_cross_entropy(x[0], weight, x[1], backend="native").sum())(hidden, labels)
    (row, *_), _ = native_rows().forward(torch.randn(2, 5), None, torch.tensor([[0], [4]]), None, None, False)
    assert row.isfinite().all()


@pytest.mark.parametrize("dual", [False, True])
def test_opcheck(dual):
    """Schema, fake kernels and dispatch of the operators are right."""
    z, z_t, label, a, b = tensors((3, 5))
    z_t, b = (z_t, b) if dual else (None, None)
    ops = operators("linear_cross_entropy")
    torch.library.opcheck(ops.native_cross_entropy_forward.default, (z, z_t, label, a, b, True))
    mu = b if dual else None
    torch.library.opcheck(ops.native_cross_entropy_backward.default, (z, z_t, label, a, b, z[:, :1].clone(), mu))
