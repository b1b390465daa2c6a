"""Linear layers on stacked primal and tangent."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["linear_dual"]


def linear_dual(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear layer on stacked primal and tangent ``[2, ...]``: one product; a bias enters the primal half only.

    ``linear`` is an ``nn.Linear`` or a ``Conv1D`` of transformers. Any other module, such as an adapter around one, is
    run as it is on the primal, in forward mode, which has the tangent beside it and its dropout the same for both.
    """
    weight, bias = _weight_and_bias(linear)
    if weight is None:
        return torch.stack(torch.func.jvp(linear, (x[0],), (x[1],)))
    if bias is None:
        return linear(x)
    both = torch.stack([bias, torch.zeros_like(bias)])
    return F.linear(x, weight) + both.view(2, *(1,) * (x.dim() - 2), -1)


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The weight, ``[out, in]``, and bias of a plain linear layer; a subclass may compute something else."""
    kind = type(linear)
    if kind is nn.Linear:
        return cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return cast(Tensor, linear.weight).mT, cast(Tensor, linear.bias)
    return None, None
