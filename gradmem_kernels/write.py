"""WRITE: per-sample gradient descent on a memory, differentiable through its steps (docs/write.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from gradmem_kernels import backend as backends
from gradmem_kernels.checks import Checker
from gradmem_kernels.closure import ClosedOver
from gradmem_kernels.derivatives import last_derivative, needed, note_inputs
from gradmem_kernels.learning_rates import LearningRate
from gradmem_kernels.ranges import named_range
from gradmem_kernels.recompute import resolve_recompute
from gradmem_kernels.update_rules import Update, wide_dtype
from gradmem_kernels.write_checks import Memory, check_arguments, checked_loss, checked_state

__all__ = ["WriteOutput", "write"]


class WriteOutput(NamedTuple):
    """What :func:`write` returns.

    Attributes:
        memory: the memory after the last step, a tensor or a tuple as it was given.
        losses: ``[steps, B]``, the loss at the memory before each step.
        grad_norms: ``[steps, B]``, the gradient's norm over all memory tensors, before clipping, detached; float32 at
            least.
    """

    memory: Any
    losses: Tensor
    grad_norms: Tensor

    @property
    def finite(self) -> Tensor:
        """``[B]`` bool: whether every gradient of a sample was finite."""
        return self.grad_norms.isfinite().all(0)


def write(loss_fn: Callable[..., Tensor], memory: Memory, *, steps: int, lr: LearningRate | None = None,
          params: Iterable[Tensor] | None = None, order: str = "second", second_order_steps: int | None = None,
          recompute: str = "step", clip_value: float | None = None, clip_norm: float | None = None,
          update: Update | None = None) -> WriteOutput:
    """Takes ``steps`` steps of ``M <- M - lr * clip(dL_i/dM)`` for each sample ``i`` by itself.

    Outer gradients flow through the steps, exactly, to the initial memory, ``lr`` and ``params``. Under ``no_grad``
    and ``inference_mode`` nothing is kept.

    Args:
        loss_fn: ``loss_fn(*memory) -> [B]``, twice differentiable in the memory. It is summed over the batch before it
            is differentiated, so that a sample's update does not depend on the batch. One with a dual form also has
            ``dual(*memory, *tangents, checkpoint_layers=False, cotangents=(None, None)) -> (loss [B], loss_t [B])``
            (``cotangents``: those that the two will get, where ``None`` beside a given one is a zero), ``params``
            (the tensors that meta-gradients reach) and, if one of these is no leaf, ``detached()`` (the same loss with
            leaves in their place), if its plain form draws random numbers, ``random = True`` (they are replayed):
            :class:`gradmem_kernels.PrefixLoss` is one.
        memory: a floating-point tensor of rank 2 or more, batch first, or a tuple of them. It keeps its dtype
            (float32 recommended); ``loss_fn`` casts.
        steps: number of steps K, >= 0. With 0 the memory comes back unchanged.
        lr: a number, finite and >= 0; a 1-D tensor of length ``steps``; a tensor that broadcasts to the memory, of its
            rank, optionally preceded by a dimension of length ``steps``; for tuple memory also a tuple of these.
            ``None`` with ``update``, which has its own.
        params: the tensors, leaves or not, that the loss closes over and meta-gradients reach. ``None``: leaves are
            found in the loss's graph. A tensor that requires grad and is neither found nor given is refused by name.
        order: ``"second"``: exact. ``"first"``: each step's gradient is a constant. ``"none"``: memory, ``lr`` and
            every step are detached. In every order ``losses[k]`` has its direct gradient.
        second_order_steps: with ``order="second"``, only the last so many steps are second order, earlier ones first.
        recompute: what is kept for the backward pass. ``"none"``: each step's graph. ``"step"``: only the memory
            before each step. ``"layer"``: likewise, and the dual pass checkpoints its layers; needs a dual form.
            ``"auto"``: the first of these that fits (:func:`gradmem_kernels.resolve_recompute`).
            Recomputation replays the CPU's and the memory's device's random numbers and the autocast state.
        clip_value: clamps each entry of the gradient to ``[-clip_value, clip_value]``, before ``clip_norm``.
        clip_norm: scales a sample's gradient, per memory tensor, by ``c / (|g| + 1e-6)`` where its norm exceeds ``c``.
        update: ``update(state, grads, k) -> state`` replaces the rule and is differentiated too: :class:`Momentum` and
            :class:`Adam` are such rules. ``state`` is a tuple that begins with the memory tensors; it starts as
            ``update.init(memory)`` where there is one, else as the memory. ``update.check(memory, steps)``, where there
            is one, is called first.

    Returns:
        A :class:`WriteOutput`.

    Raises:
        ArgumentError: for an argument that does not fit, a closed-over tensor that would miss its gradient, use inside
            a ``torch.func`` transform or forward mode.
        HigherOrderError: when the outer gradient is differentiated again with recomputation.

    Source: Kuratov et al., GradMem, arXiv 2603.13875; the second-order step on dual numbers in docs/write.md.
    """
    tensors, params, update = check_arguments(loss_fn, memory, steps, lr, params, order, second_order_steps, recompute,
                                              clip_value, clip_norm, update)
    second_from = 0 if second_order_steps is None else max(0, steps - second_order_steps)
    outer_grad = torch.is_grad_enabled()

    with named_range("write"), torch.inference_mode(False), torch.set_grad_enabled(outer_grad):
        state = tuple(t.clone() if t.is_inference() else t for t in tensors)
        if steps > 0 and hasattr(loss_fn, "prepared"):
            loss_fn = loss_fn.prepared(*state)
        if recompute == "auto":
            recompute = resolve_recompute(loss_fn, *state, steps=steps) if outer_grad else "step"
        gradient = _Gradient(loss_fn, params, steps, recompute, outer_grad)
        attached = outer_grad and order != "none"
        with torch.set_grad_enabled(attached):
            state = checked_state("update.init", update.init(state), tensors) if hasattr(update, "init") else state
        losses, norms = [], []
        for k in range(steps):
            state = state if attached else _detached(state)
            with named_range("write step", k):
                loss, grads = gradient(k, state[: len(tensors)], order == "second" and k >= second_from)
                losses.append(loss)
                norms.append(_sample_norms(grads))
                with torch.set_grad_enabled(attached):
                    state = checked_state("update", update(state, grads, k), tensors)
        state = state if attached else _detached(state)
    written = state[: len(tensors)] if isinstance(memory, tuple) else state[0]
    if steps == 0:
        none = tensors[0].new_zeros(0, tensors[0].shape[0])
        return WriteOutput(written, none, none.to(wide_dtype(none)))
    return WriteOutput(written, torch.stack(losses), torch.stack(norms))


class _Gradient:
    """The loss and its gradient at a memory, attached to the outer graph in the way that ``recompute`` says."""

    def __init__(self, loss_fn: Callable[..., Tensor], params: Sequence[Tensor] | None, steps: int, recompute: str,
                 outer_grad: bool) -> None:
        self.loss_fn, self.steps, self.recompute, self.outer_grad = loss_fn, steps, recompute, outer_grad
        self.has_dual = hasattr(loss_fn, "dual")
        #: evaluated where nothing but leaves may be reached; inner_params are its counterparts of params
        self.inner_fn: Any = loss_fn
        self.params: tuple[Tensor, ...] = ()
        self.inner_params: tuple[Tensor, ...] = ()
        self.closed_over: ClosedOver | None = None
        if self.has_dual:
            self.params = self.inner_params = tuple(cast(Any, loss_fn).params)
            if any(not p.is_leaf for p in self.params):
                self.inner_fn = cast(Any, loss_fn).detached()
                self.inner_params = tuple(self.inner_fn.params)
        elif outer_grad and recompute != "none":
            self.closed_over = ClosedOver(loss_fn, params)
        #: whether the loss may draw random numbers, which a recomputation has to draw again
        self.random = outer_grad and (not self.has_dual or getattr(loss_fn, "random", False))

    def __call__(self, k: int, memory: tuple[Tensor, ...], second: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss ``[B]`` and the gradient of step ``k``."""
        if self.outer_grad and self.recompute == "none":
            return self._keep_graph(memory, second)
        if self.random and _capturing(memory[0].device):
            Checker("write").fail(
                "recompute", "'none' while a CUDA graph is captured, for a loss_fn that may draw random numbers",
                repr(self.recompute), "their state, to be replayed, cannot be read then")
        replay = _Replay(memory[0].device, rng=self.random)
        leaves = _leaves(memory)
        # what only the weights' gradients would need is neither computed nor stored
        with torch.enable_grad(), replay.autocast(), _frozen(self.inner_params if self.has_dual else ()):
            loss = checked_loss(self.inner_fn(*leaves), leaves)
            if self.closed_over is not None:
                self._inspect(k, loss, leaves, replay)
            grads = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        if not self.outer_grad:
            return loss.detach(), grads
        step = _Step(k, self, replay, self.params, self.inner_params, [loss.detach(), *grads])
        loss, *attached = _RunStep.apply(step, *memory, *self.params)
        return loss, tuple(g if second else g.detach() for g in attached)

    def _keep_graph(self, memory: tuple[Tensor, ...], second: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        # views: what the loss closes over, the memory itself perhaps, is not what the step differentiates by
        attached = tuple(m.view_as(m) if m.requires_grad else m.detach().requires_grad_() for m in memory)
        loss = checked_loss(self.loss_fn(*attached), attached)
        return loss, torch.autograd.grad(loss.sum(), attached, create_graph=second, retain_graph=True,
                                         materialize_grads=True)

    def _inspect(self, k: int, loss: Tensor, leaves: tuple[Tensor, ...], replay: _Replay) -> None:
        assert self.closed_over is not None
        self.params = self.inner_params = self.closed_over.inspect(loss, leaves)
        if self.steps == 1:  # what was made before the call shows only in a second evaluation
            with replay():
                self.closed_over.inspect(self.loss_fn(*leaves), leaves)
        if k == self.steps - 1:
            self.closed_over = None  # it holds the graph of the first step


class _Step(NamedTuple):
    """What the recomputation of a step needs besides its memory; ``values`` is emptied as they are handed out."""

    k: int
    gradient: _Gradient
    replay: _Replay
    params: tuple[Tensor, ...]
    inner_params: tuple[Tensor, ...]
    values: list[Tensor]

    def cotangents(self, memory: Sequence[Tensor], needs: Sequence[bool], loss_bar: Tensor | None,
                   grad_bars: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Cotangents of the memory and the params that need one, given those of the loss and of the gradient.

        With u the gradient's cotangent, <u, grad L> is the tangent of L along u: differentiate that.
        """
        leaves = _leaves(memory)
        unasked = [p for p, need in zip(self.inner_params, needs[len(leaves) :], strict=True) if not need]
        with _frozen(unasked):
            pairs = [(y, y_bar) for y, y_bar in self._pairs(leaves, loss_bar, grad_bars)
                     if y_bar is not None and y.requires_grad]
            wanted = [t for t, need in zip((*leaves, *self.inner_params), needs, strict=True) if need]
            if not pairs or not wanted:
                return (None,) * len(wanted)
            outputs, bars = zip(*pairs, strict=True)
            with _without_hooks(self.inner_params):
                return torch.autograd.grad(outputs, wanted, bars, allow_unused=True)

    def _pairs(self, leaves: tuple[Tensor, ...], loss_bar: Tensor | None,
               grad_bars: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
        """What to differentiate by the leaves and the params, and the cotangent of each."""
        loss_fn = self.gradient.inner_fn
        with torch.enable_grad(), self.replay():
            if all(u is None for u in grad_bars):
                return [(loss_fn(*leaves), loss_bar)]
            if self.gradient.has_dual:
                tangents = [torch.zeros_like(m) if u is None else u for m, u in zip(leaves, grad_bars, strict=True)]
                ones = leaves[0].new_ones(leaves[0].shape[0])
                loss, loss_t = loss_fn.dual(*leaves, *tangents, checkpoint_layers=self.gradient.recompute == "layer",
                                            cotangents=(loss_bar, ones))
                return [(loss_t, ones.to(loss_t.dtype)), (loss, loss_bar)]
            loss = loss_fn(*leaves)
            grads = torch.autograd.grad(loss.sum(), leaves, create_graph=True, materialize_grads=True)
            return [*zip(grads, grad_bars, strict=True), (loss, loss_bar)]


class _RunStep(Function):
    """``apply(step, *memory, *params) -> (loss [B], *gradient)``; its backward recomputes the step."""

    @staticmethod
    def forward(ctx: Any, step: _Step, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step, ctx.n_memory = step, len(step.values) - 1
        note_inputs(ctx, (step, *tensors))
        ctx.save_for_backward(*tensors)
        values = tuple(step.values)
        step.values.clear()  # kept, they would close a cycle through their own graph
        return values

    @staticmethod
    def backward(ctx: Any, loss_bar: Tensor | None, *grad_bars: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = needed(ctx)[1:]
        n = ctx.n_memory
        if not any(needs) or (loss_bar is None and all(u is None for u in grad_bars)):
            return (None,) * (1 + len(needs))

        def compute(loss_bar: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
            with named_range("outer backward step", ctx.step.k):
                return ctx.step.cotangents(cast(Sequence[Tensor], rest[n : 2 * n]), needs, loss_bar, rest[:n])

        # the params too, so that a further derivative is refused whatever it is taken by
        found = iter(last_derivative("write", compute, loss_bar, *grad_bars, *ctx.saved_tensors))
        return None, *(next(found) if need else None for need in needs)


class _Replay:
    """Runs a block again under the random numbers, autocast state and backend of the time it was made."""

    def __init__(self, device: torch.device, *, rng: bool) -> None:
        self.device, self.rng, self.backend = device, rng, backends.requested()
        self.autocasts = torch.amp.is_autocast_available(device.type)  # not on the meta device
        if self.autocasts:
            self.autocast_dtype = torch.get_autocast_dtype(device.type)
            self.autocast_enabled = torch.is_autocast_enabled(device.type)
        if rng:
            self.cpu_state = torch.get_rng_state()
            self.device_state = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Without the cache of cast weights, which would tie one step's graph to another's."""
        if not self.autocasts:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype, self.autocast_enabled, cache_enabled=False)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        devices = [] if self.device.type == "cpu" else [self.device]
        with (torch.random.fork_rng(devices, enabled=self.rng, device_type=devices[0].type if devices else "cuda"),
              self.autocast(), backends.use_backend(self.backend)):
            if self.rng:
                torch.set_rng_state(self.cpu_state)
                if self.device_state is not None:
                    torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)
            yield


