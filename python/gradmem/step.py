"""One meta-training step: WRITE, READ, the outer backward pass and the optimizer, without a look at any value."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from gradmem.ranks import whole
from gradmem.tasks.batch import Batch, exact_match
from gradmem_kernels.ranges import named_range

__all__ = ["StepOutput", "meta_step"]


class StepOutput(NamedTuple):
    """What a step leaves to look at: tensors without dimensions, on the model's device.

    Attributes:
        loss: the training loss.
        grad_norm: norm of its gradient before clipping. Where it is not finite, a fused optimizer changed nothing.
        exact_match: fraction of the queries whose value tokens are all the most likely ones.
        inner_loss: the last WRITE loss, ``None`` where WRITE takes no steps.
    """

    loss: Tensor
    grad_norm: Tensor
    exact_match: Tensor
    inner_loss: Tensor | None

    def numbers(self) -> tuple[float, float, float, float | None]:
        """The same as numbers, by one copy to the host."""
        tensors = [t for t in self if t is not None]
        loss, norm, match, *inner = torch.stack([t.double() for t in tensors]).tolist()
        return loss, norm, match, inner[0] if inner else None


def meta_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch,
              grad_clip: float = math.inf) -> StepOutput:
    """Takes a step of ``optimizer`` on the loss of ``batch``, with the gradient's norm clipped to ``grad_clip``.

    Gradients are cleared before and after. Nothing in it waits for the device. ``model`` may be what
    :mod:`gradmem.parallel` makes of one, with each process's part in ``batch``; then the exact match and the inner loss
    are those of the part.
    """
    model.zero_grad()
    out = model(batch.context_ids, batch.query_ids, batch.labels, batch.context_lengths)
    assert out.loss is not None
    with named_range("outer backward"):
        out.loss.backward()
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
    with named_range("optimizer step"):
        if optimizer.defaults.get("fused"):  # such ones read it, and leave everything as it is where it is 1
            optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            if optimizer.defaults.get("fused"):
                del optimizer.found_inf  # type: ignore[attr-defined]
        increment_version(list(model.parameters()))  # fused optimizers do not
        model.zero_grad()
    inner = out.inner_losses[-1].detach().mean() if len(out.inner_losses) else None
    return StepOutput(out.loss.detach(), norm, exact_match(out.logits, batch).float().mean(), inner)
