"""Kernels that can be differentiated twice, and WRITE, gradient descent that outer gradients pass through."""

from gradmem_kernels.attention import attention, attention_dual
from gradmem_kernels.backend import BackendError, use_backend
from gradmem_kernels.checks import ArgumentError
from gradmem_kernels.decoder import ContextRows, Decoder, DecoderConfig, KVCache, RopeScaling
from gradmem_kernels.derivatives import HigherOrderError
from gradmem_kernels.gelu import gelu, gelu_dual
from gradmem_kernels.inner_sgd import inner_sgd, inner_sgd_dual
from gradmem_kernels.layer_norm import add_layer_norm, add_layer_norm_dual, layer_norm, layer_norm_dual
from gradmem_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_dual, logits_budget
from gradmem_kernels.prefix import Prefix, PrefixLoss
from gradmem_kernels.ranges import profile_ranges
from gradmem_kernels.recompute import resolve_recompute
from gradmem_kernels.rms_norm import add_rms_norm, add_rms_norm_dual, rms_norm, rms_norm_dual
from gradmem_kernels.rotary import rotary, rotary_dual, rotary_tables
from gradmem_kernels.swiglu import swiglu, swiglu_dual
from gradmem_kernels.update_rules import SGD, UPDATE_RULES, Adam, Momentum, register_update_rule
from gradmem_kernels.write import WriteOutput, write

__version__ = "0.1.0"

__all__ = [
    "SGD", "UPDATE_RULES", "Adam", "ArgumentError", "BackendError", "ContextRows", "Decoder", "DecoderConfig",
    "HigherOrderError", "KVCache", "Momentum", "Prefix", "PrefixLoss", "RopeScaling", "WriteOutput", "add_layer_norm",
    "add_layer_norm_dual", "add_rms_norm", "add_rms_norm_dual", "attention", "attention_dual", "gelu", "gelu_dual",
    "inner_sgd", "inner_sgd_dual", "layer_norm", "layer_norm_dual", "linear_cross_entropy", "linear_cross_entropy_dual",
    "logits_budget", "profile_ranges", "register_update_rule", "resolve_recompute", "rms_norm", "rms_norm_dual",
    "rotary", "rotary_dual", "rotary_tables", "swiglu", "swiglu_dual", "use_backend", "write",
]
