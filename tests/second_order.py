"""What every op guarantees, one ``check_*`` function per guarantee (:data:`CHECKS`).

A test file describes its op by a :class:`Case`: the op and its dual form beside an independent formula in plain
PyTorch, and float64 inputs. The checks compare the two in every differentiable input and in every way of asking
PyTorch for first and second derivatives.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from gradmem_kernels import backend as backends
from gradmem_kernels.checks import ArgumentError
from gradmem_kernels.derivatives import HigherOrderError

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call of an op beside its plain formula.

    ``op``, ``plain`` and ``dual`` take the differentiable ``inputs`` in order; ``dual`` takes the tangents of the
    ``active`` ones after them and returns the output and its tangent. All get ``aux`` (tensors with a batch dimension,
    not differentiable) by keyword. ``batched`` says which inputs have a batch dimension, the first. ``of_kernels``
    turns flags of the inputs into those that kernels get.
    """

    name: str
    op: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    dual: Callable[..., tuple[Tensor, Tensor]]
    inputs: Inputs
    active: tuple[int, ...]
    batched: tuple[bool, ...]
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    of_kernels: Callable[[tuple[bool, ...]], tuple[bool, ...]] = tuple

    def run_op(self, *x: Tensor) -> Tensor:
        return self.op(*x, **self.aux)

    def run_plain(self, *x: Tensor) -> Tensor:
        return self.plain(*x, **self.aux)

    def run_dual(self, *x_and_tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.dual(*x_and_tangents, **self.aux)

    def run_plain_dual(self, *x_and_tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        n = len(self.inputs)
        x, tangents = x_and_tangents[:n], dict(zip(self.active, x_and_tangents[n:], strict=True))
        x_t = tuple(torch.zeros_like(t) if tangents.get(i) is None else tangents[i] for i, t in enumerate(x))
        return torch.func.jvp(self.run_plain, x, x_t)

    def to(self, dtype: torch.dtype) -> Case:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        return replace(self, inputs=tuple(map(cast, self.inputs)), aux={k: cast(t) for k, t in self.aux.items()})

    def sample(self, b: int) -> Case:
        """Sample ``b`` of the batch alone."""
        return replace(self, inputs=_rows(self.inputs, self.batched, b),
                       aux={k: t[b : b + 1] for k, t in self.aux.items()})

    def cotangent(self) -> Tensor:
        with torch.no_grad():
            return random_like(self.run_plain(*self.inputs))


class Derivatives(NamedTuple):
    """Of ``s = <y, a>``: value, gradients, and the derivatives of ``<gradients, u>`` by the inputs and by ``a``."""

    y: Tensor
    first: Inputs
    second: Inputs

    def named(self) -> dict[str, Tensor]:
        return {"y": self.y, **{f"gradient of input {i}": t for i, t in enumerate(self.first)},
                **{f"second derivative of input {i}": t for i, t in enumerate(self.second[:-1])},
                "second derivative of the cotangent": self.second[-1]}


def derivatives(f: Callable[..., Tensor], inputs: Inputs, a: Tensor, u: Inputs) -> Derivatives:
    x, a = _leaves(inputs), a.detach().requires_grad_()
    y = f(*x)
    first = grad(y, x, a, create_graph=True, materialize_grads=True)
    second = grad(_dot(first, u), (*x, a), materialize_grads=True)
    return Derivatives(y.detach(), tuple(g.detach() for g in first), second)


def check_values(case: Case) -> None:
    """Value, gradients and second derivatives are those of the plain formula; no tensor of the caller changes."""
    a, u = case.cotangent(), _random_likes(case.inputs)
    given = (*case.inputs, *case.aux.values(), a, *u)
    before = [t.clone() for t in given]
    actual = derivatives(case.run_op, case.inputs, a, u)
    assert_close(actual.named(), derivatives(case.run_plain, case.inputs, a, u).named())
    assert all(map(torch.equal, given, before)), "the op wrote into a tensor of its caller"


def check_layouts(case: Case) -> None:
    """Strides do not matter, neither of inputs nor of cotangents."""
    a, u = case.cotangent(), _random_likes(case.inputs)
    expected = derivatives(case.run_plain, case.inputs, a, u).named()
    for lay_out in (_sliced, _transposed):
        moved = replace(case, inputs=tuple(map(lay_out, case.inputs)))
        actual = derivatives(moved.run_op, moved.inputs, lay_out(a), tuple(map(lay_out, u)))
        assert_close(actual.named(), expected)
    ones = torch.ones((), dtype=a.dtype, device=a.device).expand_as(a)  # what y.sum() sends back
    assert_close(derivatives(case.run_op, case.inputs, ones, u).named(),
                 derivatives(case.run_plain, case.inputs, ones.clone(), u).named())


def check_gradcheck(case: Case) -> None:
    """First and second derivatives are those of finite differences, in reverse and forward mode and batched."""
    x = _leaves(case.inputs)
    assert gradcheck(case.run_op, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(case.run_op, x, check_fwd_over_rev=True, check_batched_grad=True)


def check_transforms(case: Case) -> None:
    """``torch.func`` transforms and their nestings give what they give for the plain formula."""
    a, u, others = case.cotangent(), _random_likes(case.inputs), _random_likes(case.inputs)

    def compare(op: Iterator[tuple[str, Any]], plain: Iterator[tuple[str, Any]]) -> None:
        for (name, actual), (_, expected) in zip(op, plain, strict=True):
            assert_close(_named(name, _flat(actual)), _named(name, _flat(expected)))

    compare(_transforms(case.run_op, case.inputs, a, u, others), _transforms(case.run_plain, case.inputs, a, u, others))
    if case.aux:
        compare(_maps_of_aux(case, case.op, a, u), _maps_of_aux(case, case.plain, a, u))


def check_dual(case: Case) -> None:
    """``*_dual`` gives values and gradients of ``jvp`` of the formula; a tangent ``None`` is a zero, and stays absent.

    The gradients also hold when only one of the two outputs is used.
    """
    u, a, b = _random_likes(case.inputs), case.cotangent(), case.cotangent()
    for given in itertools.product((True, False), repeat=len(case.active)):
        x_t = tuple(u[i] if flag else None for i, flag in zip(case.active, given, strict=True))
        for bars in ((a, b), (a, None), (None, b)):
            assert_close(_dual_gradients(case.run_dual, case.inputs, x_t, bars),
                         _dual_gradients(case.run_plain_dual, case.inputs, x_t, bars))
    y, y_t = case.run_dual(*case.inputs, *(None,) * len(case.active))
    assert torch.equal(y_t, torch.zeros_like(y)), "the tangent along nothing is not zero"


def check_dual_once(case: Case) -> None:
    """:func:`check_dual` with every tangent and both cotangents, where the kernels are slow."""
    u, bars = _random_likes(case.inputs), (case.cotangent(), case.cotangent())
    x_t = tuple(u[i] for i in case.active)
    assert_close(_dual_gradients(case.run_dual, case.inputs, x_t, bars),
                 _dual_gradients(case.run_plain_dual, case.inputs, x_t, bars))


def check_dual_gradcheck(case: Case) -> None:
    """``*_dual`` passes ``gradcheck`` in inputs and tangents."""
    u = _random_likes(case.inputs)
    assert gradcheck(case.run_dual, _leaves((*case.inputs, *(u[i] for i in case.active))), check_batched_grad=True)


def check_last_derivative(case: Case) -> None:
    """The third derivative of the op and the second of its dual raise, naming them, however they are asked for."""
    a, u = case.cotangent(), _random_likes(case.inputs)
    x_t = tuple(u[i] for i in case.active)

    def first(*x: Tensor) -> Tensor:
        return _dot(torch.func.grad(lambda *x: (case.run_op(*x) * a).sum(), _all(x))(*x), u)

    def second(*x: Tensor) -> Tensor:
        return _dot(torch.func.grad(first, _all(x))(*x), u)

    def dual(*x: Tensor) -> Tensor:
        return sum((t * a).sum() for t in case.run_dual(*x, *x_t))

    def dual_first(*x: Tensor) -> Tensor:
        return _dot(torch.func.grad(dual, _all(x))(*x), u)

    for f, name in ((second, case.name), (dual_first, f"{case.name}_dual")):
        for derivative in (lambda f: torch.func.grad(f, _all(u))(*case.inputs),
                           lambda f: torch.func.jvp(f, case.inputs, u)):
            with pytest.raises(HigherOrderError, match=rf"^{name}\b"):
                derivative(f)
    with pytest.raises(HigherOrderError, match=rf"^{case.name}_dual\b"):
        torch.func.jvp(dual, case.inputs, u)

    # plain autograd, one retained graph upon the other
    x = _leaves(case.inputs)
    for y, order, name in ((case.run_op(*x), 2, case.name), (dual(*x), 1, f"{case.name}_dual")):
        for _ in range(order):
            y = _dot(grad(y.sum(), x, create_graph=True, materialize_grads=True), u)
        with pytest.raises(HigherOrderError, match=rf"^{name}\b"):
            grad(y, x)


def check_needs(case: Case) -> None:
    """No kernel works for a gradient that nobody asked for: frozen inputs, and ``grad(loss, some of the inputs)``.

    Cotangents that are absent reach the kernels as ``None``.
    """
    n, a, u = len(case.inputs), case.cotangent(), _random_likes(case.inputs)
    x_t = tuple(u[i] for i in case.active)
    full, none = derivatives(case.run_op, case.inputs, a, u), case.of_kernels((False,) * n)
    for wanted in itertools.product((True, False), repeat=n):
        if not any(wanted):
            continue
        for frozen in (True, False):
            x = [t.detach().requires_grad_(flag or not frozen) for t, flag in zip(case.inputs, wanted, strict=True)]
            some = [t for t, flag in zip(x, wanted, strict=True) if flag]
            with spy_kernels() as calls:
                first = grad((case.run_op(*x) * a).sum(), some, create_graph=True)
            of_kernels = case.of_kernels(wanted)
            assert calls.needs_of(["backward"], len(none)) == [{"needs": of_kernels}]
            assert_close(_named("gradient", first), _named("gradient", _chosen(full.first, wanted)))
            s = _dot(first, _chosen(u, wanted))
            if s.requires_grad:
                with spy_kernels(calls):
                    second = grad(s, some, materialize_grads=True)
                for call in calls.needs_of(["double_backward", "dual_backward"], len(none)):
                    assert not any(need and not want for need, want in zip(call["needs"], of_kernels, strict=True))
                    assert not any(call.get("needs_t", ()))
                # the derivative of <first, u> along the wanted inputs alone
                alone = tuple(t if flag else torch.zeros_like(t) for t, flag in zip(u, wanted, strict=True))
                expected = derivatives(case.run_op, case.inputs, a, alone).second[:n]
                assert_close(_named("second derivative", second),
                             _named("second derivative", _chosen(expected, wanted)))

            with spy_kernels() as calls:
                _, y_t = case.run_dual(*x, *x_t)
                grad((y_t * a).sum(), some, materialize_grads=True)
            assert calls.needs_of(["dual_backward"], len(none)) == [{"needs": of_kernels, "needs_t": none}]
            assert all(t is None for t in calls[-1].arguments["y_bar"])
    x, x_t = case.inputs, _leaves(x_t)
    with spy_kernels() as calls:
        _, y_t = case.run_dual(*x, *x_t)
        grad((y_t * a).sum(), x_t)
    active = case.of_kernels(tuple(i in case.active for i in range(n)))
    assert calls.needs_of(["dual_backward"], len(none)) == [{"needs": none, "needs_t": active}]


def check_precision(case: Case, dtype: torch.dtype, only_rounds: bool = True) -> None:
    """In a narrower dtype, of both orders, the op errs at most twice as much as the plain formula in that dtype.

    Error: distance to the float64 result for the same (rounded) inputs. Rounding that result to its dtype is free, and
    is all that is left of the error of a half-precision result that is computed in float32 throughout
    (``only_rounds``). Needs inputs large enough for errors to be more than luck.
    """
    narrow = case.to(dtype)
    exact = narrow.to(torch.float64)
    try:
        narrow.run_op(*narrow.inputs)
    except backends.BackendError as refusal:
        pytest.skip(str(refusal))
    a, u = narrow.cotangent(), _random_likes(narrow.inputs)

    def results(c: Case, op: Callable[..., Tensor], dual: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        bar, x_t = (a, u) if c is narrow else (a.double(), tuple(t.double() for t in u))
        return {**derivatives(op, c.inputs, bar, x_t).named(),
                **_dual_gradients(dual, c.inputs, tuple(x_t[i] for i in c.active), (bar, bar))}

    ours = results(narrow, narrow.run_op, narrow.run_dual)
    plain = results(narrow, narrow.run_plain, narrow.run_plain_dual)
    for name, truth in results(exact, exact.run_plain, exact.run_plain_dual).items():
        assert ours[name].dtype == plain[name].dtype, f"{name} is {ours[name].dtype}, expected {plain[name].dtype}"
        error, of_plain = (ours[name] - truth).norm(), (plain[name] - truth).norm()
        of_rounding = (truth.to(ours[name].dtype) - truth).norm()
        rounds = only_rounds and ours[name].dtype in (torch.bfloat16, torch.float16)
        assert error <= (1.01 * of_rounding if rounds else 2 * of_plain + of_rounding), (
            f"{name} in {dtype}: error {error:.2e}, of plain PyTorch {of_plain:.2e}, of rounding {of_rounding:.2e}")


def check_determinism(case: Case) -> None:
    """The same call gives the same bits."""
    a, u = case.cotangent(), _random_likes(case.inputs)
    x_t = tuple(u[i] for i in case.active)
    one, two = ({**derivatives(case.run_op, case.inputs, a, u).named(),
                 **_dual_gradients(case.run_dual, case.inputs, x_t, (a, a))} for _ in range(2))
    for name in one:
        assert torch.equal(one[name], two[name]), f"{name} differs between two equal calls"


def check_autocast(case: Case) -> None:
    """Autocast, on in the forward pass alone or in all of them, changes no bit: kernels keep their tensors' dtype."""
    case = case.to(torch.float32)
    a, u = case.cotangent(), _random_likes(case.inputs)
    x_t = tuple(u[i] for i in case.active)

    def results() -> dict[str, Tensor]:
        return {**derivatives(case.run_op, case.inputs, a, u).named(),
                **_dual_gradients(case.run_dual, case.inputs, x_t, (a, a))}

    expected, x = results(), _leaves(case.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual, y = results(), case.run_op(*x)
    for name, t in expected.items():
        assert torch.equal(actual[name], t), f"{name} differs under autocast"
    for i, g in enumerate(grad(y, x, a, materialize_grads=True)):
        assert torch.equal(g, expected[f"gradient of input {i}"])


def check_retained_graph(case: Case) -> None:
    """A backward pass leaves the graph as it was: run again, it gives the same bits."""
    x, a, u = _leaves(case.inputs), case.cotangent().requires_grad_(), _random_likes(case.inputs)
    x_t = _leaves(u[i] for i in case.active)
    y = case.run_op(*x)
    s = _dot(grad(y, x, a, create_graph=True, materialize_grads=True), u)
    dual = sum((t * a).sum() for t in case.run_dual(*x, *x_t))
    for of, by in ((y, x), (s, (*x, a)), (dual, (*x, *x_t))):
        bar = torch.ones_like(of)
        one, two = (grad(of, by, bar, retain_graph=True, materialize_grads=True) for _ in range(2))
        assert all(map(torch.equal, one, two))


def check_batch(case: Case) -> None:
    """A sample's results do not depend on the others in its batch, and weights receive the samples' sum."""
    a, u = case.cotangent(), _random_likes(case.inputs)
    together = derivatives(case.run_op, case.inputs, a, u)
    alone = [derivatives(one.run_op, one.inputs, a[b : b + 1], _rows(u, case.batched, b))
             for b in range(a.shape[0]) for one in (case.sample(b),)]
    assert_close({"y": together.y}, {"y": torch.cat([s.y for s in alone])})
    for order in ("first", "second"):
        for i, flag in enumerate(case.batched):
            parts = [getattr(s, order)[i] for s in alone]
            assert_close({f"{order} derivative of input {i}": getattr(together, order)[i]},
                         {f"{order} derivative of input {i}": torch.cat(parts) if flag else sum(parts)})


def check_no_graph(case: Case) -> None:
    """Without a graph (``no_grad``, ``inference_mode``, nothing requires grad) the values are the same."""
    x = _leaves(case.inputs)
    x_t = tuple(map(torch.ones_like, (case.inputs[i] for i in case.active)))
    expected = case.run_op(*x), *case.run_dual(*x, *x_t)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            actual = case.run_op(*x), *case.run_dual(*x, *x_t)
        assert not any(t.requires_grad for t in actual)
        assert all(map(torch.equal, actual, expected))
    assert not case.run_op(*case.inputs).requires_grad


CHECKS = (check_values, check_layouts, check_gradcheck, check_transforms, check_dual, check_dual_gradcheck,
          check_last_derivative, check_needs, check_determinism, check_autocast, check_retained_graph, check_batch,
          check_no_graph)


#: Parametrises a test of :func:`check_precision`.
narrow_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16],
                                        ids=lambda d: str(d).removeprefix("torch."))


def every_check(checks: Sequence[Callable[[Case], None]] = CHECKS,
                **cases: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrises a test by ``check`` and by ``options``, one of these named cases."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        test = pytest.mark.parametrize("options", cases.values(), ids=cases.keys())(test)
        return pytest.mark.parametrize("check", checks, ids=lambda f: f.__name__.removeprefix("check_"))(test)

    return decorate


def check_empty(case: Case) -> None:
    """Tensors without elements go through both orders and the dual form."""
    assert any(t.numel() == 0 for t in case.inputs)
    check_values(case)
    check_dual(case)
    check_no_graph(case)


def refused(call: Callable[[], Any], op: str, argument: str, expected: str, got: str) -> None:
    """``call`` raises an ArgumentError that names the op and the argument, what was expected and what came."""
    with pytest.raises(ArgumentError) as caught:
        call()
    start, _, came = str(caught.value).partition(", got ")
    assert start.startswith(f"{op}: {argument}: expected ")
    assert expected in start
    assert got in came


#: What a backend may provide for an op; all but ``double_backward`` it must.
KERNELS = ("forward", "backward", "dual_forward", "dual_backward", "double_backward")


class KernelCall(NamedTuple):
    kernel: str
    arguments: Mapping[str, Any]


class KernelCalls(list[KernelCall]):
    def needs_of(self, kernels: Sequence[str], present: int) -> list[dict[str, tuple[bool, ...]]]:
        """For each call of ``kernels``, what it needed of the ``present`` inputs (of absent ones it needs nothing)."""
        calls = [{k: v for k, v in call.arguments.items() if k.startswith("needs")} for call in self
                 if call.kernel in kernels]
        assert not any(any(needs[present:]) for call in calls for needs in call.values())
        return [{k: needs[:present] for k, needs in call.items()} for call in calls]


@contextlib.contextmanager
def spy_kernels(calls: KernelCalls | None = None) -> Iterator[KernelCalls]:
    """Records the kernel calls of the ops called inside (also those of their later backward passes)."""
    calls = KernelCalls() if calls is None else calls
    select = backends.select

    def record(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            calls.append(KernelCall(name, inspect.signature(kernel).bind(*args, **options).arguments))
            return kernel(*args, **options)

        return run

    def select_spied(*args: Any) -> SimpleNamespace:
        kernels = select(*args)
        return SimpleNamespace(**{name: record(name, getattr(kernels, name)) for name in KERNELS
                                  if hasattr(kernels, name)})

    with mock.patch.object(backends, "select", select_spied):
        yield calls


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal up to float64 rounding, name by name."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def random_like(t: Tensor) -> Tensor:
    return torch.randn_like(t, memory_format=torch.contiguous_format)


def _random_likes(tensors: Inputs) -> Inputs:
    return tuple(map(random_like, tensors))


def _transforms(f: Callable[..., Tensor], x: Inputs, a: Tensor, u: Inputs,
                others: Inputs) -> Iterator[tuple[str, Any]]:
    from torch.func import grad, hessian, jvp, vmap

    def s(*x: Tensor) -> Tensor:
        return (f(*x) * a).sum()

    def jvp_of_grad(*x: Tensor, along: Sequence[bool]) -> Inputs:
        def of_some(*some: Tensor) -> Inputs:
            rest = iter(some)
            return ds(*(next(rest) if flag else t for t, flag in zip(x, along, strict=True)))

        return jvp(of_some, _chosen(x, along), _chosen(u, along))[1]

    every = _all(x)
    ds = grad(s, every)
    yield "jvp", jvp(f, x, u)
    yield "grad(grad)", grad(lambda *x: _dot(ds(*x), u), every)(*x)
    yield "grad(jvp)", grad(lambda *x: (jvp(f, x, u)[1] * a).sum(), every)(*x)
    yield "hessian", hessian(s, every)(*x)
    # along each input alone and along all, mapped over each input alone and over all
    choices = dict.fromkeys([*(tuple(i == j for j in every) for i in every), (True,) * len(x)])
    along = ((f"jvp(grad) along {c}", partial(jvp_of_grad, along=c)) for c in choices)
    for name, g in (("f", f), ("grad", ds), *along):
        yield name, g(*x)
        for mapped in choices:
            pairs = (torch.stack(pair) if flag else pair[0] for *pair, flag in zip(x, others, mapped, strict=True))
            yield f"vmap({name}) over {mapped}", vmap(g, tuple(0 if flag else None for flag in mapped))(*pairs)


def _maps_of_aux(case: Case, f: Callable[..., Tensor], a: Tensor, u: Inputs) -> Iterator[tuple[str, Any]]:
    from torch.func import grad, jvp, vmap

    def jvp_of_grad(aux: Mapping[str, Tensor]) -> Any:
        return jvp(grad(lambda *x: (f(*x, **aux) * a).sum(), _all(u)), case.inputs, u)

    yield "vmap(jvp(grad)) over aux", vmap(jvp_of_grad)({k: torch.stack((t, t.flip(0))) for k, t in case.aux.items()})


def _dual_gradients(dual: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, tangents: Sequence[Tensor | None],
                    bars: tuple[Tensor | None, Tensor | None]) -> dict[str, Tensor]:
    x, x_t = _leaves(inputs), tuple(None if t is None else t.detach().requires_grad_() for t in tangents)
    y, y_t = dual(*x, *x_t)
    used = [(t * bar).sum() for t, bar in zip((y, y_t), bars, strict=True) if bar is not None and t.requires_grad]
    leaves = (*x, *(t for t in x_t if t is not None))
    gradients = grad(sum(used), leaves, materialize_grads=True) if used else tuple(map(torch.zeros_like, leaves))
    return {"y": y.detach(), "y_t": y_t.detach(), **_named("gradient of input or tangent", gradients)}


def _named(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name} {i}": t for i, t in enumerate(tensors)}


def _chosen(tensors: Sequence[Tensor], flags: Sequence[bool]) -> Inputs:
    return tuple(t for t, flag in zip(tensors, flags, strict=True) if flag)


def _rows(tensors: Inputs, batched: Sequence[bool], b: int) -> Inputs:
    return tuple(t[b : b + 1] if flag else t for t, flag in zip(tensors, batched, strict=True))


def _leaves(tensors: Iterable[Tensor]) -> Inputs:
    return tuple(t.detach().requires_grad_() for t in tensors)


def _all(x: Sequence[Any]) -> tuple[int, ...]:
    return tuple(range(len(x)))


def _flat(tree: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


def _dot(tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    return sum((t * d).sum() for t, d in zip(tensors, directions, strict=True))


def _sliced(t: Tensor) -> Tensor:
    """The same values, every second element of memory."""
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0] if t.dim() else t


def _transposed(t: Tensor) -> Tensor:
    """The same values, dimensions laid out in the opposite order."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)
