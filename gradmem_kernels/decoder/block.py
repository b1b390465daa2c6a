"""The layer of a decoder: norms, attention and feed-forward block, each plain and dual.

The parts hold options and no weights: they read these, at every call, from the modules of a layer by name. So the layer
may be a block's own or one of an existing model, and a module that was replaced there (by an adapter) takes part.
The dual form has primal and tangent stacked in a leading dimension of 2; what is said of ``x [..., S, D]`` below holds
for both forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmem_kernels.attention import attention, attention_dual
from gradmem_kernels.decoder.cache import LayerCache
from gradmem_kernels.decoder.config import DecoderConfig
from gradmem_kernels.decoder.halves import join, split
from gradmem_kernels.decoder.linear import linear_dual
from gradmem_kernels.decoder.rope import Rope
from gradmem_kernels.gelu import gelu, gelu_dual
from gradmem_kernels.layer_norm import add_layer_norm, add_layer_norm_dual, layer_norm, layer_norm_dual
from gradmem_kernels.rms_norm import add_rms_norm, add_rms_norm_dual, rms_norm, rms_norm_dual
from gradmem_kernels.rotary import rotary
from gradmem_kernels.swiglu import swiglu, swiglu_dual

__all__ = ["Block", "ContextRows", "LayerNames", "Norm", "make_norm"]


class ContextRows(NamedTuple):
    """What the first layer makes of context rows by themselves: no prefix before them changes it.

    Attributes:
        residual: ``[B, T, D]``, to which the layer's attention is added.
        q, k, v: ``[B, H, T, d]``, rotated for their positions.
        first: the position of the first row.
    """

    residual: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    first: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[:4]

    @property
    def constant(self) -> bool:
        """Whether nobody asks for their gradients."""
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in self.tensors))


@dataclass(frozen=True)
class LayerNames:
    """Where the modules of a layer are; the defaults are transformers' names in Llama and Qwen3.

    ``qkv`` names three projections or one fused. The columns of a fused one are ``[3, H, d]``, queries first, or
    ``[H, 3, d]`` with ``qkv_per_head``. ``up`` names gate and up of a gated feed-forward block, or up alone.
    """

    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_per_head: bool = False
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


class Norm:
    """RMS or layer norm over the last dimension, with the weight and bias of the module that is given."""

    def __init__(self, config: DecoderConfig) -> None:
        self.kind, self.eps = config.norm, config.norm_eps

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, bias = self._parameters(module)
        if self.kind == "rms":
            return rms_norm(x, weight, eps=self.eps)
        return layer_norm(x, weight, bias=bias, eps=self.eps)

    def dual(self, module: nn.Module, x: Tensor) -> Tensor:
        (weight, bias), (primal, tangent) = self._parameters(module), split(x)
        if self.kind == "rms":
            return join(*rms_norm_dual(primal, weight, tangent, eps=self.eps))
        return join(*layer_norm_dual(primal, weight, tangent, bias=bias, eps=self.eps))

    def add_forward(self, module: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``norm(s), s`` with ``s = x + residual``."""
        weight, bias = self._parameters(module)
        if self.kind == "rms":
            return add_rms_norm(x, residual, weight, eps=self.eps)
        return add_layer_norm(x, residual, weight, bias=bias, eps=self.eps)

    def add_dual(self, module: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        (weight, bias), (primal, tangent), (other, other_t) = self._parameters(module), split(x), split(residual)
        if self.kind == "rms":
            y, s, y_t, s_t = add_rms_norm_dual(primal, other, weight, tangent, other_t, eps=self.eps)
        else:
            y, s, y_t, s_t = add_layer_norm_dual(primal, other, weight, tangent, other_t, bias=bias, eps=self.eps)
        return join(y, y_t), join(s, s_t)

    @staticmethod
    def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
        return cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))


