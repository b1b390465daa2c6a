"""The same model in plain eager PyTorch, as anyone would write it: the peer of every ratio.

It shares no code with gradmem_kernels. Names of parameters are Llama's, so both load the same weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EagerDecoder", "eager_write", "formula", "sdpa", "token_loss"]


class EagerNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


#: Of ``q [B, H, S, d]``, ``k, v [B, Hkv, S, d]`` and the causal mask ``[S, S]``.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention that PyTorch differentiates any number of times."""
    group = q.shape[1] // k.shape[1]
    k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    # scale * q k^T + mask in one call: on CPU faster than in three, and than the math backend of SDPA
    weights = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v.flatten(0, 1)).unflatten(0, (-1, q.shape[1]))


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's fused attention, of first order."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class EagerAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, attend: Attend) -> None:
        super().__init__()
        self.head_dim, self.attend = width // heads, attend
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * self.head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        o = self.attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v, mask)
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
    def __init__(self, width: int, heads: int, kv_heads: int, intermediate: int, eps: float, attend: Attend) -> None:
        super().__init__()
        self.input_layernorm = EagerNorm(width, eps)
        self.self_attn = EagerAttention(width, heads, kv_heads, attend)
        self.post_attention_layernorm = EagerNorm(width, eps)
        self.mlp = EagerMLP(width, intermediate)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagerDecoder(nn.Module):
    """A Llama decoder without embeddings and head: ``[B, S, width] -> [B, S - first, width]``, causal, normed."""

    def __init__(self, *, width: int, layers: int, heads: int, kv_heads: int, intermediate: int, eps: float = 1e-6,
                 theta: float = 10000.0, attend: Attend = formula) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EagerLayer(width, heads, kv_heads, intermediate, eps, attend)
                                    for _ in range(layers))
        self.norm = EagerNorm(width, eps)
        self.head_dim, self.theta = width // heads, theta
        self._tables: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        cos, sin, mask = self._positions(x.shape[1], x.dtype, x.device)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x[:, first:])

    def _positions(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rotary tables ``[length, head_dim / 2]`` and the causal mask, made once per length."""
        key = length, dtype, device
        if key not in self._tables:
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
            angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), self.theta ** -exponents)
            mask = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)
            self._tables[key] = angles.cos().to(dtype), angles.sin().to(dtype), mask
        return self._tables[key]


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
    hidden = decoder(torch.cat([memory.to(tokens.dtype), tokens[:, :-1]], 1), memory.shape[1] - 1)
    losses = F.cross_entropy(F.linear(hidden, head).flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
