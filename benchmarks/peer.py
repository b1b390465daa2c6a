"""The model of the paper's repository (yurakuratov/gradmem, ``grad_memgpt.py``), from a checkout named on the command
line: it is neither copied nor a dependency."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.shapes import Shape

__all__ = ["MODULE", "load", "use"]

MODULE = "grad_memgpt"
#: A token that no data has: its code takes positions of the padding token out of the loss.
NO_PADDING = -1


def use(path: str) -> None:
    """Makes the checkout importable, here and in processes that start later.

    Raises:
        SystemExit: if it is none.
    """
    folder = Path(path).resolve()
    if not (folder / f"{MODULE}.py").is_file():
        raise SystemExit(f"--peer-path: expected a checkout of the paper's repository, with {MODULE}.py, got {path}")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def load(shape: Shape, dtype: torch.dtype, lr: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with a Llama backbone of this shape, and its weights by the names that the benchmarks give them.

    Raises:
        ImportError: without a checkout, or what that imports.
    """
    module = importlib.import_module(MODULE)
    from transformers import LlamaConfig

    base = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        rms_norm_eps=1e-6, tie_word_embeddings=bool(shape.tied), bos_token_id=None, eos_token_id=None,
        pad_token_id=None, max_position_embeddings=shape.memory_tokens + shape.context_tokens + shape.query_tokens)
    model = module.GradMemGPT(module.GradMemGPTConfig(
        base_config=base, n_mem_tokens=shape.memory_tokens, K=shape.steps, lr=lr)).to(dtype)
    model.model.config.pad_token_id = NO_PADDING
    weights = {"embedding": model.model.get_input_embeddings().weight, "memory": model.mem}
    if not shape.tied:
        weights["head"] = model.model.get_output_embeddings().weight
    layers = {name: weight for name, weight in model.model.model.named_parameters()
              if not name.startswith("embed_tokens")}
    return model, weights | layers
