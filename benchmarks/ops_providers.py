"""Who computes norms, activations and rotary in the ops suite, in which modes, and the formulas."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from gradmem_kernels import backend as backends
from gradmem_kernels.rotary import rotary_tables

__all__ = ["BYTE_FORMULA", "COMPILED", "EAGER", "FIRST_ORDER", "MODES", "OPS", "PROVIDERS", "Data", "Named", "Op",
           "Provider", "Work", "draw"]

MODES = ("forward", "backward", "dual_forward", "dual_backward", "double_backward")
FIRST_ORDER = MODES[:2]
BYTE_FORMULA = ("n tensors of the size of the output, each read or written once; n of forward, backward, dual forward, "
                "dual backward, double backward: 2, 3, 4, 6, 5; norms of a sum 4, 4, 8, 8; swiglu 3, 5, 6, 10, 8; "
                "rotary 2, 2")

Named = dict[str, Tensor]
Work = Callable[[], Named]
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """An op: its formula in plain PyTorch, PyTorch's own first-order op, and what its kernels take beside tensors."""

    name: str
    plain: Callable[..., Outputs]
    vendor: Callable[..., Outputs] | None
    #: Of inputs: the first ones are as large as the output, the others are weights of its last dimension.
    inputs: int
    passes: Mapping[str, int]
    weights: int = 0
    module: str = ""
    options: Mapping[str, Any] | None = None
    #: The second input is added to the first, and the sum is a second output.
    summed: bool = False

    def bytes(self, mode: str, shape: Mapping[str, int], dtype: torch.dtype) -> int:
        """What ``mode`` moves at least, after :data:`BYTE_FORMULA`."""
        return self.passes[mode] * math.prod(shape.values()) * dtype.itemsize


class Data(NamedTuple):
    """Inputs, their tangents, and the cotangents ``a`` of the outputs and ``b`` of their tangents."""

    x: tuple[Tensor, ...]
    x_t: tuple[Tensor, ...]
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    aux: tuple[Tensor, ...] = ()

    def map(self, f: Callable[[Tensor], Tensor]) -> Data:
        return Data(*(tuple(map(f, part)) for part in self))


class Provider(NamedTuple):
    """``prepare(op, mode, data)`` runs what a mode needs before it and returns the mode's own work."""

    name: str
    prepare: Callable[[Op, str, Data], Work]


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias


def _of_sum(norm: Callable[..., Tensor]) -> Callable[..., Outputs]:
    def summed(x: Tensor, residual: Tensor, *weights: Tensor) -> Outputs:
        s = x + residual
        return norm(s, *weights), s

    return summed


def _vendor_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _vendor_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


_UNARY = dict(zip(MODES, (2, 3, 4, 6, 5), strict=True))
# the double backward is that of the norm
_SUMMED = dict(zip(MODES[:4], (4, 4, 8, 8), strict=True))
OPS = {op.name: op for op in (
    Op("rms_norm", _rms_norm, _vendor_rms_norm, 1, _UNARY, weights=1, options={"eps": 1e-6}),
    Op("layer_norm", _layer_norm, _vendor_layer_norm, 1, _UNARY, weights=2, options={"eps": 1e-5}),
    Op("add_rms_norm", _of_sum(_rms_norm), _of_sum(_vendor_rms_norm), 2, _SUMMED, weights=1, module="rms_norm",
       options={"eps": 1e-6}, summed=True),
    Op("add_layer_norm", _of_sum(_layer_norm), _of_sum(_vendor_layer_norm), 2, _SUMMED, weights=2,
       module="layer_norm", options={"eps": 1e-5}, summed=True),
    Op("swiglu", lambda gate, up: gate * torch.sigmoid(gate) * up, lambda gate, up: F.silu(gate) * up, 2,
       dict(zip(MODES, (3, 5, 6, 10, 8), strict=True))),
    Op("gelu", _gelu, F.gelu, 1, _UNARY, options={"approximate": "none"}),
    Op("gelu_tanh", _gelu_tanh, partial(F.gelu, approximate="tanh"), 1, _UNARY, module="gelu",
       options={"approximate": "tanh"}),
    # linear: its tangent is the op again, and its backward the op with the sine negated
    Op("rotary", _rotary, None, 1, dict(zip(FIRST_ORDER, (2, 2), strict=True))))}

Shapes = Mapping[str, Sequence[Mapping[str, int]]]

def draw(op: Op, shape: Mapping[str, int], dtype: torch.dtype, device: str) -> Data:
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    size = tuple(shape.values())
    x, x_t = (tuple(random(*s) for s in [size] * op.inputs + [size[-1:]] * op.weights) for _ in range(2))
    aux = ()
    if op.name == "rotary":
        aux = rotary_tables(torch.arange(shape["rows"], device=device), shape["d"], dtype=dtype)
    a, b = (tuple(random(*size) for _ in range(1 + op.summed)) for _ in range(2))
    return Data(x, x_t, a, b, aux)


