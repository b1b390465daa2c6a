"""Which tensors a loss closes over: found in its graph, or refused by name, never left without their gradient."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradmem_kernels.checks import Checker

__all__ = ["ClosedOver"]

#: The node of a leaf; a node of another kind may have an attribute ``variable`` too.
ACCUMULATE: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]

#: A node of autograd's graph and the number of its output.
Edge = tuple[Any, int]


class ClosedOver:
    """Follows the evaluations of ``loss_fn`` and tells the tensors that its gradient must reach.

    A leaf is found as such. A non-leaf made before the call shows by being part of the graphs of two evaluations, and
    must be among ``params``: the graph before it is the caller's, and cannot be run again.

    Args:
        loss_fn: the function, to name what it closes over.
        params: the tensors that the caller gave; ``None`` to find the leaves.
    """

    def __init__(self, loss_fn: Callable[..., Tensor], params: Sequence[Tensor] | None) -> None:
        self.loss_fn = loss_fn
        self.params = None if params is None else tuple(params)
        self._first: set[Any] | None = None

    def inspect(self, loss: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors to differentiate with respect to, given one evaluation at the leaves ``memory``.

        Raises:
            ArgumentError: if a closed-over tensor would miss its gradient, or get part of it twice.
        """
        given = self.params or ()
        borders = {(p.grad_fn, p.output_nr) for p in given if p.grad_fn is not None}
        nodes, leaves, _ = _walk([(loss.grad_fn, 0)], borders)
        leaves = {i: leaf for i, leaf in leaves.items() if all(leaf is not m for m in memory)}
        if self._first is None:
            self._first = nodes
        else:
            for node in nodes & self._first:
                self._refuse(_describe(self.loss_fn, node) or f"a non-leaf tensor made by {node.name()}",
                             "pass it in params=, or compute it inside loss_fn")
        if self.params is None:
            return tuple(leaves.values())
        for leaf in leaves.values():
            if all(leaf is not p for p in given):
                self._refuse(_describe(self.loss_fn, leaf) or f"a leaf tensor of shape {list(leaf.shape)}",
                             "add it to params=, or pass params=None to have leaves found")
        _, behind, edges = _walk([edge for node, _ in borders for edge in node.next_functions], set())
        for p in given:
            if id(p) in behind or (p.grad_fn, p.output_nr) in edges:
                self._refuse(_describe(self.loss_fn, p) or f"a tensor of shape {list(p.shape)}",
                             "it is reached directly and through another tensor of params=; compute that tensor "
                             "inside loss_fn, or use recompute='none'")
        return self.params

    def _refuse(self, what: str, remedy: str) -> None:
        Checker("write").fail("params", "every tensor that requires grad and that loss_fn closes over", what, remedy)


def _walk(edges: list[Edge], borders: set[Edge]) -> tuple[set[Any], dict[int, Tensor], set[Edge]]:
    """The inner nodes, the leaf tensors by id, and the edges that these lead to, not going beyond ``borders``."""
    nodes: set[Any] = set()
    seen: set[Edge] = set()
    leaves: dict[int, Tensor] = {}
    todo = [edge for edge in edges if edge[0] is not None and edge not in borders]
    while todo:
        edge = todo.pop()
        seen.add(edge)
        node = edge[0]
        if isinstance(node, ACCUMULATE):
            leaves[id(node.variable)] = node.variable
        elif node not in nodes:
            nodes.add(node)
            todo += [edge for edge in node.next_functions if edge[0] is not None and edge not in borders]
    return nodes, leaves, seen


def _describe(loss_fn: Any, wanted: Any) -> str | None:
    """The name and shape of the tensor that ``loss_fn`` closes over: a leaf, or what the graph node ``wanted`` made."""
    for name, value in _names(loss_fn):
        if isinstance(value, Tensor) and (value is wanted or (value.grad_fn is not None and value.grad_fn is wanted)):
            return f"{name!r}, of shape {list(value.shape)}"
    return None


def _names(owner: Any, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Names and values that a callable reads: closure, globals, bound arguments, attributes, module parameters."""
    found: dict[str, Any] = {}
    if isinstance(owner, functools.partial):
        found = {**{f"args[{i}]": value for i, value in enumerate(owner.args)}, **owner.keywords, "func": owner.func}
    elif inspect.ismethod(owner):
        found = {"self": owner.__self__}
    elif inspect.isfunction(owner):
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            variables = inspect.getclosurevars(owner)
            found = {**variables.globals, **variables.nonlocals}
    elif isinstance(owner, nn.Module):
        found = dict(owner.named_parameters())
    elif isinstance(owner, dict):
        found = {str(key): value for key, value in owner.items()}
    elif isinstance(owner, (list, tuple)):
        found = {f"[{i}]": value for i, value in enumerate(owner)}
    elif hasattr(owner, "__dict__") and not inspect.ismodule(owner):
        found = vars(owner)
    for name, value in found.items():
        yield name, value
        if depth and not isinstance(value, Tensor):
            yield from ((f"{name}.{inner}", deep) for inner, deep in _names(value, depth - 1))