class SelfAttention:
    """Projections to heads, causal attention, and the projection of its output.

    :meth:`project` and :meth:`merge` are row by row: rows that are known already need not be given again.
    """

    def __init__(self, config: DecoderConfig, index: int, names: LayerNames) -> None:
        self.names, self.head_size = names, config.head_size
        self.qk_norm = Norm(config) if config.qk_norm else None
        self.scale, self.window = config.attention_scale, config.window(index)

    def forward(self, layer: nn.Module, x: Tensor, rope: Rope | None, cache: LayerCache | None,
                context: ContextRows | None) -> Tensor:
        q, k, v = self.project(layer, x, rope)
        options: dict[str, Any] = {"causal": True, "window": self.window}
        if cache is not None:
            k, v = cache.append(k, v)
            options = cache.visible(self.window)
        elif context is not None:
            rows = (0, q.shape[-2])
            q, k, v = map(_join_rows, (q, k, v), context.tensors[1:])
            options["grad_rows"] = rows if context.constant else None
        return self.merge(layer, attention(q, k, v, scale=self.scale, **options))

    def dual(self, layer: nn.Module, x: Tensor, rope: Rope | None, context: ContextRows | None) -> Tensor:
        (q, q_t), (k, k_t), (v, v_t) = map(split, self.project(layer, x, rope, dual=True))
        options: dict[str, Any] = {"causal": True, "window": self.window}
        if context is not None:
            rows = (0, q.shape[-2])
            q, k, v = map(_join_rows, (q, k, v), context.tensors[1:])
            q_t, k_t, v_t = (F.pad(t.transpose(-2, -3), (0, 0, 0, 0, 0, q.shape[-2] - rows[1])).transpose(-2, -3)
                             for t in (q_t, k_t, v_t))
            options |= {"tangent_rows": rows, "grad_rows": rows if context.constant else None}
        o = attention_dual(q, k, v, q_t, k_t, v_t, scale=self.scale, **options)
        return self.merge(layer, join(*o), dual=True)

    def project(self, layer: nn.Module, x: Tensor, rope: Rope | None, *,
                dual: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """``x [..., S, D]`` to queries, keys and values ``[..., H, S, d]``, normed and rotated where that is asked."""
        q, k, v = self._heads([_linear(layer, name, x, dual) for name in self.names.qkv])
        if self.qk_norm is not None:
            norm = self.qk_norm.dual if dual else self.qk_norm.forward
            modules = (layer.get_submodule(name) for name in (self.names.q_norm, self.names.k_norm))
            # under autocast they come in half precision from products, the weights do not
            q, k = (norm(module, t.to(cast(Tensor, module.weight).dtype)).to(t.dtype)
                    for module, t in zip(modules, (q, k), strict=True))
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        return (q, k, v) if rope is None else (_rotate(q, rope), _rotate(k, rope), v)

    def merge(self, layer: nn.Module, o: Tensor, *, dual: bool = False) -> Tensor:
        """``o [..., H, S, d]`` to ``[..., S, D]``."""
        return _linear(layer, self.names.o, o.transpose(-2, -3).flatten(-2), dual)

    def _heads(self, projected: list[Tensor]) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[..., S, H, d]``, views of what the projections gave."""
        if len(projected) == 3:
            return tuple(t.unflatten(-1, (-1, self.head_size)) for t in projected)
        fused, = projected
        if self.names.qkv_per_head:
            return fused.unflatten(-1, (-1, 3, self.head_size)).unbind(-2)
        return fused.unflatten(-1, (3, -1, self.head_size)).unbind(-3)


class MLP:
    """The feed-forward block, gated (SwiGLU) or plain (GELU)."""

    def __init__(self, config: DecoderConfig, names: LayerNames) -> None:
        self.names, self.gated = names, config.activation == "swiglu"
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        rows = [_linear(layer, name, x, False) for name in self.names.up]
        return _linear(layer, self.names.down,
                       swiglu(*rows) if self.gated else gelu(*rows, approximate=self.approximate), False)

    def dual(self, layer: nn.Module, x: Tensor) -> Tensor:
        rows, rows_t = zip(*(split(_linear(layer, name, x, True)) for name in self.names.up), strict=True)
        act = swiglu_dual(*rows, *rows_t) if self.gated else gelu_dual(*rows, *rows_t, approximate=self.approximate)
        return _linear(layer, self.names.down, join(*act), True)


class Block(nn.Module):
    """One layer, over modules of its own or those of ``layer``.

    Args:
        config: of the decoder.
        index: which of its layers this is.
        names: where the modules are.
        layer: the module that has them; ``None``: the block itself, under the default names.
        device, dtype: of modules of its own.
    """

    def __init__(self, config: DecoderConfig, index: int, names: LayerNames | None = None,
                 layer: nn.Module | None = None, *, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if names is None:
            names = LayerNames() if config.activation == "swiglu" else LayerNames(up=("mlp.up_proj",))
        if layer is None:
            _add_modules(self, config, device, dtype)
        self.layer = layer
        self.names, self.norm = names, Norm(config)
        self.attention, self.feed_forward = SelfAttention(config, index, names), MLP(config, names)
        self.parallel = config.parallel_residual

    @property
    def source(self) -> nn.Module:
        """The module whose submodules the block reads."""
        return self if self.layer is None else self.layer

    def forward(self, x: Tensor, rope: Rope | None, cache: LayerCache | None = None,
                context: ContextRows | None = None) -> Tensor:
        """``[B, S, D]``; ``rope`` has the rows of ``x``, and is ``None`` where positions are not rotary.

        With ``context``, made by :meth:`project_context`, ``x`` are the rows before it; the result has both.
        """
        source = self.source
        first, second = (source.get_submodule(name) for name in (self.names.attention_norm, self.names.mlp_norm))
        attended = self.attention.forward(source, self.norm.forward(first, x), rope, cache, context)
        if self.parallel:
            x = x + self.feed_forward.forward(source, self.norm.forward(second, x))
        if context is not None:
            x = torch.cat([x, context.residual], -2)
        if self.parallel:
            return x + attended
        normed, x = self.norm.add_forward(second, attended.to(x.dtype), x)  # autocast's products are narrower
        return x + self.feed_forward.forward(source, normed)

    def dual(self, x: Tensor, rope: Rope | None, context: ContextRows | None = None) -> Tensor:
        """The same on stacked primal and tangent, ``[2, B, S, D]``; ``context`` has no tangent."""
        source = self.source
        first, second = (source.get_submodule(name) for name in (self.names.attention_norm, self.names.mlp_norm))
        attended = self.attention.dual(source, self.norm.dual(first, x), rope, context)
        if self.parallel:
            x = x + self.feed_forward.dual(source, self.norm.dual(second, x))
        if context is not None:
            x = torch.cat([x, torch.stack([context.residual, torch.zeros_like(context.residual)])], -2)
        if self.parallel:
            return x + attended
        normed, x = self.norm.add_dual(second, attended.to(x.dtype), x)
        return x + self.feed_forward.dual(source, normed)

    def project_context(self, x: Tensor, rope: Rope | None, first_row: int) -> ContextRows:
        """What this layer, the first, makes of rows ``x [B, T, D]`` from ``first_row`` on, whatever is before them."""
        source = self.source
        first, second = (source.get_submodule(name) for name in (self.names.attention_norm, self.names.mlp_norm))
        projected = self.attention.project(source, self.norm.forward(first, x), rope)
        if self.parallel:
            x = x + self.feed_forward.forward(source, self.norm.forward(second, x))
        return ContextRows(x, *projected, first_row)


def make_norm(config: DecoderConfig, size: int, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """A module that holds a norm's weight and bias."""
    if config.norm == "rms":
        return nn.RMSNorm(size, config.norm_eps, device=device, dtype=dtype)
    return nn.LayerNorm(size, config.norm_eps, bias=config.norm_bias, device=device, dtype=dtype)


def _linear(layer: nn.Module, name: str, x: Tensor, dual: bool) -> Tensor:
    linear = layer.get_submodule(name)
    return linear_dual(linear, x) if dual else linear(x.contiguous())  # Conv1D takes views of its input


def _join_rows(before: Tensor, after: Tensor) -> Tensor:
    """``[B, H, P, d]`` and ``[B, H, T, d]`` to ``[B, H, P + T, d]``, laid out row by row as projections are."""
    return torch.cat([before.transpose(-2, -3), after.transpose(-2, -3)], -3).transpose(-2, -3)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """:func:`rotary` of ``[..., H, S, d]``: its own dual."""
    return rotary(x.flatten(0, -4), *rope).unflatten(0, x.shape[:-3])


def _add_modules(block: nn.Module, config: DecoderConfig, device: torch.device | None,
                 dtype: torch.dtype | None) -> None:
    """The modules of a layer, under the names of a Llama or Qwen3 of transformers."""

    def linear(rows: int, columns: int, bias: bool) -> nn.Linear:
        module = nn.Linear(rows, columns, bias=bias, device=device, dtype=dtype)
        nn.init.normal_(module.weight, std=0.02)
        if bias:
            nn.init.zeros_(module.bias)
        return module

    width, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_size, config.kv_heads * config.head_size
    block.input_layernorm = make_norm(config, width, device, dtype)
    block.self_attn = nn.ModuleDict({
        "q_proj": linear(width, query, config.qkv_bias), "k_proj": linear(width, key, config.qkv_bias),
        "v_proj": linear(width, key, config.qkv_bias), "o_proj": linear(query, width, config.o_bias)})
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            block.self_attn[name] = make_norm(config, config.head_size, device, dtype)
    block.post_attention_layernorm = make_norm(config, width, device, dtype)
    names = ("gate_proj", "up_proj") if config.activation == "swiglu" else ("up_proj",)
    block.mlp = nn.ModuleDict({name: linear(width, inner, config.mlp_bias) for name in names})
    block.mlp["down_proj"] = linear(inner, width, config.mlp_bias)
