"""The compile report's builds of norms, activations and rotary: exactly what their operators launch.

The operators run on tensors without memory, with recorders in the place of kernels; a build is a recorded launch. So
there is nothing here that a changed kernel or launch could contradict.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.compiler import ASTSource

from gradmem_kernels.triton import activation as activations
from gradmem_kernels.triton import activation_kernels, norm, norm_kernels, rotary
from gradmem_kernels.triton.attention_configs import Config

__all__ = ["CALLS", "MODES", "RowsBuild", "rows_builds"]

ARCHITECTURES = ("sm_90", "sm_80")
#: The representative of each class of dtypes.
DTYPES = {"half": torch.bfloat16, "float32": torch.float32}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
#: Complete calls: every tangent and cotangent there. ``frozen``: without those of weights; ``add``: of a sum, whose
#: double backward is that of a norm.
MODES = ("forward", "dual_forward", "backward", "dual_backward", "double_backward")
FROZEN = ("backward frozen", "dual_backward frozen")
ADD = tuple(f"{mode} add" for mode in (*MODES[:4], *FROZEN))
#: Where kernels are, for recorders to take their place.
KERNELS = ((norm_kernels, "forward_kernel"), (norm_kernels, "backward_kernel"), (activation_kernels, "forward_kernel"),
           (activation_kernels, "backward_kernel"), (rotary, "rotary_kernel"))


class Call(NamedTuple):
    """An op in the table: its modes, its widths, and ``run(mode, rows [8192, width])``, which launches one kernel."""

    run: Callable[[str, Tensor], Any]
    modes: Sequence[str]
    widths: Sequence[int]
    #: Names of the constants that give rows and columns of a tile.
    tile: tuple[str, str]


class RowsBuild(NamedTuple):
    """One launch to compile."""

    name: str
    op: str
    mode: str
    dtype: str
    width: int
    architecture: str
    config: Config

    #: It has a line in the table.
    listed = True
    #: Bytes of stack per thread that it may have: nothing spills.
    stack_limit = 0

    @property
    def size(self) -> int:
        """What takes longest to compile comes first."""
        return len(self.mode)

    def source(self) -> ASTSource:
        """The kernel with the types, constants and alignments that this launch finds on a GPU."""
        function, arguments = _launch(self.op, self.mode, self.dtype, self.width)
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        alignments: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, parameter in enumerate(function.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[i,] = "constexpr", value
                continue
            parts = {(i, k): part for k, part in enumerate(value)} if isinstance(value, tuple) else {(i,): value}
            kinds = {place: _kind(part) for place, part in parts.items()}
            signature[parameter.name] = tuple(kinds.values()) if isinstance(value, tuple) else kinds[i,]
            constants |= {place: parts[place] for place, kind in kinds.items() if kind == "constexpr"}
            alignments |= {place: [["tt.divisibility", 16]] for place, kind in kinds.items()
                           if kind.startswith("*") or (kind == "i32" and parts[place] % 16 == 0)}
        return ASTSource(function, signature, constants, alignments)


def rows_builds() -> Iterator[RowsBuild]:
    """What the table lists."""
    for op, call in CALLS.items():
        for width, mode, dtype, architecture in itertools.product(call.widths, call.modes, DTYPES, ARCHITECTURES):
            _, arguments = _launch(op, mode, dtype, width)
            rows, columns = (arguments.get(name, 1) for name in call.tile)
            yield RowsBuild(f"{op} {mode} {dtype} D{width} {architecture}", op, mode, dtype, width, architecture,
                            Config(rows, columns, arguments["num_warps"], 0))


def _kind(value: Any) -> str:
    """The type of an argument as Triton specialises it: what is absent, and the number 1, are constants."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _launch(op: str, mode: str, dtype: str, width: int) -> tuple[Any, Mapping[str, Any]]:
    """The kernel that a call launches, and its arguments by name."""
    found: list[tuple[Any, Mapping[str, Any]]] = []
    with mock.patch.multiple(norm_kernels, **_recorders(norm_kernels, found)), \
            mock.patch.multiple(activation_kernels, **_recorders(activation_kernels, found)), \
            mock.patch.multiple(rotary, **_recorders(rotary, found)):
        CALLS[op].run(mode, torch.empty(8192, width, dtype=DTYPES[dtype], device="meta"))
    launch, = found
    return launch


