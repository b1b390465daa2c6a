"""The same model in plain eager PyTorch, as anyone would write it: the peer of every ratio.

It shares no code with gradmem_kernels. Names of parameters are Llama's, so both load the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EagerDecoder", "eager_write", "token_loss"]


class EagerNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class EagerAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        # scale * q k^T + mask in one call: on CPU faster than in three, and than the math backend of SDPA
        weights = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5).softmax(-1)
        o = (weights @ v.flatten(0, 1)).unflatten(0, (-1, self.heads))
        return self.o_proj(o.transpose(1, 2).flatten(2))


class EagerMLP(nn.Module):
    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EagerLayer(nn.Module):
    def __init__(self, width: int, heads: int, intermediate: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = EagerNorm(width, eps)
        self.self_attn = EagerAttention(width, heads)
        self.post_attention_layernorm = EagerNorm(width, eps)
        self.mlp = EagerMLP(width, intermediate)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagerDecoder(nn.Module):
    """A Llama decoder without embeddings and head: ``[B, S, width] -> [B, S - first, width]``, causal, normed."""

    def __init__(self, *, width: int, layers: int, heads: int, intermediate: int, eps: float = 1e-6,
                 theta: float = 10000.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EagerLayer(width, heads, intermediate, eps) for _ in range(layers))
        self.norm = EagerNorm(width, eps)
        self.head_dim, self.theta = width // heads, theta
        self._tables: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        cos, sin, mask = self._positions(x.shape[1], x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x[:, first:])

    def _positions(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Rotary tables ``[length, head_dim / 2]`` and the causal mask, made once per length."""
        if (length, dtype) not in self._tables:
            rates = self.theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
            angles = torch.outer(torch.arange(length, dtype=torch.float64), rates)
            mask = torch.full((length, length), -torch.inf, dtype=dtype).triu(1)
            self._tables[length, dtype] = angles.cos().to(dtype), angles.sin().to(dtype), mask
        return self._tables[length, dtype]


def eager_write(decoder: EagerDecoder, memory: Tensor, context: Tensor, labels: Tensor, head: Tensor, *, steps: int,
                lr: float) -> Tensor:
    """``steps`` steps of gradient descent on each sample's token loss, all kept in one graph.

    memory ``[B, m, D]``, context (embedded) ``[B, S, D]``, labels ``[B, S]``, head ``[V, D]``.
    """
    for _ in range(steps):
        loss = token_loss(decoder, memory, context, labels, head).sum()
        grad, = torch.autograd.grad(loss, memory, create_graph=True)
        memory = memory - lr * grad
    return memory


def token_loss(decoder: EagerDecoder, memory: Tensor, tokens: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """``[B]``: the mean cross-entropy of ``labels``, the first of them predicted from the last memory position."""
    hidden = decoder(torch.cat([memory, tokens[:, :-1]], 1), memory.shape[1] - 1)
    losses = F.cross_entropy(F.linear(hidden, head).flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
