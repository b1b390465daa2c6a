"""Rules of the inner steps: their values against torch.optim, their derivatives against a plain unrolled loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from test_write import F64, ORDERS, Case, Quartic, agree, outer_loss, relative
from torch import Tensor

from gradmem_kernels import SGD, UPDATE_RULES, Adam, Momentum, register_update_rule, write
from gradmem_kernels.checks import ArgumentError
from gradmem_kernels.update_rules import rule_options

STEPS = 3


def sums(grads: list[Any], decay: float) -> Any:
    """The velocity, written out: sum over j of decay^(k - j) * g_j."""
    return sum(decay ** (len(grads) - 1 - j) * g for j, g in enumerate(grads))


def adam(grads: list[Tensor], m: Tensor, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0,
         weight_decay: float = 0.0) -> Tensor:
    """With sums written out; a moment over the sum of its own weights is what bias correction makes of it."""
    one = [1.0] * len(grads)
    first = sums(grads, b1) / sums(one, b1)
    second = sums([g.square() for g in grads], b2) / sums(one, b2)
    return first / ((second + eps_root).sqrt() + eps) + weight_decay * m


class Rule:
    """A rule, its plain direction, and the optimizer of torch whose values it has."""

    def __init__(self, make: Callable[..., Any], direction: Callable[[list[Tensor], Tensor], Tensor],
                 optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        self.make, self.direction, self.optimizer = make, direction, optimizer


def named(rule: Any, **options: Any) -> Callable[..., Any]:
    return lambda lr, **clips: rule(lr, **options, **clips)


SMOOTH = {"eps": 0.05, "eps_root": 0.02}
RULES = {
    "sgd": Rule(SGD, lambda g, m: g[-1], torch.optim.SGD),
    "momentum": Rule(named(Momentum, momentum=0.7), lambda g, m: sums(g, 0.7),
                     lambda p, lr: torch.optim.SGD(p, lr, momentum=0.7)),
    "nesterov": Rule(named(Momentum, nesterov=True), lambda g, m: g[-1] + 0.9 * sums(g, 0.9),
                     lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True)),
    "adam": Rule(Adam, adam, torch.optim.Adam),
    "adam smooth": Rule(named(Adam, beta1=0.8, beta2=0.95, **SMOOTH),
                        lambda g, m: adam(g, m, b1=0.8, b2=0.95, **SMOOTH)),
    "adamw": Rule(named(Adam, beta1=0.6, beta2=0.9, eps=1e-3, weight_decay=0.2),
                  lambda g, m: adam(g, m, b1=0.6, b2=0.9, eps=1e-3, weight_decay=0.2),
                  lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.6, 0.9), eps=1e-3, weight_decay=0.2)),
}
CLIPS: list[dict[str, float]] = [{}, {"clip_value": 0.4, "clip_norm": 0.8}]
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.optimizer is not None])
def test_values_are_those_of_torch_optim(name: str) -> None:
    loss, rule = Quartic(tensors=2), RULES[name]
    memory = [m.detach().clone().requires_grad_() for m in loss.memory]
    optimizer = rule.optimizer(memory, 0.1)
    for _ in range(6):
        optimizer.zero_grad()
        loss(*memory).sum().backward()
        optimizer.step()
    out = write(loss, loss.memory, steps=6, update=rule.make(0.1))
    for ours, theirs in zip(out.memory, memory, strict=True):
        assert relative(ours, theirs) < 1e-12


RATES = {
    "per step": (lambda: torch.tensor([0.3, 0.2, -0.1], dtype=F64, requires_grad=True), lambda lr, k: lr[k]),
    "per token": (lambda: torch.rand(1, 3, 1, dtype=F64).requires_grad_(), lambda lr, k: lr),
    "per step and token": (lambda: torch.rand(STEPS, 1, 3, 1, dtype=F64, requires_grad=True), lambda lr, k: lr[k]),
}


@every_rule
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("clips", CLIPS, ids=str)
@pytest.mark.parametrize("recompute", ["none", "step"])
def test_gradients(rule: Rule, rate: str, clips: dict[str, float], recompute: str) -> None:
    make, at = RATES[rate]
    loss, lr = Quartic(), make()
    inputs = (lr, *loss.leaves)
    for order, last in ORDERS:
        out = write(loss, loss.memory[0], steps=STEPS, update=rule.make(lr, **clips), order=order,
                    second_order_steps=last, recompute=recompute)
        memory, losses, norms = plain.write(loss, loss.memory, steps=STEPS, lr=lambda k, i: at(lr, k), order=order,
                                            second_order_steps=last, direction=rule.direction, **clips)
        if order == "none":
            memory = tuple(m.detach() for m in memory)
            assert not out.memory.requires_grad
        for ours, theirs in ((out.memory, memory[0]), (out.losses, losses), (out.grad_norms, norms)):
            assert relative(ours, theirs) < 1e-12
        agree(torch.autograd.grad(outer_loss((out.memory,), out.losses), inputs, allow_unused=True),
              torch.autograd.grad(outer_loss(memory, losses), inputs, allow_unused=True))


@every_rule
@pytest.mark.parametrize(("order", "last"), ORDERS)
def test_decoder_gradients(rule: Rule, order: str, last: int | None) -> None:
    """The dual form's gradients; ways to recompute differ by rounding alone."""
    case, found = Case(), []
    lr = torch.tensor([0.3, 0.2, -0.1], dtype=F64, requires_grad=True)
    inputs = (lr, *case.leaves)
    for recompute in ("none", "step", "layer"):
        out = write(case.ours(), case.memory, steps=STEPS, update=rule.make(lr, clip_norm=0.5), order=order,
                    second_order_steps=last, recompute=recompute)
        found.append(torch.autograd.grad(outer_loss((out.memory,), out.losses), inputs, allow_unused=True))
    memory, losses, _ = plain.write(case.plain(), (case.memory,), steps=STEPS, lr=lambda k, i: lr[k], order=order,
                                    second_order_steps=last, direction=rule.direction, clip_norm=0.5)
    if order == "none":
        memory = tuple(m.detach() for m in memory)
    agree(found[0], torch.autograd.grad(outer_loss(memory, losses), inputs, allow_unused=True), 1e-8)
    agree(found[1], found[0], 1e-9)
    agree(found[2], found[1], 1e-12)


