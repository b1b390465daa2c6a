"""A MAML-style loop through attention: the inner step is a gradient step on the queries' projection, and the outer loss
is differentiated through it. Takes seconds on a CPU.

    python examples/maml_attention.py

Each task is a lookup: keys and values are given, and a query is a key seen through a rotation of the task's own. A few
pairs of query and answer adapt the projection; the adapted projection answers other queries of the same task.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem_kernels import attention

TASKS, PAIRS, SHOTS, D = 8, 16, 8, 8


def tasks(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[TASKS, 1, PAIRS, D]``; query ``i`` asks for value ``i``."""
    keys, values = torch.randn(2, TASKS, 1, PAIRS, D, generator=generator)
    mixed = torch.eye(D) + 0.7 * torch.randn(TASKS, 1, D, D, generator=generator)
    return keys @ torch.linalg.qr(mixed).Q, keys, values


def loss(projection: Tensor, q: Tensor, k: Tensor, v: Tensor, answers: Tensor) -> Tensor:
    """``[TASKS]``; ``projection [TASKS, 1, D, D]`` is each task's own."""
    return F.mse_loss(attention(q @ projection, k, v, scale=1.0), answers, reduction="none").mean((1, 2, 3))


def train(steps: int, seed: int = 0) -> list[float]:
    """The outer loss of each step, after adaptation."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.eye(D, requires_grad=True)
    log_lr = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([start, log_lr], 0.05)
    losses = []
    for _ in range(steps):
        q, k, v = tasks(generator)
        projection = start.expand(TASKS, 1, D, D)
        for _ in range(2):
            inner = loss(projection, q[..., :SHOTS, :], k, v, v[..., :SHOTS, :]).sum()
            (grad,) = torch.autograd.grad(inner, projection, create_graph=True)  # attention is differentiated again
            projection = projection - log_lr.exp() * grad
        outer = loss(projection, q[..., SHOTS:, :], k, v, v[..., SHOTS:, :]).mean()
        optimizer.zero_grad()
        outer.backward()
        optimizer.step()
        losses.append(outer.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    losses = train(parser.parse_args().steps)
    edge = max(1, len(losses) // 5)
    print(f"loss after adaptation: {sum(losses[:edge]) / edge:.3f} at first, "
          f"{sum(losses[-edge:]) / edge:.3f} at the end")


if __name__ == "__main__":
    main()
