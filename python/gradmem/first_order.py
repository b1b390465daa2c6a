"""Which kernels of a model of transformers have no second derivative, or a wrong one: told by name, before they run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn

from gradmem_kernels.checks import Checker

__all__ = ["refuse_first_order_kernels"]

#: Packages whose autograd functions compute gradients that autograd cannot differentiate, or only seems to.
PACKAGES = ("apex", "causal_conv1d", "cut_cross_entropy", "fla", "flash_attn", "flash_attn_interface", "liger_kernel",
            "mamba_ssm", "quack", "transformer_engine", "unsloth", "xformers")
#: Parts of names of attention implementations without a second derivative; "/" names a kernel of the hub.
ATTENTION = ("flash", "flex", "sdpa", "paged", "/")
#: Implementations of experts that are kernels of the hub.
EXPERTS = ("deepgemm", "sonicmoe")


def refuse_first_order_kernels(op: str, model: nn.Module) -> None:
    """Refuses a model that runs kernels which second-order WRITE cannot be trained through.

    Raises:
        ArgumentError: naming the kernel and the remedy.
    """
    for name, found, remedy in _found(model):
        Checker(op).fail(name, "kernels that are right at second order", found,
                         f"{remedy}, or train with order='first'")


def _found(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    can_choose = getattr(model, "_can_set_attn_implementation", lambda: True)()
    for name, module in model.named_modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(implementation, str) and any(part in implementation for part in ATTENTION):
            yield ("attn_implementation", repr(implementation),
                   "call model.set_attn_implementation('gradmem') (or 'eager')" if can_choose
                   else "load the model with attn_implementation='eager', as it cannot choose later")
        experts = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if experts in EXPERTS:
            yield ("experts_implementation", repr(experts),
                   "call model.set_experts_implementation('grouped_mm') (or 'eager')")
        if getattr(module, "use_kernels", False) is True:
            yield "use_kernels", "True", "load the model with use_kernels=False"
        for owner in (type(module), type(module).forward, module.forward):
            if _package(owner):
                yield _at(name, module), f"a forward of {_package(owner)}", _unpatched(owner)
    # patches replace functions of a model's file, and PyTorch's cross-entropy, too
    for file in dict.fromkeys(type(module).__module__ for module in model.modules()):
        for key, value in vars(sys.modules.get(file, object)).items():
            if _package(value) == "liger_kernel":
                yield f"{file}.{key}", "a function of liger_kernel", _unpatched(value)
    if _package(F.cross_entropy):
        yield "torch.nn.functional.cross_entropy", f"that of {_package(F.cross_entropy)}", _unpatched(F.cross_entropy)


def _package(value: Any) -> str:
    """The package of :data:`PACKAGES` that a class or function comes from; empty for any other."""
    root = str(getattr(value, "__module__", "")).partition(".")[0]
    return root if root in PACKAGES else ""


def _at(name: str, module: nn.Module) -> str:
    return f"model.{name}" if name else type(module).__name__


def _unpatched(value: Any) -> str:
    return f"load the model in a process that does not patch it with {_package(value)}"
