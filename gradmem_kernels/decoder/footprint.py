"""What the activations of WRITE and its outer backward take on a decoder. Derivation: docs/write.md."""

from __future__ import annotations

from gradmem_kernels.decoder.config import DecoderConfig

__all__ = ["footprint"]


def footprint(config: DecoderConfig, recompute: str, *, batch: int, prefix_rows: int, context_rows: int, steps: int,
              element_size: int, trained: bool) -> int:
    """Bytes of activations alive at once, at the most, in ``steps`` steps of WRITE and their outer backward.

    An estimate from sizes alone, of what grows with them: weights, their gradients, the ``M_k``, a chunk of logits and
    what a kernel needs for itself are not in it.

    Args:
        config: the decoder's.
        recompute: ``"none"``, ``"step"`` or ``"layer"``.
        batch: samples ``B``.
        prefix_rows, context_rows: rows a sample that the decoder reads, of the prefix and behind it.
        steps: K.
        element_size: bytes of an element of the activations.
        trained: whether the decoder's weights get meta-gradients; frozen ones let the inputs of their products go.
    """
    rows, layers = batch * (prefix_rows + context_rows), config.num_layers
    width, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_size, config.kv_heads * config.head_size
    gates = inner * (2 if config.activation == "swiglu" else 1)

    # what a layer keeps: inputs of the norms and of qk_norm, of attention with its output, of the activation; and of
    # the products with trained weights
    streams = width if config.parallel_residual else 2 * width
    normed = query + key if config.qk_norm else 0
    operands = streams + 2 * (query + key) + gates + normed
    products = (2 * width + inner) if trained else 0
    dual = 2 * (operands + products + (query if trained else 0))
    # reverse over reverse keeps the cotangents too: of norms, attention and activation, and of trained products
    both = operands + products + 4 * width + normed + query + inner + (query + 2 * key + gates if trained else 0)
    cotangents = gates + inner + 2 * width  # inside the layer that a backward pass is in

    shared = context_rows * batch * (width + query + 2 * key) * (2 if trained else 1)
    head = batch * (context_rows + 1) * 4 * width  # hidden states and their cotangents, primal and tangent
    if recompute == "none":
        return element_size * (rows * (steps * layers * both + 2 * cotangents) + shared + steps * head)
    outer = layers * dual if recompute == "step" else layers * 2 * width + dual
    # the inner step itself has the graph of a plain forward pass, in every layer
    inner_step = layers * operands + cotangents
    return element_size * (rows * max(outer + 2 * cotangents, inner_step) + shared + head)
