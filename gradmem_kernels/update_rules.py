"""Rules of the inner steps: gradient descent, momentum and Adam, differentiable twice (docs/write.md#update-rules)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from gradmem_kernels.checks import Checker
from gradmem_kernels.inner_sgd import inner_sgd
from gradmem_kernels.learning_rates import LearningRate, check_rates, rate_of_step

__all__ = ["SGD", "UPDATE_RULES", "Adam", "Momentum", "Update", "register_update_rule", "rule_options", "wide_dtype"]

Tensors = tuple[Tensor, ...]
Update = Callable[[Tensors, Tensors, int], Tensors]


@dataclass(frozen=True, eq=False)
class _Rule:
    """What the rules share: learning rates, clipping, and as many zeros of state beside each memory tensor."""

    lr: LearningRate
    _: KW_ONLY
    clip_value: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        check = self._checker()
        if not isinstance(self.lr, (Tensor, tuple)):
            check.number("lr", self.lr, minimum=0.0)
        for name in ("clip_value", "clip_norm"):
            if getattr(self, name) is not None:
                check.number(name, getattr(self, name), above=0.0)

    def check(self, memory: Tensor | Tensors, steps: int) -> None:
        """Refuses learning rates that do not fit ``steps`` steps of ``memory``; :func:`write` asks first.

        Raises:
            ArgumentError: for a rate of another type, shape, dtype, device or value.
        """
        check_rates(self._checker(), self.lr, memory, steps)

    def _checker(self) -> Checker:
        return Checker(type(self).__name__)

    def _check_decay(self, name: str) -> None:
        check, value = self._checker(), getattr(self, name)
        check.number(name, value, minimum=0.0)
        if value >= 1:
            check.fail(name, "a number below 1", value)

    def _clipped(self, g: Tensor) -> Tensor:
        """clip(g), in float32 at least."""
        g = g.to(wide_dtype(g))
        if self.clip_value is None and self.clip_norm is None:
            return g
        # a step of length 1 from 0 is -clip(g)
        return inner_sgd(torch.zeros_like(g), g, 1.0, clip_value=self.clip_value, clip_norm=self.clip_norm).neg()

    def _descend(self, memory: Sequence[Tensor], directions: Sequence[Tensor], k: int) -> Tensors:
        """M - lr * direction; half precision is rounded once, at the end."""
        return tuple(inner_sgd(m.to(d.dtype), d, rate_of_step(self.lr, i, k, d)).to(m.dtype)
                     for i, (m, d) in enumerate(zip(memory, directions, strict=True)))


@dataclass(frozen=True, eq=False)
class SGD(_Rule):
    """``M <- M - lr * clip(g)``: what :func:`write` does without ``update``.

    Args:
        lr: as :func:`write` takes it: a number, or a tensor, which meta-gradients reach: for each step, for each token,
            or whatever broadcasts to the memory.
        clip_value: clamps each entry of the gradient to ``[-clip_value, clip_value]``, before ``clip_norm``.
        clip_norm: scales a sample's gradient, per memory tensor, by ``c / (|g| + 1e-6)`` where its norm exceeds ``c``.

    Raises:
        ArgumentError: for an argument of another type or value.
    """

    def __call__(self, state: Tensors, grads: Tensors, k: int) -> Tensors:
        return tuple(inner_sgd(m, g, rate_of_step(self.lr, i, k, m), clip_value=self.clip_value,
                               clip_norm=self.clip_norm) for i, (m, g) in enumerate(zip(state, grads, strict=True)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Momentum(_Rule):
    """``V <- momentum * V + clip(g)``, then ``M <- M - lr * V``, as ``torch.optim.SGD``; ``V`` starts at 0.

    The velocities are part of the state that outer gradients flow through, in float32 at least.

    Args:
        lr, clip_value, clip_norm: as for :class:`SGD`.
        momentum: in ``[0, 1)``.
        nesterov: descend along ``clip(g) + momentum * V``.

    Raises:
        ArgumentError: for an argument of another type or value.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_decay("momentum")
        self._checker().boolean("nesterov", self.nesterov)

    def init(self, memory: Tensors) -> Tensors:
        return (*memory, *_zeros(memory))

    def __call__(self, state: Tensors, grads: Tensors, k: int) -> Tensors:
        memory, old = _split(state, len(grads))
        clipped = tuple(map(self._clipped, grads))
        velocity = tuple(self.momentum * v + g for v, g in zip(old, clipped, strict=True))
        along = velocity
        if self.nesterov:
            along = tuple(g + self.momentum * v for v, g in zip(velocity, clipped, strict=True))
        return (*self._descend(memory, along, k), *velocity)