def _recorders(module: Any, found: list[tuple[Any, Mapping[str, Any]]]) -> dict[str, Any]:
    return {name: _Recorder(getattr(module, name), found) for owner, name in KERNELS if owner is module}


class _Recorder:
    """In the place of a kernel: keeps the arguments of its launches."""

    def __init__(self, function: Any, found: list[tuple[Any, Mapping[str, Any]]]) -> None:
        self.function, self.found = function, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            self.found.append((self.function, dict(zip(self.function.arg_names, args, strict=False)) | named))

        return launch


def _norm(mode: str, x: Tensor, centred: bool) -> None:
    weight, rows = x.new_empty(x.shape[-1]), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    bias, mean = (weight, rows) if centred else (None, None)
    order, *kinds = mode.split(" ")
    other, frozen = x if "add" in kinds else None, "frozen" in kinds
    if order.endswith("forward"):
        x_t, other_t = (x, other) if order == "dual_forward" else (None, None)
        norm.operators.run_forward(x, weight, bias, x_t, None, None, other, other_t, 1e-6, centred)
        return
    x_t = None if order == "backward" else x
    weight_t, bias_t = (weight, bias) if order == "double_backward" else (None, None)
    # in a plain backward the cotangents are in the place of those of the tangents
    sums = [not frozen, not frozen and centred]
    norm.operators.run_backward(
        x, weight, x_t, weight_t, bias_t, rows, mean, x if order == "dual_backward" else None, x, other, other,
        (order != "backward", order != "double_backward"), order == "double_backward",
        [False, False, *sums] if order == "backward" else [*sums, False, False])


def _activation(mode: str, x: Tensor, form: str, gated: bool) -> None:
    up, none = x if gated else None, (False, False)
    x_t, up_t = (x, up) if mode not in ("forward", "backward") else (None, None)
    if mode.endswith("forward"):
        activations.operators.run_forward(x, up, x_t, up_t, form)
        return
    every = (True, gated)
    activations.operators.run_backward(
        x, up, x_t, up_t, x if mode == "dual_backward" else None, x, none if mode == "backward" else every,
        none if mode == "double_backward" else every, mode == "double_backward", form)


def _rotary(mode: str, x: Tensor, rotated: int) -> None:
    tables = x.new_empty(2, 128, rotated // 2, dtype=torch.float32)
    rotary.operators.run(x.view(2, 32, 128, -1), *tables.unbind(0), False)


#: Widths where a tile holds rows, where a row is a tile, and where it is several.
CALLS = {
    "layer_norm": Call(lambda mode, x: _norm(mode, x, True), (*MODES, *FROZEN, *ADD), (1024, 16384), ("ROWS", "BLOCK")),
    "rms_norm": Call(lambda mode, x: _norm(mode, x, False), (*MODES, *FROZEN, *ADD), (128, 4096, 8192),
                     ("ROWS", "BLOCK")),
    "swiglu": Call(lambda mode, x: _activation(mode, x, "silu", True), MODES, (4096,), ("", "BLOCK")),
    "gelu": Call(lambda mode, x: _activation(mode, x, "gelu", False), MODES, (4096,), ("", "BLOCK")),
    "gelu_tanh": Call(lambda mode, x: _activation(mode, x, "gelu_tanh", False), MODES, (4096,), ("", "BLOCK")),
    "rotary": Call(lambda mode, x: _rotary(mode, x, 128), ("forward",), (128,), ("ROWS", "HALF_P")),
    "rotary_partial": Call(lambda mode, x: _rotary(mode, x, 16), ("forward",), (64,), ("ROWS", "HALF_P")),
}
