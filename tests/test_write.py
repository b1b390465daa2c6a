"""WRITE against a plain loop with ``create_graph=True``: every order, recomputation, learning rate and clipping."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from gradmem_kernels import Decoder, DecoderConfig, HigherOrderError, Prefix, PrefixLoss, backend, write
from gradmem_kernels.checks import ArgumentError

ORDERS = [("second", None), ("second", 1), ("second", 0), ("first", None), ("none", None)]
F64 = torch.float64


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-300))


def agree(ours: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...], tolerance: float = 1e-9) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None or not b.any():
            assert all(t is None or not t.any() for t in (a, b)), f"gradient {i}"
        else:
            assert relative(a, b) < tolerance, f"gradient {i}"


def outer_loss(memory: tuple[Tensor, ...], losses: Tensor) -> Tensor:
    """Reaches every output, with weights that differ, so that no term can stand in for another."""
    weights = torch.linspace(0.3, 1.1, losses.numel(), dtype=losses.dtype).view_as(losses)
    return sum(m.sin().square().sum() for m in memory) + (weights * losses.square()).sum()


class Quartic:
    """A loss without a dual form, of one or two memory tensors, that closes over two leaves."""

    def __init__(self, tensors: int = 1) -> None:
        self.w = torch.randn(4, 3, dtype=F64, requires_grad=True)
        self.b = torch.randn(3, dtype=F64, requires_grad=True)
        self.memory = tuple(torch.randn(2, *shape, dtype=F64, requires_grad=True) for shape in [(3, 4), (3,)][:tensors])

    def __call__(self, m: Tensor, n: Tensor | None = None) -> Tensor:
        h = (m @ self.w + self.b).tanh()
        h = h.square().sum((1, 2)) + 0.1 * m.pow(4).sum((1, 2))
        return h if n is None else h + (n * m.sum(1)[:, :3]).sin().sum(1)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (*self.memory, self.w, self.b)


class Case:
    """A decoder with grouped heads, control tokens, a projection and a padded context, behind a trained embedding."""

    def __init__(self, *, tied: bool = False, **prefix_options: Any) -> None:
        options = {"control_tokens": 1, "projection": True, **prefix_options}
        config = DecoderConfig(8, 2, 2, 12, num_kv_heads=1, rotary_dim=2)
        self.decoder = Decoder(config, dtype=F64)
        self.prefix = Prefix(8, dtype=F64, **options)
        for p in (*self.decoder.parameters(), *self.prefix.parameters()):
            torch.nn.init.normal_(p, std=0.5)
        self.table = torch.randn(7, 8, dtype=F64, requires_grad=True)
        self.head = self.table if tied else torch.randn(7, 8, dtype=F64, requires_grad=True)
        self.bias = torch.randn(7, dtype=F64, requires_grad=True)
        self.tokens = torch.randint(7, (2, 5))
        self.labels = self.tokens.clone()
        self.labels[1, 3:] = -100
        self.memory = torch.randn(2, 3, 8, dtype=F64, requires_grad=True)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        own = {id(t): t for t in (self.memory, self.table, self.head, self.bias)}
        return (*own.values(), *self.prefix.parameters(), *self.decoder.parameters())

    def ours(self) -> PrefixLoss:
        return PrefixLoss(self.decoder, self.prefix, self.table[self.tokens], self.labels, self.head,
                          head_bias=self.bias)

    def plain(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(plain.prefix_loss, self.decoder, self.prefix, self.table[self.tokens], self.labels,
                                 self.head, self.bias)


@pytest.mark.parametrize(("order", "last"), ORDERS)
@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
@pytest.mark.parametrize("tied", [False, True])
def test_decoder_gradients(order: str, last: int | None, recompute: str, tied: bool) -> None:
    case = Case(tied=tied)
    lr = torch.tensor([0.3, 0.2, -0.1], dtype=F64, requires_grad=True)
    out = write(case.ours(), case.memory, steps=3, lr=lr, order=order, second_order_steps=last, recompute=recompute)
    memory, losses, norms = plain.write(case.plain(), (case.memory,), steps=3, lr=lambda k, _: lr[k], order=order,
                                        second_order_steps=last)
    if order == "none":
        memory = tuple(m.detach() for m in memory)
        assert not out.memory.requires_grad
    assert relative(out.memory, memory[0]) < 1e-12
    assert relative(out.losses, losses) < 1e-12
    assert relative(out.grad_norms, norms) < 1e-12
    assert not out.grad_norms.requires_grad
    inputs = (lr, *case.leaves)
    agree(torch.autograd.grad(outer_loss((out.memory,), out.losses), inputs, allow_unused=True),
          torch.autograd.grad(outer_loss(memory, losses), inputs, allow_unused=True))


@pytest.mark.parametrize(("order", "last"), ORDERS)
@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
def test_gradients_of_a_projection_of_each_sample(order: str, last: int | None, recompute: str) -> None:
    case = Case(per_sample=True)
    case.labels[0] = -100  # a sample without a token: loss and gradient are 0
    start = (case.memory, *case.prefix.fast_weights(2))
    lr = torch.tensor([0.3, 0.2, -0.1], dtype=F64, requires_grad=True)
    out = write(case.ours(), start, steps=3, lr=lr, order=order, second_order_steps=last, recompute=recompute)
    memory, losses, norms = plain.write(case.plain(), start, steps=3, lr=lambda k, _: lr[k], order=order,
                                        second_order_steps=last)
    if order == "none":
        memory = tuple(m.detach() for m in memory)
    assert relative(out.grad_norms, norms) < 1e-12
    assert torch.equal(out.memory[0][0], case.memory[0])
    inputs = (lr, *case.leaves)
    agree(torch.autograd.grad(outer_loss(out.memory, out.losses), inputs, allow_unused=True),
          torch.autograd.grad(outer_loss(memory, losses), inputs, allow_unused=True))


def test_decoder_gradients_of_the_memory_alone() -> None:
    case = Case(control_tokens=0, projection=False)
    grads = []
    for recompute in ("none", "step", "layer"):
        out = write(case.ours(), case.memory, steps=2, lr=0.2, recompute=recompute)
        grads.append(torch.autograd.grad(out.memory.square().sum(), case.leaves))
    memory, _, _ = plain.write(case.plain(), (case.memory,), steps=2, lr=lambda k, i: 0.2)
    expected = torch.autograd.grad(memory[0].square().sum(), case.leaves)
    for ours in grads:
        agree(ours, expected)


def test_frozen_weights_get_no_gradient_and_lose_none() -> None:
    case = Case()
    for p in case.decoder.parameters():
        p.requires_grad_(False)
    inputs = (case.memory, case.table, case.head)
    out = write(case.ours(), case.memory, steps=2, lr=0.2)
    memory, _, _ = plain.write(case.plain(), (case.memory,), steps=2, lr=lambda k, i: 0.2)
    agree(torch.autograd.grad(out.memory.square().sum(), inputs),
          torch.autograd.grad(memory[0].square().sum(), inputs))
    assert not any(p.requires_grad for p in case.decoder.parameters())


RATES = {
    "number": (lambda: 0.3, lambda lr, k, m: lr),
    "per step": (lambda: torch.tensor([0.3, 0.1], dtype=F64, requires_grad=True), lambda lr, k, m: lr[k]),
    "per entry": (lambda: torch.rand(3, 4, dtype=F64).unsqueeze(0).requires_grad_(), lambda lr, k, m: lr),
    "per step and row": (lambda: torch.rand(2, 1, 3, 1, dtype=F64, requires_grad=True), lambda lr, k, m: lr[k]),
    "float32": (lambda: torch.tensor([0.3, 0.1], requires_grad=True), lambda lr, k, m: lr[k].double()),
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("clips", [{}, {"clip_value": 0.3}, {"clip_norm": 0.7}, {"clip_value": 0.4, "clip_norm": 0.8}],
                         ids=str)
@pytest.mark.parametrize("recompute", ["none", "step"])
def test_rates_and_clipping(rate: str, clips: dict[str, float], recompute: str) -> None:
    make, at = RATES[rate]
    loss, lr = Quartic(), make()
    out = write(loss, loss.memory[0], steps=2, lr=lr, recompute=recompute, **clips)
    memory, losses, _ = plain.write(loss, loss.memory, steps=2, lr=lambda k, i: at(lr, k, None), **clips)
    inputs = loss.leaves + ((lr,) if isinstance(lr, Tensor) else ())
    agree(torch.autograd.grad(outer_loss((out.memory,), out.losses), inputs),
          torch.autograd.grad(outer_loss(memory, losses), inputs), 1e-6 if rate == "float32" else 1e-9)


@pytest.mark.parametrize(("order", "last"), ORDERS)
@pytest.mark.parametrize("recompute", ["none", "step"])
def test_tuple_memory(order: str, last: int | None, recompute: str) -> None:
    loss = Quartic(tensors=2)
    lr = torch.rand(2, 1, 1, 4, dtype=F64, requires_grad=True)
    out = write(loss, loss.memory, steps=2, lr=(lr, 0.2), order=order, second_order_steps=last, recompute=recompute)
    assert isinstance(out.memory, tuple)
    memory, losses, norms = plain.write(loss, loss.memory, steps=2, lr=lambda k, i: lr[k] if i == 0 else 0.2,
                                        order=order, second_order_steps=last)
    if order == "none":
        memory = tuple(m.detach() for m in memory)
    assert relative(out.grad_norms, norms) < 1e-12
    inputs = (lr, *loss.leaves)
    agree(torch.autograd.grad(outer_loss(out.memory, out.losses), inputs, allow_unused=True),
          torch.autograd.grad(outer_loss(memory, losses), inputs, allow_unused=True))


class Momentum:
    """A rule of its own: heavy ball, with a learned decay, state beside the memory."""

    def __init__(self, lr: float, decay: Tensor) -> None:
        self.lr, self.decay = lr, decay

    def init(self, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*memory, torch.zeros_like(memory[0]))

    def __call__(self, state: tuple[Tensor, ...], grads: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
        velocity = self.decay * state[1] + grads[0]
        return state[0] - self.lr / (k + 1) * velocity, velocity


@pytest.mark.parametrize("recompute", ["none", "step"])
def test_update_rule(recompute: str) -> None:
    loss, decay = Quartic(), torch.tensor(0.8, dtype=F64, requires_grad=True)
    out = write(loss, loss.memory[0], steps=3, lr=None, update=Momentum(0.2, decay), recompute=recompute)
    m, velocity = loss.memory[0], torch.zeros_like(loss.memory[0])
    for k in range(3):
        g, = torch.autograd.grad(loss(m).sum(), m, create_graph=True)
        velocity = decay * velocity + g
        m = m - 0.2 / (k + 1) * velocity
    inputs = (decay, *loss.leaves)
    agree(torch.autograd.grad(out.memory.square().sum(), inputs), torch.autograd.grad(m.square().sum(), inputs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
def test_inference(mode: Callable[[], Any], recompute: str) -> None:
    case = Case()
    expected = write(case.ours(), case.memory, steps=2, lr=0.2, clip_norm=0.5)
    with mode():
        out = write(case.ours(), case.memory, steps=2, lr=0.2, clip_norm=0.5, recompute=recompute)
    assert not out.memory.requires_grad
    assert not out.losses.requires_grad
    assert torch.equal(out.memory, expected.memory)
    assert torch.equal(out.losses, expected.losses)
    assert all(p.requires_grad for p in case.decoder.parameters())


def test_inference_tensors_as_memory() -> None:
    case = Case()
    with torch.inference_mode():
        memory = case.memory * 1.0
        out = write(case.ours(), memory, steps=1, lr=0.2)
    assert torch.equal(out.memory, write(case.ours(), case.memory, steps=1, lr=0.2).memory)


def test_what_was_made_in_inference_mode_can_be_written() -> None:
    case = Case()
    expected = write(case.ours(), case.memory, steps=1, lr=0.2).memory
    with torch.inference_mode():
        labels, embeds, head = case.labels.clone(), case.table[case.tokens], case.head * 1.0
        out = write(PrefixLoss(case.decoder, case.prefix, embeds, labels, head, head_bias=case.bias), case.memory,
                    steps=1, lr=0.2)
    assert torch.equal(out.memory, expected)


@pytest.mark.parametrize("order", ["none", "first", "second"])
def test_no_steps(order: str) -> None:
    loss = Quartic()
    out = write(loss, loss.memory[0], steps=0, lr=0.1, order=order)
    assert torch.equal(out.memory, loss.memory[0])
    assert out.losses.shape == out.grad_norms.shape == (0, 2)
    assert out.finite.all()


# --- replay, orders of differentiation, samples ------------------------------------------------------------------


def test_a_loss_whose_random_numbers_are_replayed_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Quartic()
    monkeypatch.setattr(sys.modules["gradmem_kernels.write"], "_capturing", lambda _: True)
    with pytest.raises(ArgumentError, match="write: recompute: expected 'none' while a CUDA graph is captured"):
        write(loss, loss.memory, steps=1, lr=0.1)
    write(loss, loss.memory, steps=1, lr=0.1, recompute="none")
    with torch.no_grad():
        write(loss, loss.memory, steps=1, lr=0.1)


def test_recomputation_replays_random_numbers() -> None:
    loss = Quartic()
    dropout = torch.nn.Dropout(0.5)

    def noisy(m: Tensor) -> Tensor:
        return (dropout(m) @ loss.w).tanh().square().sum((1, 2))

    grads = []
    for recompute in ("none", "step"):
        torch.manual_seed(3)
        out = write(noisy, loss.memory[0], steps=2, lr=0.3, recompute=recompute)
        torch.manual_seed(4)  # what runs between WRITE and the backward pass must not matter
        state = torch.get_rng_state()
        grads.append(torch.autograd.grad(out.memory.square().sum(), (loss.memory[0], loss.w)))
        assert torch.equal(state, torch.get_rng_state())
    agree(grads[1], grads[0], 1e-12)


class Adapted(torch.nn.Module):
    """A linear map and an adapter that drops in training, as those of peft."""

    def __init__(self, linear: torch.nn.Linear, drop: torch.nn.Module) -> None:
        super().__init__()
        self.linear, self.drop = linear, drop
        self.adapter = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.adapter(self.drop(x))


@pytest.mark.parametrize("order", ["none", "first"])
@pytest.mark.parametrize("dropout", [torch.nn.Dropout, torch.nn.AlphaDropout])
def test_recomputation_replays_the_dropout_of_adapters(order: str, dropout: Any) -> None:
    """Where the plain form runs again; the dual form refuses dropout."""
    case = Case()
    for name in ("gate_proj", "down_proj"):
        case.decoder.layers[1].mlp[name] = Adapted(case.decoder.layers[1].mlp[name], dropout(0.5))
    grads = []
    for recompute in ("none", "step"):
        torch.manual_seed(3)
        out = write(case.ours(), case.memory, steps=2, lr=0.3, recompute=recompute, order=order)
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(outer_loss((out.memory,), out.losses), case.leaves[1:], allow_unused=True))
    agree(grads[1], grads[0], 1e-12)
    out = write(case.ours(), case.memory, steps=1, lr=0.3)
    with pytest.raises(ArgumentError, match=r"linear_dual: Adapted: expected an adapter without dropout, .* 0\.5 in"):
        out.memory.sum().backward()


def test_layers_run_again_by_the_backend_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case, select = Case(), backend.select
    served: set[str] = set()

    def record(op: str, name: str | None, *tensors: Tensor | None) -> Any:
        kernels = select(op, name, *tensors)
        served.add(getattr(kernels, "__name__", type(kernels).__name__))
        return kernels

    monkeypatch.setattr(backend, "select", record)
    with backend.use_backend("reference"):
        out = write(case.ours(), case.memory, steps=1, lr=0.2, recompute="layer")
    out.memory.square().sum().backward()
    assert served
    assert all(name.startswith("gradmem_kernels.reference.") for name in served)


def test_recomputation_replays_autocast() -> None:
    loss = Quartic()
    w, memory = loss.w.detach().float().requires_grad_(), loss.memory[0].detach().float().requires_grad_()
    seen = []

    def mixed(m: Tensor) -> Tensor:
        h = m @ w
        seen.append(h.dtype)
        return h.float().tanh().square().sum((1, 2))

    with torch.autocast("cpu", torch.bfloat16):
        out = write(mixed, memory, steps=2, lr=0.3)
    torch.autograd.grad(out.memory.square().sum(), (memory, w))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
def test_hooks_of_parameters_see_the_whole_gradient(recompute: str) -> None:
    """Once, and not what each step adds to it."""
    case, seen = Case(), []
    weight = case.decoder.layers[0].mlp["up_proj"].weight
    expected = torch.autograd.grad(write(case.ours(), case.memory, steps=3, lr=0.2).memory.square().sum(), weight)
    for i in range(2):
        weight.register_hook(lambda g, i=i: [seen.append((i, g.clone())), g / 2][1])
    write(case.ours(), case.memory, steps=3, lr=0.2, recompute=recompute).memory.square().sum().backward()
    assert [i for i, _ in seen] == [0, 1]
    agree((seen[0][1], weight.grad), (expected[0], expected[0] / 4))


@pytest.mark.parametrize("has_dual", [False, True])
def test_third_derivative_raises(has_dual: bool) -> None:
    case = Case() if has_dual else Quartic()
    loss, memory = (case.ours(), case.memory) if has_dual else (case, case.memory[0])
    out = write(loss, memory, steps=1, lr=0.1)
    g, = torch.autograd.grad(out.memory.square().sum(), memory, create_graph=True)
    with pytest.raises(HigherOrderError, match="write"):
        torch.autograd.grad(g.sum(), memory)


@pytest.mark.parametrize("recompute", ["none", "step"])
def test_third_derivative_by_a_weight_is_not_dropped(recompute: str) -> None:
    w = torch.randn(3, dtype=F64, requires_grad=True)
    out = write(lambda m: (m * w).square().sum(1), torch.ones(2, 3, dtype=F64), steps=1, lr=0.1, recompute=recompute)
    g, = torch.autograd.grad(out.losses.sum(), w, create_graph=True)
    if recompute == "none":
        agree(torch.autograd.grad(g.square().sum(), w), (32 * w,))
    else:
        with pytest.raises(HigherOrderError, match="write"):
            torch.autograd.grad(g.square().sum(), w)


@pytest.mark.parametrize("recompute", ["none", "step"])
def test_a_loss_may_close_over_the_memory_itself(recompute: str) -> None:
    m = torch.randn(2, 3, dtype=F64, requires_grad=True)
    out = write(lambda x: (x * m + x.pow(3)).sum(1), m, steps=1, lr=0.1, recompute=recompute)
    expected = m - 0.1 * (m + 3 * m.square())
    agree((out.memory,), (expected,))
    agree(torch.autograd.grad(out.memory.sin().sum(), m), torch.autograd.grad(expected.sin().sum(), m))
    twice = write(lambda x, y: (x.square() * y).sum(1), (m, m), steps=1, lr=0.1, recompute=recompute).memory
    agree(twice, (m - 0.1 * 2 * m.square(), m - 0.1 * m.square()))


@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
@pytest.mark.parametrize("prefix", [{}, {"control_tokens": 0}, {"control_tokens": 0, "per_sample": True}], ids=str)
def test_autocast_of_a_decoder(recompute: str, prefix: dict[str, Any]) -> None:
    case = Case(**prefix)
    for module in (case.decoder, case.prefix):
        module.float()
    table, memory = (t.detach().float().requires_grad_() for t in (case.table, case.memory))
    inputs = (memory, table, *case.decoder.parameters())

    def gradients(autocast: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = write(PrefixLoss(case.decoder, case.prefix, table[case.tokens], case.labels, table),
                        (memory, *case.prefix.fast_weights(2)), steps=2, lr=0.05, recompute=recompute)
        assert {t.dtype for t in (out.losses, *out.memory)} == {torch.float32}
        return torch.autograd.grad(out.memory[0].square().sum(), inputs)  # outside, as PyTorch advises

    for low, exact in zip(gradients(True), gradients(False), strict=True):
        assert relative(low, exact) < 0.15


def test_inside_forward_mode_raises() -> None:
    loss = Quartic()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ArgumentError, match="forward mode"):
        write(loss, loss.memory[0], steps=1, lr=0.1)


def test_inside_torch_func_raises() -> None:
    loss = Quartic()
    with pytest.raises(ArgumentError, match=r"torch\.func"):
        torch.func.grad(lambda m: write(loss, m, steps=1, lr=0.1).memory.sum())(loss.memory[0].detach())


@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
def test_a_sample_does_not_depend_on_its_batch(recompute: str) -> None:
    case = Case()
    together = write(case.ours(), case.memory, steps=3, lr=0.2, recompute=recompute, clip_norm=0.5)
    alone = write(PrefixLoss(case.decoder, case.prefix, case.table[case.tokens[1:]], case.labels[1:], case.head,
                             head_bias=case.bias), case.memory[1:], steps=3, lr=0.2, recompute=recompute, clip_norm=0.5)
    assert relative(together.memory[1:], alone.memory) < 1e-12


def test_right_padding_changes_nothing() -> None:
    case = Case()
    short = write(PrefixLoss(case.decoder, case.prefix, case.table[case.tokens[1:, :3]], case.tokens[1:, :3],
                             case.head, head_bias=case.bias), case.memory[1:], steps=3, lr=0.2)
    padded = write(case.ours(), case.memory, steps=3, lr=0.2)
    assert relative(padded.memory[1:], short.memory) < 1e-12


def test_samples_with_a_gradient_that_is_not_finite_are_reported() -> None:
    memory = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
    out = write(lambda m: m.sqrt().sum(1), memory, steps=2, lr=0.1)
    assert out.finite.tolist() == [True, False]
    assert out.memory[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    memory = torch.ones(2, 300, 300, dtype=dtype)
    slope = torch.tensor([300.0, 0.0], dtype=dtype)
    out = write(lambda m: (slope[:, None, None] * m).float().sum((1, 2)), memory, steps=1, lr=1e-4)
    assert out.finite.all()
    torch.testing.assert_close(out.grad_norms, torch.tensor([[9e4, 0.0]]), rtol=1e-3, atol=0)
    assert write(lambda m: m.sum((1, 2)), memory, steps=0, lr=1e-4).grad_norms.dtype == torch.float32


# --- what is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["step", "layer"])
def test_a_recomputed_step_keeps_only_its_memory(recompute: str) -> None:
    def kept(steps: int) -> tuple[int, list[list[int]]]:
        """How many memories, and the shapes of the rest, which the steps share."""
        case = Case()
        out = write(case.ours(), case.memory, steps=steps, lr=0.1, recompute=recompute)
        edges, seen, saved = [out.memory.grad_fn], set(), []
        while edges:
            node = edges.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "saved_tensors"):
                saved += [t for t in node.saved_tensors if t is not None]
            edges += [edge for edge, _ in node.next_functions]
        known = {t.untyped_storage().data_ptr() for t in case.leaves}
        own = {t.untyped_storage().data_ptr(): t for t in saved if t.untyped_storage().data_ptr() not in known}
        memories = [t for t in own.values() if t.shape == case.memory.shape]
        return len(memories), sorted(list(t.shape) for t in own.values() if t.shape != case.memory.shape)

    (few, shared), (many, also_shared) = kept(2), kept(5)
    assert (few, many) == (1, 4)  # the first is a leaf
    assert shared == also_shared


@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
def test_no_tensor_outlives_the_output(recompute: str) -> None:
    case = Case()

    def live_tensors() -> int:
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    write(case.ours(), case.memory, steps=2, lr=0.1, recompute=recompute)  # makes the rotary tables
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        write(case.ours(), case.memory, steps=2, lr=0.1, recompute=recompute)
        assert live_tensors() == before
    finally:
        gc.enable()


# --- bad input ---------------------------------------------------------------------------------------------------

class Starting:
    """A rule whose state starts in a way of its own."""

    def __init__(self, init: Callable[..., Any]) -> None:
        self.init = init

    def __call__(self, state: tuple[Tensor, ...], grads: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
        return state


BAD: list[tuple[dict[str, Any], str]] = [
    ({"memory": [1.0]}, "memory: expected a tensor, got list"),
    ({"memory": ()}, "memory: expected a tensor or a tuple of tensors, got an empty tuple"),
    ({"memory": torch.zeros(2, 3, dtype=torch.int64)}, "memory: expected dtype .*, got int64"),
    ({"memory": (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))},
     r"memory\[1\]: expected the device of memory\[0\], cpu, got meta"),
    ({"memory": torch.zeros(3)}, "memory: expected rank 2 or more"),
    ({"steps": -1}, "steps: expected an integer >= 0, got -1"),
    ({"steps": 1.5}, "steps: expected an integer >= 0, got 1.5"),
    ({"lr": float("nan")}, "lr: expected a finite number >= 0, got nan"),
    ({"lr": -0.1}, "lr: expected a finite number >= 0, got -0.1"),
    ({"lr": torch.tensor([0.1, float("nan")], dtype=F64)}, "lr: expected finite values"),
    ({"lr": torch.rand(3, dtype=F64)}, r"lr: expected shape \[steps=2\], got \[3\]"),
    ({"lr": torch.rand(2, 2, dtype=F64)}, "lr: expected a floating-point tensor that broadcasts"),
    ({"lr": torch.rand(5, 2, 3, 4, dtype=F64)}, "lr: expected a floating-point tensor that broadcasts"),
    ({"lr": (0.1, 0.2)}, "lr: expected no tuple"),
    ({"lr": None}, "lr: expected a number or a tensor, got None"),
    ({"lr": "fast"}, "lr: expected a number, got str"),
    ({"order": "third"}, "order: expected one of none, first, second, got 'third'"),
    ({"second_order_steps": -1}, "second_order_steps: expected an integer >= 0"),
    ({"second_order_steps": True}, "second_order_steps: expected an integer >= 0, .* got True"),
    ({"second_order_steps": 1, "order": "first"}, "second_order_steps: .*order='second'"),
    ({"recompute": "some"}, "recompute: expected one of none, step, layer, auto, got 'some'"),
    ({"recompute": "layer"}, "recompute: .*without a dual form"),
    ({"clip_value": 0.0}, "clip_value: expected a finite number > 0, got 0.0"),
    ({"clip_norm": float("inf")}, "clip_norm: expected a finite number > 0"),
    ({"params": [torch.zeros(1)]}, r"params\[0\]: expected a tensor that requires grad"),
    ({"params": torch.zeros(1, requires_grad=True)}, "params: expected a sequence of tensors, got Tensor"),
    ({"params": 3}, "params: expected a sequence of tensors, got int"),
    ({"loss_fn": 3}, "loss_fn: expected a callable, got int"),
    ({"loss_fn": lambda m: m.sum()}, r"loss_fn: expected shape \[B=2\], got \[\]"),
    ({"loss_fn": lambda m: m.detach().sum((1, 2))}, "loss_fn: expected losses that depend on the memory"),
    ({"update": lambda s, g, k: s}, "lr: expected None with update="),
    ({"update": lambda s, g, k: s[0], "lr": None}, "update: expected a tuple"),
    ({"update": lambda s, g, k: (), "lr": None}, r"update: expected a tuple that .* 1 memory .*, got a tuple of 0"),
    ({"update": lambda s, g, k: (s[0][:1],), "lr": None}, r"update: expected memory of shape \[2, 3, 4\]"),
    ({"update": Starting(lambda m: m[0]), "lr": None}, "update.init: expected a tuple that .*, got Tensor"),
    ({"update": Starting(lambda m: (m[0].float(),)), "lr": None, "steps": 0}, "update.init: expected memory of .*64"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    loss = Quartic()
    arguments: dict[str, Any] = {"loss_fn": loss, "memory": loss.memory[0], "steps": 2, "lr": 0.1} | changed
    with pytest.raises(ArgumentError, match=f"write: {message}"):
        write(arguments.pop("loss_fn"), arguments.pop("memory"), **arguments)


def test_params_of_a_dual_loss_cannot_be_replaced() -> None:
    case = Case()
    with pytest.raises(ArgumentError, match="params: expected None"):
        write(case.ours(), case.memory, steps=1, lr=0.1, params=[case.table])
