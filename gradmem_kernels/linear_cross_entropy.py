"""Cross-entropy of a linear head, without ever holding all logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op
from gradmem_kernels.checks import Checker, check_values

__all__ = ["linear_cross_entropy", "linear_cross_entropy_dual", "logits_budget"]

OP = Op("linear_cross_entropy", x=("hidden", "weight", "bias"), y=("loss",),
        aux=("labels", "loss_bar", "loss_t_bar"))

#: Bytes of logits held at once on a CPU, and elsewhere, where products are only fast with many rows.
CPU_BUDGET, DEVICE_BUDGET = 2**26, 2**30
_budget: int | None = None


@contextlib.contextmanager
def logits_budget(size: int | None) -> Iterator[None]:
    """Sets how many bytes of logits :func:`linear_cross_entropy` and its dual form hold at once.

    It counts every temporary that is as wide as the logits; at least one row is worked on whatever the size. It holds
    for ops that are called inside the ``with`` block and for all their derivatives, in the whole process, all its
    threads. ``None``: the default, 64 MiB on a CPU and 1 GiB elsewhere.

    Raises:
        ArgumentError: if ``size`` is no integer >= 1.
    """
    global _budget
    if size is not None:
        Checker("logits_budget").integer("size", size, minimum=1)
    before, _budget = _budget, size
    try:
        yield
    finally:
        _budget = before


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
                         ignore_index: int = -100, loss_bar: Tensor | None = None, max_counted: int | None = None,
                         backend: str | None = None) -> Tensor:
    """Per-sample mean of ``-log softmax(hidden weight^T + bias)[label]`` in nats, differentiable twice.

    Logits are computed in chunks of rows (:func:`logits_budget`) and, where derivatives need them again, again. While
    hidden requires grad its cotangent is computed along with the loss; the backward pass only scales it. Position ``s``
    of ``hidden`` is scored against position ``s`` of ``labels``: shifting them is the caller's.

    Args:
        hidden: ``[B, S, D]``, float64, float32, bfloat16 or float16. Half precision is computed in float32. S may be 0.
            In positions that do not count it may hold anything.
        weight: ``[V, D]``, of hidden's dtype, V >= 1.
        labels: ``[B, S]`` int64, each in ``0 .. V - 1`` or equal to ``ignore_index``. On other devices than the CPU
            their values are checked under ``GRADMEM_DEBUG=1`` only.
        bias: ``[V]``, of hidden's dtype.
        ignore_index: the label of positions that do not count. A sample all of whose positions do not count has loss 0
            and gradient 0.
        loss_bar: ``[B]``, of the loss's dtype: the cotangent that will arrive at the loss, if it is known beforehand
            (ones for ``loss.sum()``). The cotangents of weight and bias are then computed along with the loss too. In
            the backward pass it may turn out multiplied by one number (a loss scale). Any other cotangent raises on a
            CPU and under ``GRADMEM_DEBUG=1``, and gives NaN gradients of weight and bias elsewhere.
        max_counted: a bound on the number of positions that count, in all samples together. Elsewhere than on a CPU,
            where positions that do not count cost nothing anyway, it spares the work of the others without waiting for
            the device. Too small a bound raises on a CPU and under ``GRADMEM_DEBUG=1``; elsewhere every loss is NaN.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        ``[B]``, float64 for float64 and float32 otherwise: a mean over many tokens outgrows half precision.

    Raises:
        ArgumentError: for an argument of another type, shape, dtype, device or value.
        BackendError: if ``backend`` is unknown or cannot serve.
        HigherOrderError: when a third derivative is taken.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv 2411.09009; derivatives in
    docs/linear_cross_entropy.md.
    """
    check = _check("linear_cross_entropy", hidden, weight, labels, bias, ignore_index, max_counted)
    _check_bar(check, "loss_bar", loss_bar, hidden)
    kernels = backends.select("linear_cross_entropy", backend, hidden, weight, bias)
    early = (_needs_grad(hidden), *(loss_bar is not None and _needs_grad(t) for t in (weight, bias)))
    return OP(kernels, (hidden, weight, bias), (labels, loss_bar, None), early=early,
              **_options(hidden, ignore_index, max_counted))[0]


def linear_cross_entropy_dual(hidden: Tensor, weight: Tensor, labels: Tensor, hidden_t: Tensor | None, *,
                              bias: Tensor | None = None, ignore_index: int = -100, loss_bar: Tensor | None = None,
                              loss_t_bar: Tensor | None = None, max_counted: int | None = None,
                              backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`linear_cross_entropy` and its tangent along ``hidden_t``: returns ``loss, loss_t``, differentiable once.

    ``hidden_t`` has the shape and dtype of ``hidden``; ``None`` is a known zero. ``loss_bar`` and ``loss_t_bar``, each
    ``[B]`` of the loss's dtype, announce the cotangents of both outputs, ``None`` beside a given one being a zero: all
    cotangents of ``sum(loss_bar * loss + loss_t_bar * loss_t)`` are then computed along with the outputs. Those that
    arrive in the backward pass may together turn out multiplied by one number, where weight and bias are frozen by one
    for each sample; any others raise on a CPU and under ``GRADMEM_DEBUG=1``, and give NaN gradients elsewhere. Other
    arguments and errors as for :func:`linear_cross_entropy`; a second derivative raises ``HigherOrderError``.
    """
    check = _check("linear_cross_entropy_dual", hidden, weight, labels, bias, ignore_index, max_counted)
    check.tangent("hidden_t", hidden_t, hidden)
    _check_bar(check, "loss_bar", loss_bar, hidden)
    _check_bar(check, "loss_t_bar", loss_t_bar, hidden)
    kernels = backends.select("linear_cross_entropy", backend, hidden, weight, bias)
    announced = loss_bar is not None or loss_t_bar is not None
    early = tuple(announced and _needs_grad(t) for t in (hidden, weight, bias, hidden_t, None, None))
    if hidden_t is None:
        early = early[:1] + tuple(flag and loss_bar is not None for flag in early[1:])
    (loss,), (loss_t,) = OP.dual(kernels, (hidden, weight, bias), (hidden_t, None, None),
                                 (labels, loss_bar, loss_t_bar), early=early,
                                 **_options(hidden, ignore_index, max_counted))
    return loss, loss_t


