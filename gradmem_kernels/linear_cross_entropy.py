"""Cross-entropy of a linear head, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op
from gradmem_kernels.checks import Checker, check_values

__all__ = ["linear_cross_entropy", "linear_cross_entropy_dual"]

OP = Op("linear_cross_entropy", x=("hidden", "weight", "bias"), y=("loss",), aux=("labels",))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
                         ignore_index: int = -100, backend: str | None = None) -> Tensor:
    """Per-sample mean of ``-log softmax(hidden weight^T + bias)[label]`` in nats, differentiable twice.

    Logits are computed in chunks of rows and again in the backward pass, so they take a fixed amount of memory.
    Position ``s`` of ``hidden`` is scored against position ``s`` of ``labels``: shifting them is the caller's.

    Args:
        hidden: ``[B, S, D]``, float64, float32, bfloat16 or float16. Half precision is computed in float32. S may be 0.
        weight: ``[V, D]``, of hidden's dtype, V >= 1.
        labels: ``[B, S]`` int64, each in ``0 .. V - 1`` or equal to ``ignore_index``. On other devices than the CPU
            their values are checked under ``GRADMEM_DEBUG=1`` only.
        bias: ``[V]``, of hidden's dtype.
        ignore_index: the label of positions that do not count. A sample all of whose positions do not count has loss 0
            and gradient 0.
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
    _check("linear_cross_entropy", hidden, weight, labels, bias, ignore_index)
    kernels = backends.select("linear_cross_entropy", backend, hidden, weight, bias)
    return OP(kernels, (hidden, weight, bias), (labels,), ignore_index=ignore_index)[0]


def linear_cross_entropy_dual(hidden: Tensor, weight: Tensor, labels: Tensor, hidden_t: Tensor | None, *,
                              bias: Tensor | None = None, ignore_index: int = -100,
                              backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`linear_cross_entropy` and its tangent along ``hidden_t``: returns ``loss, loss_t``, differentiable once.

    ``hidden_t`` has the shape and dtype of ``hidden``; ``None`` is a known zero. Other arguments and errors as for
    :func:`linear_cross_entropy`; a second derivative raises ``HigherOrderError``.
    """
    check = _check("linear_cross_entropy_dual", hidden, weight, labels, bias, ignore_index)
    check.tangent("hidden_t", hidden_t, hidden)
    kernels = backends.select("linear_cross_entropy", backend, hidden, weight, bias)
    (loss,), (loss_t,) = OP.dual(kernels, (hidden, weight, bias), (hidden_t, None, None), (labels,),
                                 ignore_index=ignore_index)
    return loss, loss_t


def _check(op: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int) -> Checker:
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
    if check_values(labels):
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            check.fail("labels", f"values in 0 .. {classes - 1}, or ignore_index={ignore_index}", wrong[0].item())
    return check
