"""What the engine must agree with: WRITE, decoder and loss in plain PyTorch with ``create_graph=True``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem_kernels.decoder import Decoder
from gradmem_kernels.prefix import Prefix


def write(loss_fn: Callable[..., Tensor], memory: tuple[Tensor, ...], *, steps: int,
          lr: Callable[[int, int], Any], order: str = "second", second_order_steps: int | None = None,
          clip_value: float | None = None, clip_norm: float | None = None,
          direction: Callable[[list[Tensor], Tensor], Tensor] = lambda grads, m: grads[-1],
          ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """``lr(k, i)`` is the learning rate of step ``k`` and memory tensor ``i``; a step goes along ``direction`` of the
    clipped gradients until then and the memory. Returns memory, losses, norms."""
    losses, norms = [], []
    clipped: list[list[Tensor]] = [[] for _ in memory]
    if order == "none":
        memory = tuple(m.detach() for m in memory)
    memory = tuple(m if m.requires_grad else m.requires_grad_() for m in memory)
    for k in range(steps):
        second = order == "second" and (second_order_steps is None or k >= steps - second_order_steps)
        loss = loss_fn(*memory)
        grads = torch.autograd.grad(loss.sum(), memory, create_graph=True)
        losses.append(loss)
        norms.append(torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1).detach())
        stepped = []
        for i, (m, g) in enumerate(zip(memory, grads, strict=True)):
            g = g if second else g.detach()
            if clip_value is not None:
                g = g.clamp(-clip_value, clip_value)
            if clip_norm is not None:
                norm = g.flatten(1).norm(dim=1).view(-1, *(1,) * (g.dim() - 1))
                g = torch.where(norm > clip_norm, g * clip_norm / (norm + 1e-6), g)
            clipped[i].append(g)
            m = m - lr(k, i) * direction(clipped[i], m)
            stepped.append(m.detach().requires_grad_() if order == "none" else m)
        memory = tuple(stepped)
    return memory, torch.stack(losses), torch.stack(norms)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float, dim: int) -> Tensor:
    """Rotary embedding of ``[B, H, S, d]`` by complex multiplication of the pairs (i, i + dim / 2)."""
    angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float64),
                         theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 : dim]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., dim:]], -1)


def decode(decoder: Decoder, x: Tensor) -> Tensor:
    """The decoder's forward on its own parameters; ``[B, S, D]``, float64."""
    config = decoder.config
    rows = x.shape[1]
    hidden = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    for layer in decoder.layers:
        attn, mlp = layer.self_attn, layer.mlp
        h = rms_norm(x, layer.input_layernorm.weight, config.norm_eps)
        q, k, v = (F.linear(h, p.weight).unflatten(-1, (-1, config.head_size)).transpose(1, 2)
                   for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = (rotate(t, config.rope_theta, config.rotated) for t in (q, k))
        k, v = (t.repeat_interleave(config.num_heads // config.kv_heads, 1) for t in (k, v))
        p = (q @ k.mT * config.head_size**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + F.linear((p @ v).transpose(1, 2).flatten(2), attn.o_proj.weight)
        h = rms_norm(x, layer.post_attention_layernorm.weight, config.norm_eps)
        gated = F.silu(F.linear(h, mlp.gate_proj.weight)) * F.linear(h, mlp.up_proj.weight)
        x = x + F.linear(gated, mlp.down_proj.weight)
    return rms_norm(x, decoder.norm.weight, config.norm_eps)


def prefix_rows(prefix: Prefix, memory: Tensor, *fast: Tensor) -> Tensor:
    rows = memory
    if fast:
        weight, bias = fast
        rows = (weight.unsqueeze(1) @ memory.unsqueeze(-1)).squeeze(-1) + bias.unsqueeze(1)
    elif prefix.projection is not None:
        rows = F.linear(memory, prefix.projection.weight, prefix.projection.bias)
    if prefix.start is None or prefix.end is None:
        return rows
    batch = len(memory)
    return torch.cat([prefix.start.expand(batch, -1, -1), rows, prefix.end.expand(batch, -1, -1)], 1)


def prefix_loss(decoder: Decoder, prefix: Prefix, context: Tensor, labels: Tensor, head: Tensor,
                bias: Tensor | None, *memory: Tensor) -> Tensor:
    rows = prefix_rows(prefix, *memory)
    hidden = decode(decoder, torch.cat([rows, context], 1))[:, rows.shape[1] - 1 : -1]
    losses = F.cross_entropy(F.linear(hidden, head, bias).transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