def _needs_grad(t: Tensor | None) -> bool:
    """Whether a backward pass may ask for the gradient of ``t``. Some transforms do not tell: then no work is done
    before it asks."""
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def _options(hidden: Tensor, ignore_index: int, max_counted: int | None) -> dict[str, Any]:
    default = CPU_BUDGET if hidden.device.type == "cpu" else DEVICE_BUDGET
    return {"ignore_index": ignore_index, "max_counted": max_counted, "budget": default if _budget is None else _budget}


def _check(op: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int,
           max_counted: int | None) -> Checker:
    check = Checker(op)
    check.tensor("hidden", hidden, ("B", "S", "D"))
    check.tensor("weight", weight, ("V", "D"))
    check.tensor("labels", labels, ("B", "S"), dtypes=(torch.int64,), remedy="cast labels with .long()")
    if bias is not None:
        check.tensor("bias", bias, ("V",))
    classes = check.sizes["V"]
    if classes == 0:
        check.fail("weight", "shape [V, D] with V >= 1", list(weight.shape))
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        check.fail("ignore_index", "an int", ignore_index)
    if max_counted is not None:
        check.integer("max_counted", max_counted, minimum=0)
    if check_values(labels):
        counted = labels != ignore_index
        wrong = labels[counted & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            check.fail("labels", f"values in 0 .. {classes - 1}, or ignore_index={ignore_index}", wrong[0].item())
        if max_counted is not None and int(counted.sum()) > max_counted:
            check.fail("max_counted", f"no less than the number of labels that count, {int(counted.sum())}",
                       max_counted)
    return check


def _check_bar(check: Checker, name: str, bar: Tensor | None, hidden: Tensor) -> None:
    if bar is not None:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        check.tensor(name, bar, ("B",), dtypes=(dtype,), remedy="it is the cotangent of the loss, which has this dtype")
