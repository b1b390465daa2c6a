"""Named ranges: which appear, how they nest, and that off means none."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from second_order import assert_close, randn
from torch.autograd import grad
from torch.profiler import ProfilerActivity, profile

from gradmem_kernels import attention, attention_dual, gelu, profile_ranges, ranges, rotary, rotary_tables, write
from gradmem_kernels.ranges import named_range


class FakeNvtx:
    """Stands in for ``nvtx.annotate``: what is open, in which domain, and all that ever was."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def __call__(self, name: str, domain: str) -> FakeRange:
        assert domain == "gradmem"
        return FakeRange(self, name)


class FakeRange:
    def __init__(self, log: FakeNvtx, name: str) -> None:
        self.log, self.name = log, name

    def __enter__(self) -> None:
        self.log.open.append(self.name)
        self.log.seen.append(tuple(n.removeprefix("gradmem::") for n in self.log.open))

    def __exit__(self, *_: Any) -> None:
        assert self.log.open.pop() == self.name


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvtx]:
    fake = FakeNvtx()
    monkeypatch.setattr(ranges, "_nvtx_range", lambda: fake)
    yield fake
    assert fake.open == []


def profiled(run: Callable[[], Any]) -> list[tuple[str, ...]]:
    """The paths of our ranges that the profiler saw, in order of their start."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        run()

    def path(event: Any) -> tuple[str, ...]:
        above = () if event.cpu_parent is None else path(event.cpu_parent)
        return (*above, event.name.removeprefix("gradmem::")) if event.name.startswith("gradmem::") else above

    events = sorted(profiler.events(), key=lambda e: (e.time_range.start, -e.time_range.end))
    return [path(event) for event in events if event.name.startswith("gradmem::") and not _is_operator(event)]


def _is_operator(event: Any) -> bool:
    """Backends register their kernels as operators of the same namespace, which the profiler sees anyway."""
    return event.name.startswith(("gradmem::native_", "gradmem::triton_"))


def qkv() -> list[torch.Tensor]:
    return [randn(1, 2, 4, 3).requires_grad_() for _ in range(3)]


def second_order() -> None:
    x = randn(2, 3).requires_grad_()
    g, = grad(gelu(x, backend="reference").square().sum(), x, create_graph=True)
    g.sum().backward()


def fused_second_order() -> None:
    q, k, v = qkv()
    g, = grad(attention(q, k, v, causal=True, backend="reference").square().sum(), q, create_graph=True)
    g.sum().backward()


def dual() -> None:
    q, k, v = qkv()
    o, o_t = attention_dual(q, k, v, k, None, q, backend="reference")
    (o * o_t).sum().backward()


def linear() -> None:
    x = randn(1, 2, 4, 6).requires_grad_()
    rotary(x, *rotary_tables(torch.arange(4), 6, dtype=x.dtype)).sum().backward()


def quadratic(memory: torch.Tensor) -> torch.Tensor:
    return memory.square().flatten(1).sum(1)


def write_and_backward() -> None:
    memory = randn(2, 3, 4).requires_grad_()
    write(quadratic, memory, steps=2, lr=0.1).memory.sum().backward()


PATHS = {
    second_order: {
        ("gelu",), ("gelu", "gelu forward"), ("gelu backward",), ("gelu double_backward",),
        ("gelu double_backward", "gelu dual_forward"), ("gelu double_backward", "gelu dual_backward"),
    },
    fused_second_order: {
        ("attention",), ("attention", "attention forward"), ("attention backward",), ("attention double_backward",),
    },
    dual: {("attention_dual",), ("attention_dual", "attention dual_forward"), ("attention dual_backward",)},
    linear: {("rotary",), ("rotary", "rotary forward"), ("rotary transpose",)},
    write_and_backward: {
        ("write",), ("outer backward step 0",), ("outer backward step 1",), ("inner_sgd backward",),
        *((*("write", f"write step {k}"), *rest) for k in range(2)
          for rest in ((), ("inner_sgd",), ("inner_sgd", "inner_sgd forward"))),
    },
}


@pytest.mark.parametrize("run", PATHS, ids=lambda run: run.__name__)
def test_the_profiler_and_nvtx_see_the_same_nested_ranges(run: Callable[[], None], nvtx: FakeNvtx) -> None:
    with profile_ranges():
        seen = profiled(run)
    assert set(seen) == PATHS[run]
    assert Counter(seen) == Counter(nvtx.seen)


def test_the_outer_backward_goes_from_the_last_step_to_the_first(nvtx: FakeNvtx) -> None:
    with profile_ranges():
        write_and_backward()
    steps = [path[-1] for path in nvtx.seen if "step" in path[-1]]
    assert steps == ["write step 0", "write step 1", "outer backward step 1", "outer backward step 0"]


@pytest.mark.parametrize("run", PATHS, ids=lambda run: run.__name__)
def test_off_by_default(run: Callable[[], None], nvtx: FakeNvtx) -> None:
    with profile_ranges():
        pass
    assert profiled(run) == []
    assert nvtx.seen == []


def test_ranges_close_when_an_op_raises(nvtx: FakeNvtx, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def forward(*_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

    monkeypatch.setattr("gradmem_kernels.backend.select", lambda *_: Broken)
    with profile_ranges():
        with pytest.raises(RuntimeError, match="broken"):
            gelu(randn(2, 3))
        assert nvtx.open == []
    assert nvtx.seen == [("gelu",), ("gelu", "gelu forward")]


def test_switching_off_inside_a_range_closes_it(nvtx: FakeNvtx) -> None:
    with profile_ranges():
        outer = named_range("outer")
        outer.__enter__()
    with named_range("inner"):
        assert nvtx.open == ["gradmem::outer"]
    outer.__exit__(None, None, None)
    assert nvtx.seen == [("outer",)]


def test_the_environment_variable() -> None:
    code = "from gradmem_kernels import ranges; print(ranges._on)"
    for value, expected in (("0", "False"), ("1", "True")):
        env = {**os.environ, "GRADMEM_RANGES": value}
        assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                              check=True).stdout.strip() == expected


def test_nvtx_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    nvtx = pytest.importorskip("nvtx", reason="the package nvtx is not installed")
    ranges._nvtx_range.cache_clear()
    assert ranges._nvtx_range() is nvtx.annotate
    with profile_ranges():
        second_order()


def test_without_the_package_the_profiler_still_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    ranges._nvtx_range.cache_clear()
    try:
        with profile_ranges():
            assert ("rotary", "rotary forward") in profiled(linear)
    finally:
        ranges._nvtx_range.cache_clear()


@pytest.mark.parametrize("transform", [
    lambda f: torch.func.grad(f), lambda f: torch.func.hessian(f), lambda f: torch.func.vmap(f),
    lambda f: torch.func.vmap(torch.func.grad(f)), lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
], ids=["grad", "hessian", "vmap", "vmap of grad", "jvp"])
def test_function_transforms_give_the_same(transform: Callable[..., Any], nvtx: FakeNvtx,
                                           request: pytest.FixtureRequest) -> None:
    def f(q: torch.Tensor) -> torch.Tensor:
        return attention(q, q, q, causal=True, backend="reference").square().sum()

    x = randn(2, 1, 2, 4, 3) if "vmap" in request.node.name else randn(1, 2, 4, 3)
    expected = transform(f)(x)
    with profile_ranges():
        found = transform(f)(x)
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)
    assert any("attention" in path for path in nvtx.seen)


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
def test_compiled_code_around_ranges(on: bool, nvtx: FakeNvtx) -> None:
    """A range in compiled code vanishes without breaking the graph; ops, which break it, keep theirs."""
    torch._dynamo.reset()

    def plain(x: torch.Tensor) -> torch.Tensor:
        with named_range("a"):
            y = x * 2
        return y.sin()

    def with_op(x: torch.Tensor) -> torch.Tensor:
        with named_range("a"):
            y = gelu(x * 2)
        return y.sin()

    x = randn(2, 3).requires_grad_()
    monitored = profile_ranges() if on else named_range()
    with monitored:
        assert_close({"y": torch.compile(plain, backend="eager", fullgraph=True)(x)}, {"y": plain(x)})
        nvtx.seen.clear()
        assert_close({"y": torch.compile(with_op, backend="eager")(x)}, {"y": gelu(x * 2).sin()})
    assert [path[-1] for path in nvtx.seen if "gelu" in path[-1]] == (["gelu", "gelu forward"] * 2 if on else [])
    torch._dynamo.reset()


def test_nothing_of_it_is_pickled(nvtx: FakeNvtx) -> None:
    with profile_ranges():
        x = randn(2, 3)
        y = gelu(x)
        assert torch.equal(pickle.loads(pickle.dumps(y)), y)
