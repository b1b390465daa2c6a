"""By which forward a model of transformers becomes a backbone, and why."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradmem.adapters import adapter_layers
from gradmem.config import GradMemConfig
from gradmem.first_order import PACKAGES
from gradmem.hub import load_model
from gradmem.lm import Backbone, TransformersLM
from gradmem.own_forward import OwnForwardLM
from gradmem_kernels.checks import ArgumentError, Checker

__all__ = ["FORWARDS", "Chosen", "choose_backbone"]

FORWARDS = ("auto", "fused", "own")


@dataclass(frozen=True)
class Chosen:
    """How a model of transformers is run.

    Attributes:
        forward: ``"fused"``: by the fused decoder, over the model's modules. ``"own"``: by the model's own forward.
        reason: why.
    """

    forward: str
    reason: str

    def __str__(self) -> str:
        return {"fused": "the fused decoder", "own": "the model's own forward"}[self.forward] + f": {self.reason}"


def choose_backbone(model: Any, config: GradMemConfig, forward: str,
                    attn_implementation: str) -> tuple[Backbone, Chosen]:
    """The backbone over ``model``; see :meth:`gradmem.GradMem.from_pretrained_backbone`."""
    check = Checker("GradMem.from_pretrained_backbone")
    if forward not in FORWARDS:
        check.fail("forward", f"one of {', '.join(FORWARDS)}", repr(forward))
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        model = load_model(str(model))
    if hasattr(model, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
            check.fail("model", "adapters of weights", "prompt tuning, whose rows are a memory of their own",
                       "pass the base model")
        model = model.get_base_model()  # adapters stay where they are in it
    if forward == "own":
        backbone, chosen = None, Chosen("own", "as asked")
    else:
        backbone, chosen = _fused(model, config, asked=forward == "fused")
    if backbone is None:
        backbone = OwnForwardLM(model, attn_implementation=attn_implementation)
        runs = model.config._attn_implementation
        if runs != attn_implementation:
            chosen = Chosen("own", f"{chosen.reason}; its layers cannot choose their attention, and keep {runs!r}")
    _log(f"{type(model).__name__} is run by {chosen}")
    return backbone, chosen


def _fused(model: Any, config: GradMemConfig, *, asked: bool) -> tuple[Backbone | None, Chosen]:
    try:
        backbone = TransformersLM(model)
    except ArgumentError as reason:
        if asked:
            raise
        return None, Chosen("own", str(reason).partition("; ")[0])
    changed = _changed(model)
    if changed and not asked:
        return None, Chosen("own", f"{changed} has code or hooks that are not of transformers, and would not be run")
    dropout = backbone.decoder.borrowed_dropout
    if config.write_lora_rank and config.write_lora_dropout:
        dropout = f"{dropout}{', ' * bool(dropout)}write_lora_dropout={config.write_lora_dropout}"
    if dropout and not asked:
        return None, Chosen("own", f"it drops in training ({dropout}), which has no dual form; load it with these set "
                                   f"to 0.0 for the fused decoder")
    return backbone, Chosen("fused", "as asked" if asked else "its architecture is served, with a dual form")


def _changed(model: nn.Module) -> str:
    """A module with a forward or hooks of somebody's own, which the fused decoder would pass over; empty for none.

    It runs linear maps, embeddings and adapters as they are. Kernels of the packages that are known compute what they
    stand in for.
    """
    adapters = tuple(f"{name}." for name in adapter_layers(model))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or f"{name}.".startswith(adapters):
            continue
        root = str(getattr(module.forward, "__module__", "")).partition(".")[0]
        hooks = module._forward_hooks or module._forward_pre_hooks
        if root not in ("torch", "transformers", *PACKAGES) or (hooks and type(module).__name__ != "Conv1D"):
            return f"model.{name}" if name else type(module).__name__
    return ""


@functools.cache  # once
def _log(message: str) -> None:
    logging.getLogger("gradmem").info(message)
