"""A memory as a prompt-tuning adapter of ``peft``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gradmem.adapters import adapter_layers
from gradmem.files import replacing, save_tensors
from gradmem.lm import PretrainedBackbone
from gradmem_kernels.checks import Checker

if TYPE_CHECKING:
    from gradmem.memory import Memory
    from gradmem.model import GradMem

__all__ = ["export_peft"]


def export_peft(memory: Memory, model: GradMem, path: Path, base_model: str | None) -> None:
    """Writes what READ puts before a query, ``[P, D]``, as the adapter's virtual tokens: :meth:`Memory.export_peft`."""
    check = Checker("Memory.export_peft")
    if not isinstance(model.backbone, PretrainedBackbone):
        check.fail("model", "a model whose backbone is a model of transformers", type(model.backbone).__name__,
                   "peft adapts models of transformers alone")
    adapted = next((name for name, layer in adapter_layers(model.backbone).items()
                    if layer.active_adapters and not (layer.merged or layer.disable_adapters)), "")
    if adapted:
        check.fail("model", "a backbone without active adapters", f"one at {adapted}",
                   "merge them into the base model (merge_and_unload), or disable those that only WRITE uses")
    memory.check_finite(path)
    device = model.memory_init.device
    rows = model.prompt_embeds(memory.to(device), torch.empty(1, 0, dtype=torch.int64, device=device))[0]
    config = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": base_model or model.backbone.name_or_path or None,
        "num_virtual_tokens": rows.shape[0], "token_dim": rows.shape[1], "num_transformer_submodules": 1,
        "num_attention_heads": model.backbone.heads, "num_layers": model.backbone.layers,
        "prompt_tuning_init": "RANDOM",
    }
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / "adapter_model.safetensors", "peft", 1, {"prompt_embeddings": rows}, memory.about())
    with replacing(path / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
