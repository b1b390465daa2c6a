"""A gradient penalty through attention: a critic over sets whose slope at points between real and generated ones is
held near 1 (WGAN-GP, Gulrajani et al., arXiv 1704.00028). Takes seconds on a CPU.

    python examples/gradient_penalty.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from gradmem_kernels import attention

BATCH, POINTS, HEADS, D = 16, 12, 2, 8


class Critic(nn.Module):
    """``[B, POINTS, 2] -> [B]``: self-attention over the points, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(2, HEADS * D), nn.Linear(HEADS * D, 3 * HEADS * D)
        self.score = nn.Linear(HEADS * D, 1)

    def forward(self, points: Tensor) -> Tensor:
        x = torch.tanh(self.embed(points))
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        return self.score(x + attention(q, k, v).transpose(1, 2).flatten(2)).mean((1, 2))


def penalty(critic: Critic, real: Tensor, generated: Tensor, generator: torch.Generator) -> Tensor:
    """The mean of ``(|slope| - 1)^2``; its own gradient needs the second derivative of attention."""
    between = torch.lerp(real, generated, torch.rand(len(real), 1, 1, generator=generator)).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def train(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """Of each step the critic's gap between real and generated sets, and the penalty."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    critic = Critic()
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    log = []
    for _ in range(steps):
        angles = torch.rand(BATCH, POINTS, generator=generator) * 2 * torch.pi
        real = torch.stack([angles.cos(), angles.sin()], -1)  # a circle
        generated = torch.randn(BATCH, POINTS, 2, generator=generator)
        gap = critic(real).mean() - critic(generated).mean()
        held = penalty(critic, real, generated, generator)
        optimizer.zero_grad()
        (10 * held - gap).backward()
        optimizer.step()
        log.append((gap.item(), held.item()))
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    log = train(parser.parse_args().steps)
    print(f"gap {log[0][0]:.3f} -> {log[-1][0]:.3f}, penalty {log[0][1]:.3f} -> {log[-1][1]:.3f}")


if __name__ == "__main__":
    main()