@contextlib.contextmanager
def _frozen(params: Sequence[Tensor]) -> Iterator[None]:
    # inference tensors never had a gradient
    leaves = [p for p in params if p.is_leaf and p.requires_grad and not p.is_inference()]
    for p in leaves:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in leaves:
            p.requires_grad_(True)


@contextlib.contextmanager
def _without_hooks(params: Sequence[Tensor]) -> Iterator[None]:
    """Hooks, and ``grad`` of what retains it, are of the whole gradient, when it arrives, and not of a step's part."""
    hooks = [(own, dict(own)) for p in params if (own := p._backward_hooks)]
    retained = [(p, p.grad) for p in params if p.retains_grad]
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, before in hooks:
            own.update(before)
        for p, grad in retained:
            p.grad = grad


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _leaves(memory: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(m.detach().requires_grad_() for m in memory)


def _sample_norms(grads: Sequence[Tensor]) -> Tensor:
    """[B], over all memory tensors."""
    # in half precision a norm overflows where no entry does
    norms = [torch.linalg.vector_norm(g.detach().flatten(1), dim=1, dtype=wide_dtype(g)) for g in grads]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].dtype) for n in norms]), dim=0)


def _detached(state: tuple[Any, ...]) -> tuple[Any, ...]:
    # what a rule computes here has no graph, but it may hand out a tensor that it holds
    return tuple(t.detach() if isinstance(t, Tensor) else t for t in state)
