"""Which modules of a model of transformers a decoder reads, and which models it serves exactly (docs/decoder.md).

A model is told by the names of its class and of its modules; transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from gradmem_kernels.checks import Checker
from gradmem_kernels.decoder.block import LayerNames
from gradmem_kernels.decoder.config import ROPE_TYPES, DecoderConfig, RopeScaling
from gradmem_kernels.decoder.decoder import Borrowed

__all__ = ["FAMILIES", "borrow"]

REMEDY = "use the model's own forward with attn_implementation='gradmem' (docs/transformers.md)"
#: "gelu_fast" rounds a constant of "gelu_new" to ten digits.
GELU = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
GATED = {"silu": "swiglu", "swish": "swiglu"}


class _Fields:
    """The fields of a model's configuration, read with the errors of :func:`borrow`."""

    def __init__(self, config: Any) -> None:
        self.config, self.check = config, Checker("Decoder.from_transformers")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.config, name, default)

    def fail(self, name: str, expected: str, got: object) -> NoReturn:
        self.check.fail(f"config.{name}", expected, got if got is None else repr(got), REMEDY)

    def require(self, name: str, *values: Any) -> None:
        """Refuses a field that is there with a value other than these."""
        value = self.get(name, values[0])
        if value not in values:
            self.fail(name, " or ".join(map(repr, values)), value)

    def activation(self, name: str, served: dict[str, str]) -> str:
        value = self.get(name)
        if value not in served:
            self.fail(name, f"one of {', '.join(served)}", value)
        return served[value]

    def rope(self) -> dict[str, Any]:
        """The arguments of :class:`DecoderConfig` for the rotary embedding."""
        parameters = self.rope_parameters
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", *ROPE_TYPES):
            self.fail("rope_parameters['rope_type']", f"one of default, {', '.join(ROPE_TYPES)}", kind)
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {name: parameters[name] for name in names if name in parameters}
        return {"rope_theta": parameters["rope_theta"],
                "rope_scaling": None if kind == "default" else RopeScaling(kind, **scaling)}

    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, from its type."""
        windows = {"full_attention": None, "sliding_attention": self.sliding_window}
        for kind in self.layer_types:
            if kind not in windows:
                self.fail("layer_types", f"each one of {', '.join(windows)}", kind)
        return tuple(windows[kind] for kind in self.layer_types)


@dataclass(frozen=True)
class Family:
    """How one of transformers' classes names its parts and its options.

    Attributes:
        architecture: name of the class.
        base, layers, norm: where the model without head is, and in it the layers and the final norm.
        names: of the modules of a layer.
        read: the arguments of :class:`DecoderConfig` of the fields of a configuration; it refuses what is not served.
        dropout: the fields that hold probabilities of dropout.
        embed_positions, rotary_emb: where in ``base`` these are.
    """

    architecture: str
    base: str
    layers: str
    norm: str
    names: LayerNames
    read: Callable[[_Fields], dict[str, Any]]
    dropout: tuple[str, ...]
    embed_positions: str | None = None
    rotary_emb: str | None = None


def borrow(model: Any) -> tuple[DecoderConfig, Borrowed]:
    """The configuration of a decoder for ``model``, and the modules it is to read; see Decoder.from_transformers."""
    check = Checker("Decoder.from_transformers")
    family = _family(check, model)
    fields = _Fields(model.config)
    fields.require("quantization_config", None)
    fields.require("is_causal", True)
    if len(set((getattr(model, "hf_device_map", None) or {"": None}).values())) > 1:
        check.fail("model.hf_device_map", "one device", model.hf_device_map, REMEDY)
    base = model.get_submodule(family.base)
    rotary = None if family.rotary_emb is None else base.get_submodule(family.rotary_emb)
    rotary_dim = None if rotary is None else 2 * rotary.inv_freq.numel()
    config = DecoderConfig(**family.read(fields), rotary_dim=rotary_dim)
    dropout = ", ".join(f"{name}={fields.get(name)}" for name in family.dropout if fields.get(name))
    layers = tuple(base.get_submodule(family.layers).children())
    if len(layers) != config.num_layers:  # its own forward may run the first of them alone
        check.fail(f"model.{family.base}.{family.layers}", f"the {config.num_layers} layers that the configuration has",
                   len(layers), f"keep both alike, or {REMEDY}")
    modules = Borrowed(
        layers=layers, names=family.names,
        norm=base.get_submodule(family.norm), rotary_emb=rotary, dropout=dropout,
        embed_positions=None if family.embed_positions is None else base.get_submodule(family.embed_positions))
    return config, modules


def _family(check: Checker, model: Any) -> Family:
    """The family of a model, told by its class (a wrapper, such as one of sharding, may be derived from it)."""
    names = [kind.__name__ for kind in type(model).__mro__]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, nn.Module) or model_type not in FAMILIES or FAMILIES[model_type].architecture not in names:
        got = type(model).__name__ if model_type is None else f"{names[0]} (config.model_type {model_type!r})"
        remedy = "pass model.get_base_model()" if hasattr(model, "get_base_model") else REMEDY
        check.fail("model", f"a {', '.join(family.architecture for family in FAMILIES.values())}", got, remedy)
    return FAMILIES[model_type]


def _common(fields: _Fields) -> dict[str, Any]:
    """What Llama and its likes have in common."""
    return {
        "hidden_size": fields.hidden_size, "num_layers": fields.num_hidden_layers,
        "num_heads": fields.num_attention_heads, "num_kv_heads": fields.num_key_value_heads,
        "head_dim": fields.get("head_dim"), "intermediate_size": fields.intermediate_size,
        "norm_eps": fields.rms_norm_eps, "activation": fields.activation("hidden_act", GATED), **fields.rope()}


def _llama(fields: _Fields) -> dict[str, Any]:
    return {**_common(fields), "qkv_bias": fields.attention_bias, "o_bias": fields.attention_bias,
            "mlp_bias": fields.mlp_bias}


def _mistral(fields: _Fields) -> dict[str, Any]:
    return {**_common(fields), "sliding_window": fields.sliding_window}


def _qwen2(fields: _Fields) -> dict[str, Any]:
    return {**_common(fields), "sliding_window": fields.windows(), "qkv_bias": True}


def _qwen3(fields: _Fields) -> dict[str, Any]:
    return {**_common(fields), "sliding_window": fields.windows(), "qk_norm": True,
            "qkv_bias": fields.attention_bias, "o_bias": fields.attention_bias}


def _gpt2(fields: _Fields) -> dict[str, Any]:
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        fields.require(name, False)
    return {
        "hidden_size": fields.n_embd, "num_layers": fields.n_layer, "num_heads": fields.n_head,
        "intermediate_size": fields.n_inner or 4 * fields.n_embd, "norm_eps": fields.layer_norm_epsilon,
        "learned_positions": fields.n_positions, "activation": fields.activation("activation_function", GELU),
        "attention_scale": None if fields.scale_attn_weights else 1.0,
        "norm": "layer", "norm_bias": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True}


def _gpt_neox(fields: _Fields) -> dict[str, Any]:
    return {
        "hidden_size": fields.hidden_size, "num_layers": fields.num_hidden_layers,
        "num_heads": fields.num_attention_heads, "intermediate_size": fields.intermediate_size,
        "norm_eps": fields.layer_norm_eps, "activation": fields.activation("hidden_act", GELU),
        "parallel_residual": fields.use_parallel_residual, "norm": "layer", "norm_bias": True,
        "qkv_bias": fields.attention_bias, "o_bias": fields.attention_bias, "mlp_bias": True, **fields.rope()}


def _like_llama(architecture: str, read: Callable[[_Fields], dict[str, Any]]) -> Family:
    return Family(architecture, "model", "layers", "norm", LayerNames(), read, ("attention_dropout",),
                  rotary_emb="rotary_emb")


#: By ``config.model_type``.
FAMILIES = {
    "llama": _like_llama("LlamaForCausalLM", _llama),
    "mistral": _like_llama("MistralForCausalLM", _mistral),
    "qwen2": _like_llama("Qwen2ForCausalLM", _qwen2),
    "qwen3": _like_llama("Qwen3ForCausalLM", _qwen3),
    "gpt2": Family(
        "GPT2LMHeadModel", "transformer", "h", "ln_f",
        LayerNames(attention_norm="ln_1", qkv=("attn.c_attn",), o="attn.c_proj", mlp_norm="ln_2", up=("mlp.c_fc",),
                   down="mlp.c_proj"),
        _gpt2, ("attn_pdrop", "resid_pdrop", "embd_pdrop"), embed_positions="wpe"),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "gpt_neox", "layers", "final_layer_norm",
        LayerNames(qkv=("attention.query_key_value",), qkv_per_head=True, o="attention.dense",
                   up=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h"),
        _gpt_neox, ("attention_dropout", "hidden_dropout"), rotary_emb="rotary_emb"),
}
