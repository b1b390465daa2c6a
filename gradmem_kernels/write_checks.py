"""What :func:`gradmem_kernels.write` takes, and what a loss and a rule may give it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradmem_kernels.checks import FLOAT_DTYPES, Checker
from gradmem_kernels.learning_rates import LearningRate, check_rates
from gradmem_kernels.recompute import RECOMPUTE
from gradmem_kernels.update_rules import SGD, Update

__all__ = ["ORDERS", "Memory", "check_arguments", "checked_loss", "checked_state"]

Tensors = tuple[Tensor, ...]
Memory = Tensor | Tensors

ORDERS = ("none", "first", "second")


def check_arguments(loss_fn: Any, memory: Memory, steps: int, lr: LearningRate | None, params: Iterable[Tensor] | None,
                    order: str, second_order_steps: int | None, recompute: str, clip_value: float | None,
                    clip_norm: float | None, update: Update | None) -> tuple[Tensors, Tensors | None, Update]:
    """Checks every argument; returns the memory tensors, the params and the rule."""
    check = Checker("write")
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        check.fail("loss_fn", "a call outside torch.func transforms and forward mode", "a call inside one",
                   "differentiate through write with torch.autograd, or transform loss_fn itself")
    if not callable(loss_fn):
        check.fail("loss_fn", "a callable", type(loss_fn).__name__)
    tensors = _check_memory(check, memory)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        check.fail("steps", "an integer >= 0", steps)
    for name, value, choices in (("order", order, ORDERS), ("recompute", recompute, (*RECOMPUTE, "auto"))):
        if value not in choices:
            check.fail(name, f"one of {', '.join(choices)}", repr(value))
    if second_order_steps is not None and (isinstance(second_order_steps, bool) or order != "second"
                                           or not isinstance(second_order_steps, int) or second_order_steps < 0):
        check.fail("second_order_steps", "an integer >= 0, with order='second'",
                   f"{second_order_steps} with order={order!r}")
    has_dual = hasattr(loss_fn, "dual")
    if has_dual:
        _check_dual(check, loss_fn)
    if recompute == "layer" and not has_dual:
        check.fail("recompute", "'none' or 'step' for a loss_fn without a dual form", "'layer'",
                   "give loss_fn a dual form, as PrefixLoss has")
    given = None if params is None else _check_params(check, params, has_dual)
    return tensors, given, _check_rule(check, memory, steps, lr, clip_value, clip_norm, update)


def _check_rule(check: Checker, memory: Memory, steps: int, lr: LearningRate | None, clip_value: float | None,
                clip_norm: float | None, update: Update | None) -> Update:
    for name, clip in (("clip_value", clip_value), ("clip_norm", clip_norm)):
        if clip is not None:
            check.number(name, clip, above=0.0)
    if update is None:
        if lr is None:
            check.fail("lr", "a number or a tensor", None, "only update= goes without")
        check_rates(check, lr, memory, steps)
        return SGD(lr, clip_value=clip_value, clip_norm=clip_norm)
    for name, option in (("lr", lr), ("clip_value", clip_value), ("clip_norm", clip_norm)):
        if option is not None:
            check.fail(name, "None with update=, whose business it is", option)
    if not callable(update):
        check.fail("update", "a callable", type(update).__name__)
    if isinstance(update, type):
        check.fail("update", "a rule", f"the class {update.__name__}", f"make one: {update.__name__}(lr=...)")
    if hasattr(update, "check"):
        update.check(memory, steps)
    return update


def _check_dual(check: Checker, loss_fn: Any) -> None:
    options = inspect.signature(loss_fn.dual).parameters
    if "cotangents" not in options and all(p.kind is not p.VAR_KEYWORD for p in options.values()):
        check.fail("loss_fn", "a dual form that takes checkpoint_layers= and cotangents=", "one without cotangents",
                   "it may ignore them: they only spare work")
    if not hasattr(loss_fn, "params"):
        check.fail("loss_fn", "params, the tensors that meta-gradients reach, beside a dual form", "none",
                   "an empty tuple says that there are none")
    if any(not p.is_leaf for p in loss_fn.params) and not hasattr(loss_fn, "detached"):
        check.fail("loss_fn", "detached(), as one of its params is no leaf", "none", "PrefixLoss shows how")


def _check_params(check: Checker, params: Any, has_dual: bool) -> Tensors:
    if has_dual:
        check.fail("params", "None for a loss_fn with a dual form, which names its own", "a sequence")
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        check.fail("params", "a sequence of tensors", type(params).__name__)
    params = tuple(params)  # an iterator, as of a module's parameters, gives them once
    for i, p in enumerate(params):
        if not isinstance(p, Tensor) or not p.requires_grad:
            check.fail(f"params[{i}]", "a tensor that requires grad",
                       "one that does not" if isinstance(p, Tensor) else type(p).__name__)
    return params


def _check_memory(check: Checker, memory: Memory) -> Tensors:
    tensors = memory if isinstance(memory, tuple) else (memory,)
    if not tensors:
        check.fail("memory", "a tensor or a tuple of tensors", "an empty tuple")
    for i, t in enumerate(tensors):
        name = f"memory[{i}]" if isinstance(memory, tuple) else "memory"
        check.tensor(name, t, ("B", "..."), dtypes=FLOAT_DTYPES)
        if t.dim() < 2:
            check.fail(name, "rank 2 or more, batch first", f"rank {t.dim()}")
        if t.device != tensors[0].device:
            check.fail(name, f"the device of memory[0], {tensors[0].device}", t.device)
    return tensors


def checked_loss(loss: Any, memory: Sequence[Tensor]) -> Tensor:
    """What a loss returned, ``[B]`` in the graph of its memory."""
    check = Checker("write")
    check.sizes["B"] = memory[0].shape[0]
    check.tensor("loss_fn", loss, ("B",), remedy="it returns one loss for each sample, not their mean")
    if not loss.requires_grad:
        check.fail("loss_fn", "losses that depend on the memory", "losses without a graph",
                   "compute them from its arguments, outside no_grad and without detach")
    return loss


def checked_state(name: str, state: Any, memory: Sequence[Tensor]) -> Tensors:
    """What a rule returned, or began with, under the ``name`` of its method: tensors like the memory's, first."""
    check = Checker("write")
    if not isinstance(state, tuple) or len(state) < len(memory):
        check.fail(name, f"a tuple that begins with the {len(memory)} memory tensor(s)",
                   f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__)
    for new, old in zip(state, memory, strict=False):
        if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            check.fail(name, f"memory of shape {list(old.shape)} and dtype {old.dtype} on {old.device}",
                       f"shape {list(new.shape)} and dtype {new.dtype} on {new.device}" if isinstance(new, Tensor)
                       else new)
    return state
