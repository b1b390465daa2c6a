"""A Llama-family decoder with a plain and a dual form, over input embeddings (docs/decoder.md).

Every layer is a method of its own block, plain (``forward``) and dual (``dual``), that reads its parameters when it is
called and goes through its submodules. The dual form carries primal and tangent stacked in a leading dimension of 2,
so that a linear layer is one matrix product on twice the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradmem_kernels.attention import attention, attention_dual
from gradmem_kernels.checks import Checker
from gradmem_kernels.rms_norm import rms_norm, rms_norm_dual
from gradmem_kernels.rotary import rotary, rotary_tables
from gradmem_kernels.swiglu import swiglu, swiglu_dual

__all__ = ["Decoder", "DecoderConfig", "KVCache", "linear_dual"]

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a :class:`Decoder`.

    Args:
        hidden_size: width ``D`` of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads.
        intermediate_size: width of the SwiGLU.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; ``num_heads`` by default.
        head_dim: ``hidden_size // num_heads`` by default.
        norm_eps: of the RMS norms.
        rope_theta: base of the rotary angles.
        rotary_dim: number of leading channels of a head that are rotated, even; ``head_dim`` by default.

    Raises:
        ArgumentError: if a size is not positive, or heads do not divide.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rotary_dim: int | None = None

    def __post_init__(self) -> None:
        check = Checker("DecoderConfig")
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                check.fail(name, "an integer >= 1", value)
        check.number("norm_eps", self.norm_eps, minimum=0.0)
        check.number("rope_theta", self.rope_theta, above=0.0)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            check.fail("num_heads", f"a divisor of hidden_size, {self.hidden_size}", self.num_heads,
                       "or give head_dim")
        if self.num_heads % self.kv_heads:
            check.fail("num_kv_heads", f"a divisor of num_heads, {self.num_heads}", self.num_kv_heads)
        if self.rotated % 2 or not 0 < self.rotated <= self.head_size:
            check.fail("rotary_dim", f"an even number in 2..{self.head_size} (the head dimension)", self.rotated)

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotated(self) -> int:
        return self.head_size if self.rotary_dim is None else self.rotary_dim


def linear_dual(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear layer on stacked primal and tangent ``[2, ...]``: one product; a bias enters the primal half only.

    A module that wraps one (an adapter, say) is run as it is, and its value at 0 taken off the tangent.
    """
    if type(linear) is not nn.Linear:  # a subclass may compute something else
        offset = linear(torch.zeros_like(x[0]).narrow(-2, 0, 1))
        return linear(x) - torch.stack([torch.zeros_like(offset), offset])
    bias = cast("Tensor | None", linear.bias)
    if bias is None:
        return linear(x)
    both = torch.stack([bias, torch.zeros_like(bias)])
    return F.linear(x, linear.weight) + both.view(2, *(1,) * (x.dim() - 2), -1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)

    def dual(self, x: Tensor) -> Tensor:
        primal, tangent = x.unbind()
        return torch.stack(rms_norm_dual(primal, self.weight, tangent, eps=self.eps))


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.head_size = config.head_size
        query, key = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = _linear(config.hidden_size, query, device, dtype)
        self.k_proj = _linear(config.hidden_size, key, device, dtype)
        self.v_proj = _linear(config.hidden_size, key, device, dtype)
        self.o_proj = _linear(query, config.hidden_size, device, dtype)

    def forward(self, x: Tensor, rope: Rope, cache: _LayerCache | None = None) -> Tensor:
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotary(q, *rope), rotary(k, *rope)
        if cache is None:
            o = attention(q, k, v, causal=True)
        else:
            k, v = cache.append(k, v)
            o = attention(q, k, v, causal=cache.seqlens is None, seqlens=cache.seqlens)
        return self.o_proj(o.transpose(-2, -3).flatten(-2))

    def dual(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v = (self._heads(linear_dual(proj, x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        (q, q_t), (k, k_t) = (rotary(t.flatten(0, 1), *rope).unflatten(0, (2, -1)).unbind() for t in (q, k))
        v, v_t = v.unbind()
        o = torch.stack(attention_dual(q, k, v, q_t, k_t, v_t, causal=True))
        return linear_dual(self.o_proj, o.transpose(-2, -3).flatten(-2))

    def _heads(self, t: Tensor) -> Tensor:
        """[..., S, H * d] -> [..., H, S, d]"""
        return t.unflatten(-1, (-1, self.head_size)).transpose(-2, -3)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, device, dtype)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, device, dtype)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    def dual(self, x: Tensor) -> Tensor:
        gate, gate_t = linear_dual(self.gate_proj, x).unbind()
        up, up_t = linear_dual(self.up_proj, x).unbind()
        return linear_dual(self.down_proj, torch.stack(swiglu_dual(gate, up, gate_t, up_t)))


class Block(nn.Module):
    """One layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: DecoderConfig, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, device, dtype)
        self.self_attn = SelfAttention(config, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, device, dtype)
        self.mlp = MLP(config, device, dtype)

    def forward(self, x: Tensor, rope: Rope, cache: _LayerCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def dual(self, x: Tensor, rope: Rope) -> Tensor:
        """The same on stacked primal and tangent, ``[2, B, S, D]``."""
        x = x + self.self_attn.dual(self.input_layernorm.dual(x), rope)
        return x + self.mlp.dual(self.post_attention_layernorm.dual(x))


class Decoder(nn.Module):
    """Llama-family decoder without embeddings and head: RMSNorm, rotary, grouped-query attention, SwiGLU, causal.

    Parameter names are those of a ``transformers`` Llama model, so that its state dict loads.

    Args:
        config: its shape.
        device, dtype: of its parameters.

    Source: Touvron et al., LLaMA, arXiv 2302.13971; the dual form is derived in docs/decoder.md.
    """

    def __init__(self, config: DecoderConfig, *, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, device, dtype) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, device, dtype)
        self._tables: dict[tuple[torch.device, torch.dtype], Rope] = {}

    def forward(self, inputs_embeds: Tensor, *, start: int = 0) -> Tensor:
        """Hidden states ``[B, S - start, D]`` of the rows from ``start`` on, after the final norm.

        Args:
            inputs_embeds: ``[B, S, D]``, of the parameters' dtype.
            start: first row whose hidden state is wanted, in ``0..S``.
        """
        x = self._check("Decoder", inputs_embeds, start)
        rope = self._rope(x.shape[1], x)
        for layer in self.layers:
            x = layer(x, rope)
        return self.norm(x[:, start:])

    def dual(self, inputs_embeds: Tensor, inputs_embeds_t: Tensor, *, start: int = 0,
             checkpoint_layers: bool = False) -> tuple[Tensor, Tensor]:
        """:meth:`forward` and its tangent along ``inputs_embeds_t``: returns ``hidden, hidden_t``.

        With ``checkpoint_layers`` only the ``[2, B, S, D]`` between the layers is kept for the backward pass, which
        runs each layer's dual form again.
        """
        self._check("Decoder.dual", inputs_embeds, start)
        Checker("Decoder.dual").tangent("inputs_embeds_t", inputs_embeds_t, inputs_embeds)
        x = torch.stack([inputs_embeds, inputs_embeds_t])
        rope = self._rope(x.shape[2], x)
        for layer in cast(Iterable[Block], self.layers):
            if checkpoint_layers:
                x = checkpoint(layer.dual, x, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer.dual(x, rope)
        hidden, hidden_t = self.norm.dual(x[:, :, start:]).unbind()
        return hidden, hidden_t

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``capacity`` positions."""
        weight = self.norm.weight
        shape = (batch, self.config.kv_heads, capacity, self.config.head_size)
        keys, values = ([weight.new_zeros(shape) for _ in self.layers] for _ in range(2))
        return KVCache(keys, values, torch.zeros(batch, dtype=torch.int64, device=weight.device), 0)

    @torch.no_grad()
    def prefill(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        """Appends ``T`` positions to every row of ``cache``; their hidden states ``[B, T, D]``, without a graph.

        Raises:
            ArgumentError: if the rows of ``cache`` have different lengths, or have no room left.
        """
        x = self._check("Decoder.prefill", inputs_embeds, 0)
        first, rows = cache.common_length("Decoder.prefill"), x.shape[1]
        cache.check_room("Decoder.prefill", x, first + rows)
        cos, sin = self._rope(first + rows, x)
        rope = cos[first:], sin[first:]
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, _LayerCache(cache.keys[index], cache.values[index], slice(first, first + rows), None))
        cache.advance(rows)
        return self.norm(x)

    @torch.no_grad()
    def step(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        """Appends one position to every row of ``cache``, each at its own length; ``[B, 1, D]``, without a graph."""
        x = self._check("Decoder.step", inputs_embeds, 0)
        check = Checker("Decoder.step")
        if x.shape[1] != 1:
            check.fail("inputs_embeds", "one position a row, [B, 1, D]", list(x.shape))
        cache.check_room("Decoder.step", x, cache.longest + 1)
        config, lengths = self.config, cache.lengths
        rope = rotary_tables(lengths.unsqueeze(-1), config.rotated, theta=config.rope_theta, dtype=x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, _LayerCache(cache.keys[index], cache.values[index], lengths, lengths + 1))
        cache.advance(1)
        return self.norm(x)

    def _rope(self, length: int, x: Tensor) -> Rope:
        """The first rows of tables that are made once for each device and dtype, and grow when needed."""
        tables = self._tables.get((x.device, x.dtype))
        if tables is None or tables[0].shape[0] < length:
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(max(64, 1 << (length - 1).bit_length()), device=x.device)
                tables = rotary_tables(positions, self.config.rotated, theta=self.config.rope_theta, dtype=x.dtype)
            if torch._C._functorch.is_functorch_wrapped_tensor(tables[0]):
                return tables[0][:length], tables[1][:length]  # it must not outlive its transform
            self._tables[x.device, x.dtype] = tables
        return tables[0][:length], tables[1][:length]

    def _check(self, op: str, inputs_embeds: Tensor, start: int) -> Tensor:
        check = Checker(op)
        check.tensor("the decoder's weight", self.norm.weight, ("D",))
        check.tensor("inputs_embeds", inputs_embeds, ("B", "S", "D"))
        if not isinstance(start, int) or not 0 <= start <= inputs_embeds.shape[1]:
            check.fail("start", f"a row in 0..{inputs_embeds.shape[1]}", start)
        return inputs_embeds


@dataclass
class KVCache:
    """Keys and values of the positions seen so far, ``[B, Hkv, capacity, d]`` a layer, right-padded.

    ``lengths [B]`` counts the positions of each row. ``longest`` bounds it without a look at the device.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    longest: int
    ragged: bool = False

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def repeat(self, n: int, capacity: int) -> KVCache:
        """A new cache with every row repeated ``n`` times (row ``b`` becomes ``b * n .. b * n + n - 1``)."""
        if capacity < self.longest:
            Checker("KVCache.repeat").fail("capacity", f"at least the positions held, {self.longest}", capacity)

        def grow(t: Tensor) -> Tensor:
            rows = t[:, :, : self.longest].repeat_interleave(n, 0)
            return F.pad(rows, (0, 0, 0, capacity - self.longest))

        return KVCache([grow(k) for k in self.keys], [grow(v) for v in self.values],
                       self.lengths.repeat_interleave(n), self.longest, self.ragged)

    def truncate(self, lengths: Tensor) -> None:
        """Keeps the first ``lengths[b]`` positions of row ``b``; the others are written over by what comes next."""
        check = Checker("KVCache.truncate")
        check.sizes["B"] = self.lengths.shape[0]
        check.tensor("lengths", lengths, ("B",), dtypes=(torch.int32, torch.int64))
        self.lengths, self.ragged = lengths.to(torch.int64), True

    def advance(self, positions: int) -> None:
        self.lengths, self.longest = self.lengths + positions, self.longest + positions

    def common_length(self, op: str) -> int:
        if self.ragged:
            Checker(op).fail("cache", "rows of one length", "rows of different lengths",
                             "append to ragged rows one position at a time, with Decoder.step")
        return self.longest

    def check_room(self, op: str, x: Tensor, length: int) -> None:
        check = Checker(op)
        if x.shape[0] != self.lengths.shape[0]:
            check.fail("inputs_embeds", f"the cache's batch size, {self.lengths.shape[0]}", x.shape[0])
        if length > self.capacity:
            check.fail("cache", f"room for {length} positions", f"a capacity of {self.capacity}",
                       "make it with a larger capacity")


@dataclass
class _LayerCache:
    """One layer of a :class:`KVCache`, and where the next positions go in it."""

    keys: Tensor
    values: Tensor
    at: slice | Tensor  # the same rows for every sample, or one row for each
    seqlens: Tensor | None

    def append(self, k: Tensor, v: Tensor) -> Rope:
        """Stores the new keys and values; returns all that the queries may see."""
        for store, new in ((self.keys, k), (self.values, v)):
            if isinstance(self.at, slice):
                store[:, :, self.at] = new
            else:
                store[torch.arange(store.shape[0], device=store.device), :, self.at] = new.squeeze(2)
        end = self.at.stop if isinstance(self.at, slice) else None
        return self.keys[:, :, :end], self.values[:, :, :end]


def _linear(rows: int, columns: int, device: torch.device | None, dtype: torch.dtype | None) -> nn.Linear:
    linear = nn.Linear(rows, columns, bias=False, device=device, dtype=dtype)
    nn.init.normal_(linear.weight, std=0.02)
    return linear