@dataclass(frozen=True, eq=False, kw_only=True)
class Adam(_Rule):
    """Adam of Kingma and Ba (arXiv 1412.6980), with ``weight_decay`` AdamW of Loshchilov and Hutter (1711.05101).

    With ``h = clip(g)`` and ``t = k + 1``, entry by entry, ``m`` and ``v`` starting at 0::

        m <- beta1 * m + (1 - beta1) * h            v <- beta2 * v + (1 - beta2) * h^2
        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t) + eps_root) + eps)
        M <- M - lr * (u + weight_decay * M)

    The moments are part of the state that outer gradients flow through, in float32 at least. Where ``v = 0``, the
    square root without ``eps_root`` has no derivative, but ``u`` has one, ``1 / eps`` times that of ``m``, and gets it
    (with ``beta2 = 0`` it may have a kink there, and this is the slope in its middle).
    ``du/dg`` is as large as that near 0: a larger ``eps`` or ``eps_root`` keeps meta-gradients small.

    Args:
        lr, clip_value, clip_norm: as for :class:`SGD`.
        beta1: decay of the first moment, in ``[0, 1)``.
        beta2: decay of the second moment, in ``[0, 1)``.
        eps: added to the square root, >= 0.
        eps_root: added under the square root, >= 0; not 0 where ``eps`` is.
        weight_decay: decoupled from the gradient, >= 0.

    Raises:
        ArgumentError: for an argument of another type or value.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            self._check_decay(name)
        for name in ("eps", "eps_root", "weight_decay"):
            self._checker().number(name, getattr(self, name), minimum=0.0)
        if self.eps == self.eps_root == 0:
            self._checker().fail("eps", "a number > 0 where eps_root is 0", self.eps,
                                 "an entry whose gradients are all 0 is divided by it")

    def init(self, memory: Tensors) -> Tensors:
        return (*memory, *_zeros(memory), *_zeros(memory))

    def __call__(self, state: Tensors, grads: Tensors, k: int) -> Tensors:
        memory, m, v = _split(state, len(grads))
        clipped = tuple(map(self._clipped, grads))
        m = tuple(torch.lerp(a, h, 1 - self.beta1) for a, h in zip(m, clipped, strict=True))
        v = tuple(torch.addcmul(self.beta2 * a, h, h, value=1 - self.beta2) for a, h in zip(v, clipped, strict=True))
        m_scale, v_scale = 1 - self.beta1 ** (k + 1), 1 - self.beta2 ** (k + 1)
        along = tuple(a / (m_scale * (self._root(b / v_scale) + self.eps)) for a, b in zip(m, v, strict=True))
        if self.weight_decay:
            along = tuple(u + self.weight_decay * old for u, old in zip(along, memory, strict=True))
        return (*self._descend(memory, along, k), *m, *v)

    def _root(self, v: Tensor) -> Tensor:
        if self.eps_root:
            return (v + self.eps_root).sqrt()
        # m is 0 where v is, unless beta2 is: whatever finite derivative the root has there, that of m / (root + eps) is
        # dm / eps; of a kink, as of |h|, the one in the middle is 0
        zero = v == 0
        return torch.where(zero, 0, torch.where(zero, 1, v).sqrt())


#: The rules that configurations name.
UPDATE_RULES: dict[str, Callable[..., Update]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}


def register_update_rule(name: str, rule: Callable[..., Update]) -> None:
    """Makes ``rule`` one that configurations can name (``gradmem.GradMemConfig(inner_optimizer=name)``).

    Args:
        name: a new one.
        rule: called as ``rule(lr=..., **options)`` with those options that were set; it takes the options that its
            signature names. It returns what ``write(update=)`` takes.

    Raises:
        ArgumentError: for a name that another rule has, or a rule that cannot be called with ``lr`` alone.
    """
    check = Checker("register_update_rule")
    if not isinstance(name, str) or not name:
        check.fail("name", "a name", repr(name))
    parameters = _parameters(rule)
    if "lr" not in parameters:
        check.fail("rule", "a callable that takes lr", repr(rule))
    for option, parameter in parameters.items():
        if option != "lr" and parameter.default is parameter.empty:
            check.fail("rule", "a default for every option but lr", option, "functools.partial gives it one")
    if UPDATE_RULES.setdefault(name, rule) is not rule:
        check.fail("name", "one that no other rule has", repr(name), "del UPDATE_RULES[name] forgets the other one")


def rule_options(name: str) -> dict[str, Any]:
    """The options of the rule of that name, beside ``lr``, and their defaults."""
    return {option: p.default for option, p in _parameters(UPDATE_RULES[name]).items() if option != "lr"}


def _parameters(rule: Any) -> Mapping[str, inspect.Parameter]:
    """None of what is no callable, or does not tell."""
    try:
        return inspect.signature(rule).parameters
    except (TypeError, ValueError):
        return {}


def _zeros(memory: Tensors) -> Tensors:
    return tuple(torch.zeros_like(m, dtype=wide_dtype(m)) for m in memory)


def wide_dtype(t: Tensor) -> torch.dtype:
    """What the rules compute in: float32 at least."""
    return torch.promote_types(t.dtype, torch.float32)


def _split(state: Tensors, n: int) -> list[Tensors]:
    return [state[i : i + n] for i in range(0, len(state), n)]
