"""Who computes attention and its derivatives in the attention suite, in which modes, and the exact results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmem_kernels import attention, attention_dual

__all__ = ["BYTE_FORMULA", "EAGER", "FIRST_ORDER", "FLOP_FORMULA", "MODES", "PROVIDERS", "Data", "Functions",
           "Provider", "Shape", "draw", "head_by_head", "plain", "prepare"]

#: Useful products of [S, S, d] matrices of each mode; causal attention needs half of each.
PRODUCTS = {"forward": 2, "backward": 5, "double_backward": 12, "dual_forward": 6, "dual_backward": 15, "step": 28}
MODES = tuple(PRODUCTS)
FIRST_ORDER = ("forward", "backward")
#: Tensors ``[B, S, d]`` of query heads and of key heads that a mode reads or writes, each once.
TENSORS = {"forward": (2, 2), "backward": (4, 4), "double_backward": (6, 6), "dual_forward": (4, 4),
           "dual_backward": (8, 8), "step": (18, 18)}
FLOP_FORMULA = ("n * 2 B H S^2 d (causal: half), n = 2 forward, 5 backward, 12 double backward, 6 dual forward, "
                "15 dual backward, 28 step")
BYTE_FORMULA = ("inputs, tangents and cotangents read once, in backward passes the output and its tangent too, results "
                "written once; a step: the sum of its four passes")

Named = dict[str, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Of ``q, k, v`` and their tangents: the output and its tangent.
Dual = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: int = 1

    def flops(self, mode: str) -> float:
        """Floating-point operations of a mode after :data:`FLOP_FORMULA`."""
        product = 2 * self.batch * self.heads * self.length**2 * self.head_dim
        return PRODUCTS[mode] * product / (2 if self.causal else 1)

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        """What a mode must move at least, after :data:`BYTE_FORMULA`."""
        queries, keys = TENSORS[mode]
        rows = self.batch * self.length * self.head_dim
        return rows * (queries * self.heads + keys * self.kv_heads) * dtype.itemsize


class Data(NamedTuple):
    """Inputs, their tangents, and the cotangents ``a`` of the output and ``b`` of its tangent.

    In the double backward the tangents are the cotangents of the gradients, and ``b`` the cotangent of the output.
    """

    x: tuple[Tensor, ...]
    x_t: tuple[Tensor, ...]
    a: Tensor
    b: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Data:
        return Data(tuple(map(f, self.x)), tuple(map(f, self.x_t)), f(self.a), f(self.b))


class Functions(NamedTuple):
    attention: Attention
    #: None: the provider has no tangents.
    dual: Dual | None = None


class Provider(NamedTuple):
    """``load(shape)`` returns the functions, or raises where the provider is not installed."""

    name: str
    load: Callable[[Shape], Functions]
    modes: Sequence[str]


def draw(shape: Shape, dtype: torch.dtype, device: str) -> Data:
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> Tensor:
        size = (shape.batch, heads, shape.length, shape.head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return Data(tuple(map(random, heads)), tuple(map(random, heads)), random(shape.heads), random(shape.heads))


def prepare(mode: str, f: Functions, data: Data) -> Callable[[], Named]:
    """Runs what a mode needs before it; returns the mode's own work, which may run repeatedly. Results have the same
    names in every mode that computes them."""
    x, x_t, do = _leaves(data.x), _leaves(data.x_t), data.b.detach().requires_grad_()
    if mode == "forward":
        return lambda: {"o": f.attention(*x)}
    if mode == "backward":
        o = f.attention(*x)
        return lambda: _named("gradient of", "qkv", grad(o, x, data.b, retain_graph=True))
    if mode == "double_backward":
        first = grad(f.attention(*x), x, do, create_graph=True)
        return lambda: _named("second derivative by", ("q", "k", "v", "do"),
                              grad(first, (*x, do), data.x_t, retain_graph=True))
    if f.dual is None:
        raise NotImplementedError("no tangents")
    dual = partial(f.dual, *x, *x_t)
    if mode == "dual_forward":
        return lambda: _named("dual", ("o", "o_t"), dual())
    if mode == "dual_backward":
        outputs = dual()
        return lambda: _dual_gradients(outputs, x, x_t, data)

    def step() -> Named:
        o = f.attention(*x)
        first = _named("gradient of", "qkv", grad(o, x, data.b))
        outputs = dual()
        named = _named("dual", ("o", "o_t"), outputs)
        return {"o": o, **first, **named, **_dual_gradients(outputs, x, x_t, data, retain=False)}

    return step


def plain(shape: Shape) -> Functions:
    """The formula, in the dtype of its inputs throughout: in float64 the exact result, in others plain PyTorch's
    error."""
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if shape.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ v

    return Functions(formula, _jvp(formula))


def head_by_head(shape: Shape, data: Data) -> Named:
    """All results of :func:`plain` in float64, for each query head alone, so that few score matrices are held."""
    heads, group = shape.heads, shape.heads // shape.kv_heads
    samples = []
    for i in range(shape.batch):
        parts = []
        for h in range(heads):
            def one(t: Tensor, i: int = i, h: int = h) -> Tensor:
                return t[i : i + 1, h : h + 1] if t.shape[1] == heads else t[i : i + 1, h // group : h // group + 1]

            head = data.map(one)
            found = prepare("step", plain(shape), head)() | prepare("double_backward", plain(shape), head)()
            parts.append({name: t.detach().double() for name, t in found.items()})
        samples.append({name: torch.cat([part[name] for part in parts], 1) for name in parts[0]})
    results = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    # query heads of a group share a key head: its gradient is their sum
    return {name: t.unflatten(1, (-1, group)).sum(2) if name[-1] in "kv" or name.endswith(("k_t", "v_t")) else t
            for name, t in results.items()}


def _dual_gradients(outputs: Sequence[Tensor], x: Sequence[Tensor], x_t: Sequence[Tensor], data: Data,
                    retain: bool = True) -> Named:
    return _named("dual gradient of", ("q", "k", "v", "q_t", "k_t", "v_t"),
                  grad(outputs, (*x, *x_t), (data.a, data.b), retain_graph=retain))


def _named(what: str, names: Sequence[str], tensors: Sequence[Tensor]) -> Named:
    return {f"{what} {name}": t for name, t in zip(names, tensors, strict=True)}


def _leaves(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


def _jvp(f: Attention) -> Dual:
    def dual(q: Tensor, k: Tensor, v: Tensor, *x_t: Tensor) -> tuple[Tensor, Tensor]:
        o, o_t = torch.func.jvp(f, (q, k, v), x_t)
        return o, o_t

    return dual


def _gradmem(shape: Shape, backend: str | None = None, first_order: str | None = None) -> Functions:
    options = {"causal": bool(shape.causal), "backend": backend}
    return Functions(partial(attention, first_order=first_order, **options), partial(attention_dual, **options))


def _sdpa(backends: Sequence[SDPBackend], shape: Shape, tangents: bool = False) -> Functions:
    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=bool(shape.causal),
                                                  enable_gqa=shape.heads != shape.kv_heads)

    return Functions(sdpa, _jvp(sdpa) if tangents else None)


def _jvp_flash(shape: Shape) -> Functions:
    module = importlib.import_module("jvp_flash_attention.jvp_attention")
    peer = partial(module.attention, causal=bool(shape.causal))
    return Functions(peer, _jvp(peer))


def _flashbob(shape: Shape) -> Functions:
    return Functions(partial(importlib.import_module("bob").sdpa_bob, is_causal=bool(shape.causal)))


EAGER = Provider("eager", partial(_sdpa, (SDPBackend.MATH,), tangents=True), MODES)
PROVIDERS = (
    EAGER,
    Provider("gradmem", _gradmem, MODES),
    Provider("gradmem-own", partial(_gradmem, first_order="own"), FIRST_ORDER),
    Provider("gradmem-native", partial(_gradmem, backend="native", first_order="own"), MODES),
    Provider("gradmem-triton", partial(_gradmem, backend="triton", first_order="own"), MODES),
    Provider("flash", partial(_sdpa, (SDPBackend.FLASH_ATTENTION,)), FIRST_ORDER),
    Provider("cudnn", partial(_sdpa, (SDPBackend.CUDNN_ATTENTION,)), FIRST_ORDER),
    Provider("jvp_flash_attention", _jvp_flash, (*FIRST_ORDER, "dual_forward")),
    Provider("flashbob", _flashbob, (*FIRST_ORDER, "double_backward")),
)
