"""What a decoder is made of: its sizes, and the options in which the families differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

from gradmem_kernels.checks import Checker

__all__ = ["ACTIVATIONS", "DecoderConfig", "RopeScaling"]

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh")
NORMS = ("rms", "layer")
ROPE_TYPES = ("linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are slowed down for longer contexts than those of pre-training.

    Args:
        rope_type: ``"linear"``: all frequencies are divided by ``factor``. ``"llama3"``: those are whose wavelength
            exceeds ``original_max_position_embeddings / low_freq_factor``, none whose wavelength is below
            ``original_max_position_embeddings / high_freq_factor``, and between the two they are interpolated.
        factor: >= 1.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: of ``"llama3"``.

    Raises:
        ArgumentError: for another type or value.

    Source: ``transformers``' modeling_rope_utils.py, whose names these are.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        check = Checker("RopeScaling")
        if self.rope_type not in ROPE_TYPES:
            check.fail("rope_type", f"one of {', '.join(ROPE_TYPES)}", repr(self.rope_type))
        check.number("factor", self.factor, minimum=1.0)
        check.number("low_freq_factor", self.low_freq_factor, above=0.0)
        check.number("high_freq_factor", self.high_freq_factor, above=self.low_freq_factor)
        check.integer("original_max_position_embeddings", self.original_max_position_embeddings, minimum=1)


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a :class:`Decoder`. The defaults are those of Llama.

    Args:
        hidden_size: width ``D`` of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads.
        intermediate_size: width of the feed-forward block.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; ``num_heads`` by default.
        head_dim: ``hidden_size // num_heads`` by default.
        norm_eps: of the norms.
        rope_theta: base of the rotary angles.
        rotary_dim: number of leading channels of a head that are rotated, even; ``head_dim`` by default.
        rope_scaling: how the rotary frequencies are slowed down; ``None``: not at all.
        learned_positions: rows of a learned table that is added to the input embeddings in the place of the rotary
            embedding: row ``s`` of ``inputs_embeds`` (after what a cache holds) gets row ``s`` of the table.
        norm: ``"rms"`` or ``"layer"``.
        norm_bias: whether layer norms have a bias.
        activation: ``"swiglu"`` (a gated block), ``"gelu"`` or ``"gelu_tanh"`` (a plain block).
        qkv_bias, o_bias, mlp_bias: whether the projections to queries, keys and values, the attention's output
            projection, and the linear layers of the feed-forward block have biases.
        qk_norm: whether queries and keys are normed head by head, before they are rotated.
        parallel_residual: ``x + attention(norm1(x)) + mlp(norm2(x))`` rather than one after the other.
        sliding_window: keys that a query sees, itself included; ``None`` for all; or a tuple of these for the layers.
        attention_scale: factor of the scores, ``head_dim ** -0.5`` by default.

    Raises:
        ArgumentError: if a size is not positive, heads do not divide, or options exclude each other.
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
    rope_scaling: RopeScaling | None = None
    learned_positions: int | None = None
    norm: str = "rms"
    norm_bias: bool = False
    activation: str = "swiglu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    sliding_window: int | tuple[int | None, ...] | None = None
    attention_scale: float | None = None

    def __post_init__(self) -> None:
        check = Checker("DecoderConfig")
        scaling, window = cast(Any, self.rope_scaling), cast(Any, self.sliding_window)  # JSON gives these types
        if isinstance(scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))
        if isinstance(window, list):
            object.__setattr__(self, "sliding_window", tuple(window))
        self._check_sizes(check)
        self._check_positions(check)
        for name, allowed in (("norm", NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                check.fail(name, f"one of {', '.join(allowed)}", repr(getattr(self, name)))
        for name in ("norm_bias", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "parallel_residual"):
            check.boolean(name, getattr(self, name))
        if self.norm_bias and self.norm == "rms":
            check.fail("norm_bias", "False with norm='rms'", True, "RMS norms have no bias")
        if isinstance(self.sliding_window, tuple) and len(self.sliding_window) != self.num_layers:
            check.fail("sliding_window", f"a window for each of the {self.num_layers} layers", self.sliding_window)
        for layer in range(self.num_layers):
            if self.window(layer) is not None:
                check.integer("sliding_window", self.window(layer), minimum=1)
        if self.attention_scale is not None:
            check.number("attention_scale", self.attention_scale, above=0.0)

    def _check_sizes(self, check: Checker) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "num_kv_heads", "head_dim",
                     "learned_positions"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                check.fail(name, "an integer >= 1", value)
        check.number("norm_eps", self.norm_eps, minimum=0.0)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            check.fail("num_heads", f"a divisor of hidden_size, {self.hidden_size}", self.num_heads,
                       "or give head_dim")
        if self.num_heads % self.kv_heads:
            check.fail("num_kv_heads", f"a divisor of num_heads, {self.num_heads}", self.num_kv_heads)

    def _check_positions(self, check: Checker) -> None:
        check.number("rope_theta", self.rope_theta, above=0.0)
        if self.learned_positions is not None:
            for name in ("rotary_dim", "rope_scaling"):
                if getattr(self, name) is not None:
                    check.fail(name, "None with learned_positions", getattr(self, name),
                               "positions are either learned or rotary")
        elif self.rotated % 2 or not 0 < self.rotated <= self.head_size:
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

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer."""
        return self.sliding_window[layer] if isinstance(self.sliding_window, tuple) else self.sliding_window

    def to_dict(self) -> dict[str, Any]:
        """Its fields by name, in types that JSON has."""
        return asdict(self)
