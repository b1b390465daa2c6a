"""LoRA matrices that take part in WRITE alone, as adapters of ``peft`` that are off otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from gradmem.config import GradMemConfig
from gradmem.hub import optional_library
from gradmem_kernels.checks import Checker

__all__ = ["ADAPTER", "WriteAdapter", "adapter_layers", "freeze"]

#: Name of the adapter, and part of the names of its parameters.
ADAPTER = "gradmem_write"


class WriteAdapter:
    """Low-rank terms beside linear layers of a model, added when it is made, on within :meth:`enabled`.

    Args:
        model: of transformers; its own parameters stay trainable or frozen as they are.
        config: its ``write_lora_*``.

    Raises:
        MissingExtraError: without peft.
        ArgumentError: for a model that has adapters already, names of no layer, the embeddings or the head.
    """

    def __init__(self, model: nn.Module, config: GradMemConfig) -> None:
        peft = optional_library("peft", "write_lora_rank")
        check = Checker("GradMem")
        if adapter_layers(model):
            check.fail("write_lora_rank", "0 for a model that has adapters of peft", config.write_lora_rank,
                       "merge them into the model (merge_and_unload)")
        names = config.write_lora_targets
        lora = peft.LoraConfig(
            r=config.write_lora_rank, lora_alpha=config.write_lora_alpha, lora_dropout=config.write_lora_dropout,
            target_modules=names if names == "all-linear" else _targets(check, model, names))
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            peft.inject_adapter_in_model(lora, model, ADAPTER)
        except ValueError as reason:
            check.fail("write_lora_targets", "names of linear layers of the model, separated by commas", repr(names),
                       str(reason).partition("\n")[0])
        for name, p in model.named_parameters():  # peft freezes the model
            p.requires_grad_(trained.get(name.replace(".base_layer.", "."), True))
        self.on = False
        self._layers = list(adapter_layers(model).values())
        self._switch(False)

    @contextlib.contextmanager
    def enabled(self, on: bool = True) -> Iterator[None]:
        """Within it the adapter takes part, or does not."""
        before = self.on
        self._switch(on)
        try:
            yield
        finally:
            self._switch(before)

    def remembered(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A ``checkpoint(function, *args)`` that runs the function again with the adapter as it was."""
        if getattr(checkpoint, "adapter", None) is self:
            return checkpoint

        def run(function: Callable[..., Any], *args: Any) -> Any:
            on = self.on

            def again(*args: Any) -> Any:
                with self.enabled(on):
                    return function(*args)

            return checkpoint(again, *args)

        run.adapter = self  # type: ignore[attr-defined]
        return run

    @staticmethod
    def base_state(model: nn.Module) -> dict[str, Tensor]:
        """The state of a model without its adapter, by the names that it has without one."""
        return {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items()
                if ADAPTER not in name.split(".")}

    def _switch(self, on: bool) -> None:
        self.on = on
        for layer in self._layers:
            layer._disable_adapters = not on  # enable_adapters would also freeze what is off


def _targets(check: Checker, model: Any, names: str) -> list[str]:
    """The ``names``, each of which is the end of a layer's; peft itself passes over those that are of none."""
    targets = [name.strip() for name in names.split(",")]
    head, found = model.get_output_embeddings(), set()
    for name, module in model.named_modules():
        mine = [target for target in targets if f".{name}".endswith(f".{target}")]
        if mine and (module is head or isinstance(module, nn.Embedding)):
            check.fail("write_lora_targets", "layers between embeddings and head", repr(name),
                       "set write_head=True for a head of WRITE's own" if module is head else "")
        found.update(mine)
    for target in targets:
        if target not in found:
            check.fail("write_lora_targets", "names of linear layers of the model, separated by commas", repr(target))
    return targets


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The modules of a model that adapters of ``peft`` have replaced, by their names."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # not loaded: nothing of it can be in the model
    if tuners is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)}


def freeze(model: nn.Module) -> None:
    """Freezes a model's parameters, except those of adapters of ``peft`` in it."""
    for name, p in model.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            p.requires_grad_(False)
