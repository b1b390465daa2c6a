"""Linear layers on stacked primal and tangent."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from gradmem_kernels.checks import Checker

__all__ = ["drops", "linear_dual"]


def linear_dual(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear layer on stacked primal and tangent ``[2, ...]``: one product; a bias enters the primal half only.

    ``linear`` is an ``nn.Linear`` or a ``Conv1D`` of transformers, without forward hooks. Any other module, such as an
    adapter around one, is run as it is, in forward mode: no bias is added to the tangent and taken off again, which
    would round it away.

    Raises:
        ArgumentError: if such a module drops anything: the plain form will have dropped something else.
    """
    weight, bias = _weight_and_bias(linear)
    if weight is None:
        _refuse_dropout(linear)
        return torch.stack(torch.func.jvp(linear, (x[0],), (x[1],)))
    if bias is None:
        return linear(x)
    product, both = F.linear(x, weight), torch.stack([bias, torch.zeros_like(bias)])
    return product + both.to(product.dtype).view(2, *(1,) * (x.dim() - 2), -1)


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The weight, ``[out, in]``, and bias of a plain linear layer; subclasses and hooks may do something else."""
    kind = type(linear)
    if linear._forward_hooks or linear._forward_pre_hooks:
        return None, None
    if kind is nn.Linear:
        return cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return cast(Tensor, linear.weight).mT, cast(Tensor, linear.bias)
    return None, None


def drops(module: nn.Module) -> float:
    """The largest probability with which a dropout layer in ``module`` drops now; 0 in eval mode."""
    return max((m.p for m in module.modules() if isinstance(m, _DropoutNd) and m.training), default=0.0)


def _refuse_dropout(linear: nn.Module) -> None:
    p = drops(linear)
    if p > 0:
        Checker("linear_dual").fail(
            type(linear).__name__, "an adapter without dropout, or in eval mode", f"dropout {p} in training",
            "set it to 0.0, call .eval() on it, or keep the graph of the plain form (recompute='none')")
