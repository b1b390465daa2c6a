"""Argument checks of the public functions: each argument once, naming it, what was expected, what came, the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = ["ArgumentError", "Checker", "check_values"]

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ArgumentError(ValueError):
    """An argument of a public function is not what the function takes."""


def check_values(tensor: Tensor) -> bool:
    """Whether values of ``tensor`` may be looked at.

    Always on CPU. On other devices a look costs a host sync, so it needs ``GRADMEM_DEBUG=1``. Never for the wrapped
    tensors of ``torch.func`` transforms and of compilation, which have no values yet.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("GRADMEM_DEBUG", "0") not in ("", "0")


class Checker:
    """Checks the arguments of one call of ``op``; named dimensions must agree between its tensors."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self._first: tuple[str, Tensor] | None = None

    def fail(self, argument: str, expected: str, got: object, remedy: str = "") -> NoReturn:
        raise ArgumentError(f"{self.op}: {argument}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")

    def tensor(self, argument: str, value: Any, dims: tuple[str, ...], *, dtypes: Sequence[torch.dtype] | None = None,
               remedy: str = "") -> Tensor:
        """Checks type, rank, sizes, dtype and device.

        ``dims`` names the dimensions, ``"..."`` at either end stands for any number of them. Without ``dtypes`` the
        tensor must be floating point and share the dtype of the first such tensor; every tensor must share the
        first's device.
        """
        if not isinstance(value, Tensor):
            self.fail(argument, "a tensor", type(value).__name__, remedy)
        self._check_shape(argument, value, dims, remedy)
        if dtypes is not None:
            if value.dtype not in dtypes:
                self.fail(argument, f"dtype {' or '.join(_name(d) for d in dtypes)}", _name(value.dtype), remedy)
        elif value.dtype not in FLOAT_DTYPES:
            self.fail(argument, f"a dtype of {', '.join(_name(d) for d in FLOAT_DTYPES)}", _name(value.dtype), remedy)
        if self._first is None:
            if dtypes is None:
                self._first = argument, value
            return value
        name, first = self._first
        if dtypes is None and value.dtype != first.dtype:
            self.fail(argument, f"the dtype of {name}, {_name(first.dtype)}", _name(value.dtype),
                      remedy or "cast one of them with .to(dtype)")
        if value.device != first.device:
            self.fail(argument, f"the device of {name}, {first.device}", value.device,
                      remedy or "move one of them with .to(device)")
        return value

    def _check_shape(self, argument: str, value: Tensor, dims: tuple[str, ...], remedy: str) -> None:
        shape = list(value.shape)
        names = [name for name in dims if name != "..."]
        known = dict(self.sizes)
        rank_ok = len(shape) == len(names) if "..." not in dims else len(shape) >= len(names)
        named = shape[len(shape) - len(names):] if dims[:1] == ("...",) else shape[: len(names)]
        if not rank_ok or any(self.sizes.setdefault(n, s) != s for n, s in zip(names, named, strict=True)):
            wanted = [f"{name}={known[name]}" if name in known else name for name in dims]
            self.fail(argument, f"shape [{', '.join(wanted)}]", shape, remedy)

    def tangent(self, argument: str, value: Tensor | None, like: Tensor) -> None:
        """Checks a tangent: ``None``, or a tensor of the shape, dtype and device of its primal."""
        if value is None:
            return
        if not isinstance(value, Tensor):
            self.fail(argument, "a tensor or None", type(value).__name__)
        if value.shape != like.shape or value.dtype != like.dtype or value.device != like.device:
            self.fail(argument, f"a tangent of shape {list(like.shape)}, {_name(like.dtype)}, on {like.device}",
                      f"shape {list(value.shape)}, {_name(value.dtype)}, on {value.device}",
                      "a tangent matches its primal; pass None for a known zero")

    def same_shape(self, argument: str, value: Tensor, name: str, like: Tensor) -> None:
        if value.shape != like.shape:
            self.fail(argument, f"the shape of {name}, {list(like.shape)}", list(value.shape))

    def number(self, argument: str, value: Any, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
        """Checks a finite Python number at least ``minimum`` and greater than ``above``."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(argument, "a number", type(value).__name__)
        if not math.isfinite(value) or value < minimum or value <= above:
            bound = f" >= {minimum:g}" if minimum > -math.inf else f" > {above:g}" if above > -math.inf else ""
            self.fail(argument, f"a finite number{bound}", value)

    def integer(self, argument: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
        """Checks a Python integer of ``minimum..maximum``."""
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(argument, "an integer", type(value).__name__)
        if value < minimum or (maximum is not None and value > maximum):
            self.fail(argument, f"an integer {f'>= {minimum}' if maximum is None else f'in {minimum}..{maximum}'}",
                      value)

    def boolean(self, argument: str, value: Any) -> None:
        if not isinstance(value, bool):
            self.fail(argument, "True or False", value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
