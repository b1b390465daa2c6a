"""inner_sgd in C++, beyond what every backend is asked: many parts of a sample, threads, instruction sets."""

from __future__ import annotations

import pytest
import torch
from second_order import assert_close
from test_rows_native import close, instruction_set, on_threads, operators

from gradmem_kernels import backend as backends
from gradmem_kernels.native.common import refusal

missing = refusal(None)
pytestmark = [pytest.mark.skipif(missing is not None, reason=str(missing)), pytest.mark.usefixtures("poisoned_memory")]

OP = "inner_sgd"
#: Samples of several parts, the last of which is not full; many samples in a task.
SHAPES = {"wide": (3, 5, 7001), "narrow": (3001, 2, 5)}
CLIPS = {"plain": {}, "value": {"clip_value": 0.8}, "norm": {"clip_norm": 2.5},
         "both": {"clip_value": 0.8, "clip_norm": 2.0}}
RATES = ("number", "scalar", "per_sample", "per_channel")
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_clip = pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS)
every_rate = pytest.mark.parametrize("rate", RATES)


def tensors(shape, rate, dtype=torch.float64):
    """``x, x_t, a, b``; the gradients of some samples are clipped, of some not."""
    of_rate = {"number": None, "scalar": (), "per_sample": (shape[0], 1, 1), "per_channel": shape[2:]}[rate]

    def like_x():
        size = torch.linspace(0.01, 2, shape[0], dtype=torch.float64).view(-1, 1, 1)
        return tuple(None if t is None else t.to(dtype) for t in (
            torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64) * size,
            None if of_rate is None else torch.randn(of_rate, dtype=torch.float64)))

    return like_x(), like_x(), *torch.randn(2, *shape, dtype=torch.float64).to(dtype).unbind(0)


def everything(x, x_t, a, b, clips, backend="native"):
    """All results of all kernels in one call of each."""
    options = {"lr": 0.3 if x[2] is None else None, "clip_value": None, "clip_norm": None, **clips}
    kernels = backends.select(OP, backend, *x)
    every = tuple(t is not None for t in x)
    y, saved = kernels.forward(x, (), **options)
    out = {"forward": y, "backward": kernels.backward(x, (), y, saved, (b,), every, **options)}
    y, y_t, saved = kernels.dual_forward(x, (), x_t, **options)
    bars = kernels.dual_backward(x, (), x_t, y, y_t, saved, (a,), (b,), every, every, **options)
    out |= {"dual_forward": (*y, *y_t), "dual_backward": (*bars[0], *bars[1])}
    return {f"{kernel} {i}": t for kernel, results in out.items() for i, t in enumerate(results) if t is not None}


@every_shape
@every_clip
@every_rate
def test_many_parts(shape, clips, rate):
    arguments = tensors(shape, rate)
    assert_close(everything(*arguments, clips), everything(*arguments, clips, backend="reference"))


@every_shape
@every_rate
def test_bits_do_not_depend_on_threads(shape, rate):
    arguments = tensors(shape, rate, torch.float32)
    on_threads(lambda: everything(*arguments, CLIPS["both"]))


@every_shape
def test_bits_of_a_sample_do_not_depend_on_the_batch(shape):
    x, x_t, a, b = tensors(shape, "per_sample", torch.float32)
    whole = everything(x, x_t, a, b, CLIPS["both"])
    part = everything(tuple(t[1:3] for t in x), tuple(t[1:3] for t in x_t), a[1:3], b[1:3], CLIPS["both"])
    assert all(torch.equal(t, whole[name][1:3]) for name, t in part.items())


@every_rate
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_instruction_set(rate, dtype):
    from gradmem_kernels.native import _cpu

    x, x_t, a, b = tensors((5, 3, 700), rate, dtype)
    wide = (tuple(None if t is None else t.double() for t in group) for group in (x, x_t))
    expected = everything(*wide, a.double(), b.double(), CLIPS["both"], backend="reference")
    for isa in _cpu.instruction_sets():
        with instruction_set(isa):
            close(everything(x, x_t, a, b, CLIPS["both"]), expected, dtype)


@pytest.mark.parametrize("clips", [CLIPS["plain"], CLIPS["both"]], ids=["plain", "both"])
@pytest.mark.parametrize("rate", [False, True])
def test_opcheck(clips, rate):
    """Schema, fake kernels and dispatch of the operators are right."""
    ops = operators("inner_sgd")
    memory, grad, grad_t, a, b = torch.randn(5, 2, 3).unbind(0)
    rates = torch.randn(2, 2, 1).unbind(0) if rate else (None, None)
    options = (0.3, clips.get("clip_value"), clips.get("clip_norm"))
    for tangents in ((None, None, None), (None, grad_t, rates[1])):
        torch.library.opcheck(ops.native_inner_sgd_forward.default, (memory, grad, rates[0], *tangents, *options))
    torch.library.opcheck(ops.native_inner_sgd_backward.default,
                          (grad, rates[0], grad_t, rates[1], a, b, [True, rate, True, rate], *options))