def by_autograd(formula: str, op: Op, mode: str, data: Data) -> Work:
    """What PyTorch's autograd makes of ``op.plain`` or ``op.vendor``."""
    of = getattr(op, formula)
    if of is None or (formula == "vendor" and mode not in FIRST_ORDER):
        raise NotImplementedError("first order only" if of else f"PyTorch has no {op.name}")
    graph = mode not in ("forward", "dual_forward")  # as the others, nothing is kept for a backward pass
    x, x_t = ([t.detach().requires_grad_(graph) for t in part] for part in data[:2])
    b = [t.detach().requires_grad_() for t in data.b]

    def f(*x: Tensor) -> tuple[Tensor, ...]:
        y = of(*x, *data.aux)
        return y if isinstance(y, tuple) else (y,)

    def dual() -> tuple[Tensor, ...]:
        y, y_t = torch.func.jvp(f, tuple(x), tuple(x_t))
        return *y, *y_t

    if mode == "forward":
        return lambda: _named("y", f(*x))
    if mode == "dual_forward":
        return lambda: _named("dual", dual())
    if mode == "dual_backward":
        outputs = dual()
        return lambda: _named("dual gradient", _gradients(outputs, (*x, *x_t), (*data.a, *data.b)))
    y = f(*x)
    if mode == "backward":
        return lambda: _named("gradient", _gradients(y, x, data.b))
    first = grad(y, x, b, create_graph=True)
    return lambda: _named("second derivative", _gradients(first, (*x, *b), data.x_t))


def _gradients(outputs: Sequence[Tensor], x: Sequence[Tensor], bars: Sequence[Tensor]) -> Sequence[Tensor]:
    # the gradient of a bias depends on nothing but the cotangent
    return grad(outputs, x, bars, retain_graph=True, materialize_grads=True)


def by_kernels(backend: str, compiled: bool, op: Op, mode: str, data: Data) -> Work:
    """The kernels of a backend, without autograd around them."""
    name = op.module or op.name
    kernels: Any = backends.select(name, backend, data.x[0])
    if compiled:
        kernels = _Compiled(importlib.import_module(f"gradmem_kernels.{backend}.{name}"))
    if op.summed:
        kernels = _Summed(kernels)
    with torch.no_grad():
        return _kernel_work(kernels, op, mode, data)


def _kernel_work(kernels: Any, op: Op, mode: str, data: Data) -> Work:
    if op.name == "rotary":
        run, of = (kernels.forward, data.x[0]) if mode == "forward" else (kernels.transpose, data.b[0])
        name = "y 0" if mode == "forward" else "gradient 0"
        return lambda: {name: run(of, *data.aux)}
    x, x_t, a, b, _ = data
    options, every, none = op.options or {}, (True,) * len(x), (False,) * len(x)
    y, saved = kernels.forward(x, (), **options)
    if mode == "forward":
        return lambda: _named("y", kernels.forward(x, (), **options)[0])
    if mode == "backward":
        return lambda: _named("gradient", kernels.backward(x, (), y, saved, b, every, **options))
    dual = partial(kernels.dual_forward, x, (), x_t, **options)
    if mode == "dual_forward":
        return lambda: _named("dual", [t for part in dual()[:2] for t in part])
    backward = partial(kernels.dual_backward, x, (), x_t)
    if mode == "dual_backward":
        outputs = dual()
        return lambda: _named("dual gradient", [t for part in backward(*outputs, a, b, every, every, **options)
                                                for t in part])

    def double_backward() -> Named:
        if hasattr(kernels, "double_backward"):
            x_bar, y_t = kernels.double_backward(x, (), x_t, y, saved, b, every, **options)
        else:
            outputs = dual()
            (x_bar, _), y_t = backward(*outputs, (None,) * len(b), b, every, none, **options), outputs[1]
        return _named("second derivative", (*x_bar, *y_t))

    return double_backward


class _Summed:
    """A norm's kernels as those of the norm of a sum, whose second input is an option of theirs."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def forward(self, x: Any, aux: Any, **options: Any) -> Any:
        return self._kernels.forward((x[0], *x[2:]), aux, residual=x[1], **options)

    def backward(self, x: Any, aux: Any, y: Any, saved: Any, y_bar: Any, needs: Any, **options: Any) -> Any:
        x_bar = self._kernels.backward((y[1], *x[2:]), aux, y, saved, y_bar, needs[1:], **options)
        return x_bar[0], *x_bar

    def dual_forward(self, x: Any, aux: Any, x_t: Any, **options: Any) -> Any:
        return self._kernels.dual_forward((x[0], *x[2:]), aux, (x_t[0], *x_t[2:]), residual=x[1], residual_t=x_t[1],
                                          **options)

    def dual_backward(self, x: Any, aux: Any, x_t: Any, y: Any, y_t: Any, saved: Any, y_bar: Any, y_t_bar: Any,
                      needs: Any, needs_t: Any, **options: Any) -> Any:
        bars = self._kernels.dual_backward((y[1], *x[2:]), aux, (y_t[1], *x_t[2:]), y, y_t, saved, y_bar, y_t_bar,
                                           needs[1:], needs_t[1:], **options)
        return tuple((x_bar[0], *x_bar) for x_bar in bars)


class _Compiled:
    """A backend's kernels, each compiled when it is first used."""

    def __init__(self, kernels: Any) -> None:
        self._kernels, self._compiled = kernels, {}

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)  # raises where the backend has none
        return self._compiled.setdefault(name, torch.compile(kernel, dynamic=False))


EAGER, COMPILED = Provider("eager", partial(by_autograd, "plain")), "reference-compiled"
PROVIDERS = (
    EAGER,
    Provider("gradmem-reference", partial(by_kernels, "reference", False)),
    Provider("gradmem-native", partial(by_kernels, "native", False)),
    Provider("gradmem-triton", partial(by_kernels, "triton", False)),
    Provider(COMPILED, partial(by_kernels, "reference", True)),
    Provider("pytorch", partial(by_autograd, "vendor")),
)


def _named(what: str, tensors: Sequence[Tensor]) -> Named:
    return {f"{what} {i}": t for i, t in enumerate(tensors)}