@every_rule
@pytest.mark.parametrize("recompute", ["none", "step"])
def test_gradcheck(rule: Rule, recompute: str) -> None:
    loss = Quartic()

    def written(m: Tensor, lr: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        def inner(x: Tensor) -> Tensor:
            return (x @ w + b).tanh().square().sum((1, 2)) + 0.1 * x.pow(4).sum((1, 2))

        out = write(inner, m, steps=STEPS, update=rule.make(lr, clip_norm=0.9), params=[w, b], recompute=recompute)
        return out.memory, out.losses

    lr = torch.rand(STEPS, 1, 3, 1, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(written, (loss.memory[0], lr, loss.w, loss.b), fast_mode=True)


@every_rule
def test_gradcheck_of_first_order(rule: Rule) -> None:
    """Of a linear loss the gradient is a constant, and first order exact."""
    slope = torch.randn(2, 3, 4, dtype=F64)

    def written(m: Tensor, lr: Tensor) -> Tensor:
        return write(lambda x: (slope * x).sum((1, 2)), m, steps=STEPS, update=rule.make(lr), order="first").memory

    lr = torch.rand(STEPS, 1, 3, 1, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(written, (torch.randn(2, 3, 4, dtype=F64, requires_grad=True), lr))


@every_rule
@pytest.mark.parametrize("order", ["none", "first", "second"])
def test_tuple_memory(rule: Rule, order: str) -> None:
    loss = Quartic(tensors=2)
    lr = torch.rand(STEPS, 1, 1, 4, dtype=F64, requires_grad=True)
    out = write(loss, loss.memory, steps=STEPS, update=rule.make((lr, 0.2), clip_norm=0.8), order=order)
    memory, losses, _ = plain.write(loss, loss.memory, steps=STEPS, lr=lambda k, i: lr[k] if i == 0 else 0.2,
                                    order=order, direction=rule.direction, clip_norm=0.8)
    if order == "none":
        memory = tuple(m.detach() for m in memory)
    inputs = (lr, *loss.leaves)
    agree(torch.autograd.grad(outer_loss(out.memory, out.losses), inputs, allow_unused=True),
          torch.autograd.grad(outer_loss(memory, losses), inputs, allow_unused=True))


@pytest.mark.parametrize("clips", CLIPS, ids=str)
def test_sgd_is_what_write_does_by_itself(clips: dict[str, float]) -> None:
    loss = Quartic()
    lr = torch.rand(STEPS, 1, 3, 1, dtype=F64, requires_grad=True)
    results = []
    for how in ({"lr": lr, **clips}, {"update": SGD(lr, **clips)}):
        out = write(loss, loss.memory[0], steps=STEPS, **how)
        results.append((out.memory, *torch.autograd.grad(outer_loss((out.memory,), out.losses), (lr, *loss.leaves))))
    assert all(map(torch.equal, *results))


@every_rule
@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
def test_a_sample_does_not_depend_on_its_batch(rule: Rule, recompute: str) -> None:
    case = Case()
    update = rule.make(0.2, clip_norm=0.5)
    together = write(case.ours(), case.memory, steps=STEPS, update=update, recompute=recompute)
    other, = torch.autograd.grad(together.memory[1].sum(), case.memory, retain_graph=True)
    assert not other[0].any()
    assert other[1].any()
    case.tokens, case.labels = case.tokens[1:], case.labels[1:]
    alone = write(case.ours(), case.memory[1:], steps=STEPS, update=update, recompute=recompute)
    assert relative(together.memory[1:], alone.memory) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_rule
def test_inference(rule: Rule, mode: Callable[[], Any]) -> None:
    case, lr = Case(), torch.tensor([0.3, 0.2, 0.1], dtype=F64, requires_grad=True)
    expected = write(case.ours(), case.memory, steps=STEPS, update=rule.make(lr))
    with mode():
        out = write(case.ours(), case.memory, steps=STEPS, update=rule.make(lr))
    assert torch.equal(out.memory, expected.memory)
    assert not out.memory.requires_grad


# --- Adam where a gradient is zero -------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "eps_root"), [(0.1, 0.0), (0.0, 0.04), (0.1, 0.04), (1e-8, 0.0)])
@pytest.mark.parametrize("recompute", ["none", "step"])
def test_adam_at_a_gradient_of_zero(eps: float, eps_root: float, recompute: str) -> None:
    """At the bottom of a parabola u = h / (|h| + eps) is differentiable, and so is what follows."""
    m = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    curvature = torch.rand(2, 3, dtype=F64, requires_grad=True)
    b1, lr, scale = 0.9, 0.3, 1 / (eps + eps_root**0.5)
    out = write(lambda x: (curvature * x.square()).sum(1) / 2, m, steps=2, recompute=recompute,
                update=Adam(lr, eps=eps, eps_root=eps_root))
    assert not out.memory.any()
    # M_1 = a M, M_2 = a M - lr * scale * curvature * (b1 + a) / (1 + b1) * M  around 0
    a = 1 - lr * scale * curvature
    slope = a - lr * scale * curvature * (b1 + a) / (1 + b1)
    agree(torch.autograd.grad(out.memory.sum(), (m, curvature)), (slope, torch.zeros_like(m)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adam_where_some_gradients_are_zero_or_vanish(dtype: torch.dtype) -> None:
    memory = torch.tensor([[1.0, 0.0, 1e-7], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([1.0, 1.0, 1e-25], requires_grad=True)
    out = write(lambda x: (weight * x.float().square()).sum(1), memory, steps=3,
                update=Adam(1e-3, eps=1e-8 if dtype == torch.float32 else 1e-3))
    assert out.memory.dtype == dtype
    found = torch.autograd.grad(out.memory.float().sin().sum(), (memory, weight))
    assert all(g.isfinite().all() for g in found)


def test_a_norm_of_zero_is_not_clipped() -> None:
    m = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    for rule in (Momentum(0.1, clip_norm=0.5), Adam(0.1, eps=0.1, clip_norm=0.5, clip_value=0.5)):
        out = write(lambda x: x.square().sum(1), m, steps=2, update=rule)
        assert torch.autograd.grad(out.memory.sum(), m)[0].isfinite().all()


def test_a_gradient_that_is_not_a_number_stays_in_its_sample() -> None:
    memory = torch.tensor([[1.0, 2.0], [-1.0, 1.0]], requires_grad=True)
    for rule in (Momentum(0.1, clip_norm=0.1), Adam(0.1), Adam(0.1, eps_root=0.1, clip_value=0.1)):
        out = write(lambda m: m.sqrt().sum(1), memory, steps=2, update=rule)
        assert out.finite.tolist() == [True, False]
        assert out.memory[0].isfinite().all()
        assert out.memory[1, 0].isnan()


# --- precision, autocast, what is kept ---------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_memory_alone(rule: Rule, dtype: torch.dtype) -> None:
    memory, gradient = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, 4).to(dtype)
    update = rule.make(0.3)

    def stepped(dtype: torch.dtype) -> tuple[Tensor, ...]:
        state = (memory.to(dtype),)
        state = update.init(state) if hasattr(update, "init") else state
        return update(state, (gradient.to(dtype),), 0)

    narrow, exact = stepped(dtype), stepped(F64)
    assert narrow[0].dtype == dtype
    assert all(t.dtype == torch.float32 for t in narrow[1:])
    assert torch.equal(narrow[0], exact[0].to(dtype))


@every_rule
def test_a_rate_keeps_its_precision(rule: Rule) -> None:
    """Whatever that of the memory is."""
    lr = torch.tensor([0.1003], requires_grad=True)
    memory, slope = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([1000.0, 7.0])
    update, exact = rule.make(lr), rule.make(lr.double())
    out = write(lambda m: (slope * m.float()).sum(1), memory, steps=1, update=update).memory
    expected = write(lambda m: (slope * m).sum(1), memory.double(), steps=1, update=exact).memory
    assert torch.equal(out, expected.to(torch.bfloat16))
    assert torch.autograd.grad(out.sum(), lr)[0].dtype == torch.float32


@pytest.mark.parametrize("rule", [Momentum(0.1, clip_norm=0.5), Adam(0.1, clip_norm=0.5)], ids=["momentum", "adam"])
def test_autocast_leaves_the_rule_in_its_precision(rule: Any) -> None:
    memory, slope = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = write(lambda x: (slope * x.sin()).sum((1, 2)), memory, steps=3, update=rule)
        results.append((out.memory, *torch.autograd.grad(out.memory.square().sum(), memory)))
    assert all(map(torch.equal, *results))


# --- rules of one's own, names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "step"])
@pytest.mark.parametrize("where", ["init", "update"])
def test_order_none_detaches_what_a_rule_hands_out(recompute: str, where: str) -> None:
    loss, held = Quartic(), torch.randn(2, 3, 4, dtype=F64, requires_grad=True)

    class Holder:
        def init(self, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (held,) if where == "init" else memory

        def __call__(self, state: tuple[Tensor, ...], grads: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
            return state if where == "init" else (held,)

    for steps in (0, 2) if where == "init" else (2,):
        assert not write(loss, loss.memory[0], steps=steps, update=Holder(), order="none",
                         recompute=recompute).memory.requires_grad
        assert write(loss, loss.memory[0], steps=steps, update=Holder(), recompute=recompute).memory.requires_grad
        with torch.no_grad():
            assert not write(loss, loss.memory[0], steps=steps, update=Holder()).memory.requires_grad


def test_one_rate_for_memory_tensors_of_different_ranks() -> None:
    """Of rank 2 and more it would be one for each step of some and for each sample of others."""
    memory = torch.randn(2, 3, 4), torch.randn(2, 4)
    with pytest.raises(ArgumentError, match="lr: expected a tuple, one rate for each memory tensor, as these differ"):
        write(lambda m, b: m.square().sum((1, 2)) + b.square().sum(1), memory, steps=2, lr=torch.ones(2, 1, 1))
    rates = torch.tensor([0.1, 0.2])
    out = write(lambda m, b: m.square().sum((1, 2)) + b.square().sum(1), memory, steps=2, lr=rates)
    expected = tuple(t * (1 - 2 * rates[0]) * (1 - 2 * rates[1]) for t in memory)
    torch.testing.assert_close(out.memory, expected)


def test_names_of_rules() -> None:
    def lion(lr: float, *, beta1: float = 0.9) -> Any:
        return SGD(lr)

    expected = {"sgd": SGD, "momentum": Momentum, "adam": Adam}
    assert expected == UPDATE_RULES
    assert set(rule_options("adam")) == {"clip_value", "clip_norm", "beta1", "beta2", "eps", "eps_root", "weight_decay"}
    try:
        for _ in range(2):  # a cell that is run again
            register_update_rule("lion", lion)
        assert rule_options("lion") == {"beta1": 0.9}
        with pytest.raises(ArgumentError, match="register_update_rule: name: expected one that no other rule has"):
            register_update_rule("lion", Adam)
    finally:
        UPDATE_RULES.pop("lion", None)
    for name, rule, message in (("adam", lion, "name: expected one that no other rule has, got 'adam'"),
                                ("", lion, "name: expected a name"), ("x", 3, "rule: expected a callable that takes"),
                                ("x", dict, "rule: expected a callable that takes lr, got <class 'dict'>"),
                                ("x", lambda rate: None, "rule: expected a callable that takes lr"),
                                ("x", lambda lr, beta: None, "rule: expected a default for every option but lr, got b"),
                                ("x", lambda lr, **options: None, "a default for every option but lr, got options")):
        with pytest.raises(ArgumentError, match=message):
            register_update_rule(name, rule)
    assert expected == UPDATE_RULES


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SGD(None), "SGD: lr: expected a number, got NoneType"),
    (lambda: Momentum(-0.1), "Momentum: lr: expected a finite number >= 0, got -0.1"),
    (lambda: Adam(float("inf")), "Adam: lr: expected a finite number >= 0"),
    (lambda: SGD(0.1, clip_value=0), "SGD: clip_value: expected a finite number > 0"),
    (lambda: Adam(0.1, clip_norm="big"), "Adam: clip_norm: expected a number, got str"),
    (lambda: Momentum(0.1, momentum=1.0), "Momentum: momentum: expected a number below 1, got 1.0"),
    (lambda: Momentum(0.1, momentum=torch.tensor(0.9)), "Momentum: momentum: expected a number, got Tensor"),
    (lambda: Momentum(0.1, nesterov=1), "Momentum: nesterov: expected True or False, got 1"),
    (lambda: Adam(0.1, beta1=-0.1), "Adam: beta1: expected a finite number >= 0"),
    (lambda: Adam(0.1, beta2=1), "Adam: beta2: expected a number below 1"),
    (lambda: Adam(0.1, eps=-1e-8), "Adam: eps: expected a finite number >= 0"),
    (lambda: Adam(0.1, eps_root=float("nan")), "Adam: eps_root: expected a finite number >= 0"),
    (lambda: Adam(0.1, weight_decay=-1), "Adam: weight_decay: expected a finite number >= 0"),
    (lambda: Adam(0.1, eps=0), "Adam: eps: expected a number > 0 where eps_root is 0, got 0"),
])
def test_options_that_make_no_rule(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


BAD_RATES = [
    (torch.rand(4, dtype=F64), r"lr: expected shape \[steps=3\], got \[4\]"),
    (torch.rand(2, 2, dtype=F64), "lr: expected a floating-point tensor that broadcasts to the memory"),
    (torch.ones(1, 3, 1, dtype=torch.int64), "lr: expected a floating-point tensor that broadcasts"),
    (torch.full((3,), torch.nan), "lr: expected finite values, got NaN or infinity"),
    (torch.rand(3, device="meta"), "lr: expected the device of the memory, cpu, got meta"),
    ((0.1, 0.2), "lr: expected no tuple, as memory is one tensor"),
]


@pytest.mark.parametrize(("rule", "bad"), [*itertools.product([SGD, Momentum, Adam], BAD_RATES)],
                         ids=lambda value: getattr(value, "__name__", ""))
def test_rates_that_do_not_fit(rule: Any, bad: tuple[Any, str]) -> None:
    loss = Quartic()
    with pytest.raises(ArgumentError, match=f"{rule.__name__}: {bad[1]}"):
        write(loss, loss.memory[0], steps=STEPS, update=rule(bad[0]))


@pytest.mark.parametrize(("how", "message"), [
    ({"update": Adam}, r"write: update: expected a rule, got the class Adam; make one: Adam\(lr=...\)"),
    ({"update": Adam(0.1), "lr": 0.1}, "write: lr: expected None with update="),
    ({"update": Adam(0.1), "clip_norm": 0.1}, "write: clip_norm: expected None with update="),
    ({"update": lambda s, g, k: (s[0].to("meta"),)}, "write: update: expected memory .* on cpu, got .* on meta"),
    ({}, "write: lr: expected a number or a tensor, got None"),
])
def test_how_write_takes_a_rule(how: dict[str, Any], message: str) -> None:
    loss = Quartic()
    with pytest.raises(ArgumentError, match=message):
        write(loss, loss.memory[0], steps=1, **how)
