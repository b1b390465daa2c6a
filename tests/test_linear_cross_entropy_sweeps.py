"""What the sweeps of linear_cross_entropy cost, hold and skip: products, memory, rows, announced cotangents."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from second_order import (
    assert_close,
    check_dual,
    check_precision,
    check_transforms,
    check_values,
    derivatives,
    randn,
)
from test_decoder import SHAPES, make
from test_linear_cross_entropy import IGNORE, case, plain, random_labels
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.live_memory import LiveMemory, peak_live_bytes
from gradmem_kernels import (
    ArgumentError,
    Prefix,
    PrefixLoss,
    linear_cross_entropy,
    linear_cross_entropy_dual,
    logits_budget,
    write,
)
from gradmem_kernels.reference import linear_cross_entropy as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
B, S, D, V = 2, 6, 3, 10
F64 = torch.float64


class Products(TorchDispatchMode):
    """Counts the operations of matrix products in units of ``B * S * V * D`` multiply-adds."""

    count = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.bmm.default):
            *_, a, b = args[:3] if func in (aten.addmm.default, aten.addmm_.default) else args[:2]
            self.count += a.numel() * b.shape[-1] / (B * S * V * D)
        return func(*args, **(kwargs or {}))


def leaves(*frozen, dtype=F64):
    """hidden, weight, bias."""
    shapes = {"hidden": (B, S, D), "weight": (V, D), "bias": (V,)}
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_(name not in frozen) for name, shape in shapes.items())


def wanted(*tensors):
    return [t for t in tensors if t.requires_grad]


def products(work):
    with Products() as counted:
        work()
    return counted.count


@pytest.mark.parametrize(("frozen", "announced", "expected"), [
    (("weight", "bias"), False, 2), (("weight", "bias"), True, 2), ((), False, 4), ((), True, 3), (("bias",), False, 4),
    (("hidden",), False, 3), (("hidden",), True, 2), (("hidden", "bias"), True, 2), (("weight",), False, 3),
    (("weight",), True, 2)])
def test_products_of_forward_and_backward(frozen, announced, expected):
    x, labels, a = leaves(*frozen), torch.randint(V, (B, S)), torch.randn(B, dtype=F64)

    def work():
        hidden, weight, bias = x
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, loss_bar=a if announced else None)
        grad(loss, wanted(*x), a)

    assert products(work) == expected


def test_products_without_a_graph():
    hidden, weight, _ = leaves()
    labels = torch.randint(V, (B, S))
    with torch.no_grad():
        assert products(lambda: linear_cross_entropy(hidden, weight, labels)) == 1
    assert products(lambda: linear_cross_entropy(hidden.detach(), weight.detach(), labels)) == 1


def test_products_under_func_grad():
    hidden, weight, _ = (t.detach() for t in leaves())
    labels = torch.randint(V, (B, S))
    gradient = torch.func.grad(lambda hidden: linear_cross_entropy(hidden, weight, labels).sum())
    assert products(lambda: gradient(hidden)) == 2


@pytest.mark.parametrize(("frozen", "announced", "expected"), [
    (("weight",), False, 4 + 2), (("weight",), True, 2 + 2), ((), False, 4 + 4), ((), True, 2 + 4),
    (("weight", "hidden_t"), False, 4 + 1), (("weight", "hidden_t"), True, 2 + 1), (("hidden_t",), True, 2 + 3),
    (("weight", "hidden"), True, 2 + 1)])
def test_products_of_the_dual_pair(frozen, announced, expected):
    (hidden, weight, _), labels = leaves(*frozen), torch.randint(V, (B, S))
    hidden_t = torch.randn_like(hidden).requires_grad_("hidden_t" not in frozen)
    a, b = torch.randn(2, B, dtype=F64)
    bars = {"loss_bar": a, "loss_t_bar": b} if announced else {}

    def work():
        grad(linear_cross_entropy_dual(hidden, weight, labels, hidden_t, **bars),
             wanted(hidden, weight, hidden_t), (a, b))

    assert products(work) == expected


@pytest.mark.parametrize(("along", "by", "expected"), [
    ((0,), (0,), 2 + 1), ((0,), (0, 1), 2 + 3), ((0, 1), (0, 1), 3 + 4), ((1,), (0, 1), 2 + 3)])
def test_products_of_the_double_backward(along, by, expected):
    x, labels = leaves()[:2], torch.randint(V, (B, S))
    first = grad(linear_cross_entropy(*x, labels).sum(), [x[i] for i in along], create_graph=True)
    u = tuple(map(torch.randn_like, first))
    assert products(lambda: grad(first, [x[i] for i in by], u)) == expected


def test_rows_that_do_not_count_take_no_products():
    (hidden, weight, _), labels = leaves(), torch.full((B, S), IGNORE)
    labels[0, 1] = labels[1, 3:5] = 7
    loss = []
    assert products(lambda: loss.append(linear_cross_entropy(hidden, weight, labels))) == 2 * 3 / (B * S)
    assert products(lambda: grad(loss[0].sum(), (hidden, weight))) == 2 * 3 / (B * S)


CHUNKS = {"one": 10**6, "several": 5, "rows": 1}


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", [1.0, -3.7, 0.0])
def test_announced_cotangents(factor, bias, chunk):
    """The results are those of plain PyTorch to second order, if what arrives is a multiple of what was announced."""
    c = case("reference", random_labels(3, 4, classes=5), 5, 3, bias)
    a, u = c.cotangent(), tuple(map(torch.randn_like, c.inputs))

    def op(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, weight, c.aux["labels"], bias=bias, loss_bar=a)

    with logits_budget(chunk * 5 * 8):
        actual = derivatives(op, c.inputs, factor * a, u)
    assert_close(actual.named(), derivatives(c.run_plain, c.inputs, factor * a, u).named())


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("tangent", [True, False])
def test_announced_cotangents_of_the_dual(tangent, given, chunk):
    c = case("reference", random_labels(3, 4, classes=5), 5, 3)
    a, b = (c.cotangent() if flag else None for flag in given)
    tangents = (torch.randn(3, 4, 3, dtype=F64) if tangent else None,)
    results = []
    for announced in (True, False):
        x = [t.detach().requires_grad_() for t in (*c.inputs, *(t for t in tangents if tangent))]
        x_t = x[3:] or [None]
        bars = {"loss_bar": a, "loss_t_bar": b} if announced else {}
        with logits_budget(chunk * 5 * 16):
            y = (linear_cross_entropy_dual(x[0], x[1], c.aux["labels"], *x_t, bias=x[2], **bars) if announced
                 else c.run_plain_dual(*x[:3], *x_t))
        used = [(t, 2 * bar) for t, bar in zip(y, (a, b), strict=True) if bar is not None and t.requires_grad]
        found = grad([t for t, _ in used], x, [bar for _, bar in used], materialize_grads=True) if used else (
            map(torch.zeros_like, x))
        results.append({str(i): t for i, t in enumerate((*(t.detach() for t in y), *found))})
    assert_close(*results)


@pytest.mark.parametrize("dual", [False, True])
def test_other_cotangents_than_announced(dual, monkeypatch):
    hidden, weight, _ = leaves()
    labels, ones = torch.randint(V, (B, S)), torch.ones(B, dtype=F64)

    def gradients(bar):
        loss = linear_cross_entropy_dual(hidden, weight, labels, hidden.detach(), loss_bar=ones)[0] if dual else (
            linear_cross_entropy(hidden, weight, labels, loss_bar=ones))
        return grad(loss, (hidden, weight), bar)

    wrong = torch.tensor([1.0, 2.0], dtype=F64)
    with pytest.raises(ArgumentError, match=r"loss_bar: expected .* announced .* \[1.0, 1.0.* got \[1.0, 2.0"):
        gradients(wrong)
    with monkeypatch.context() as patch:  # as on a device, where looking would be a wait
        patch.setattr(reference, "check_values", lambda t: False)
        dh, dw = gradients(wrong)
        assert dw.isnan().all()
        # rows depend on their own sample's cotangent alone
        torch.testing.assert_close(dh, wrong[:, None, None] * gradients(ones)[0], rtol=1e-12, atol=0)
        dh, dw = gradients(torch.tensor([1.0, torch.inf], dtype=F64))
        assert dw.isnan().all()
        torch.testing.assert_close(dh[0], gradients(ones)[0][0], rtol=1e-12, atol=0)
        assert not dh[1].isfinite().any()
        for actual, expected in zip(gradients(4 * ones), gradients(ones), strict=True):
            assert torch.equal(actual, 4 * expected)
    # a loss that diverged is no mistake of the caller's
    assert gradients(ones * torch.nan)[1].isnan().all()


@pytest.fixture(params=["mask", "bound"])
def device_rows(request, monkeypatch):
    """The rows are taken as on a device, where their number is not known: all of them, or as many as a bound says."""
    monkeypatch.setattr(reference, "_may_wait", lambda labels: False)
    return request.param


@pytest.mark.parametrize("check", [check_values, check_dual, check_transforms])
def test_rows_on_a_device(check, device_rows):
    labels = random_labels(3, 4, classes=5, ignored=0.5)
    bound = None if device_rows == "mask" else int((labels != IGNORE).sum()) + 1
    with logits_budget(2 * 5 * 16):
        check(case("reference", labels, 5, 2, max_counted=bound))


@pytest.mark.parametrize("max_counted", [None, 3, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_what_is_in_positions_that_do_not_count_has_no_effect(on_device, max_counted, monkeypatch):
    if on_device:
        monkeypatch.setattr(reference, "_may_wait", lambda labels: False)
    labels = torch.tensor([[1, IGNORE, 0], [IGNORE, 2, IGNORE]])
    c = case("reference", labels, 3, 2, max_counted=max_counted)
    junk = torch.tensor([torch.nan, torch.inf], dtype=F64)
    a, u = c.cotangent(), tuple(map(torch.randn_like, c.inputs))
    filled = torch.where((labels == IGNORE)[..., None], junk, c.inputs[0])
    with logits_budget(1):
        actual = derivatives(c.run_op, (filled, *c.inputs[1:]), a, (u[0] + filled - c.inputs[0], *u[1:]))
    assert_close(actual.named(), derivatives(c.run_op, c.inputs, a, u).named())
    assert (actual.first[0][labels == IGNORE] == 0).all()


def test_a_bound_that_is_too_small(monkeypatch):
    hidden, weight, _ = leaves()
    labels = torch.randint(V, (B, S))
    for op in (linear_cross_entropy, lambda *args, **kw: linear_cross_entropy_dual(*args, None, **kw)):
        with pytest.raises(ArgumentError, match=f"max_counted: expected no less than .* {B * S}, got 3"):
            op(hidden, weight, labels, max_counted=3)
    monkeypatch.setattr(reference, "_may_wait", lambda labels: False)
    monkeypatch.setattr(sys.modules["gradmem_kernels.linear_cross_entropy"], "check_values", lambda labels: False)
    assert linear_cross_entropy(hidden, weight, labels, max_counted=3).isnan().all()
    assert linear_cross_entropy(hidden, weight, labels, max_counted=B * S).isfinite().all()


@pytest.fixture
def tensor_cores(monkeypatch):
    """Products of half precision into float32, as a GPU has them; the kernels believe that this is one."""
    mm = torch.mm

    def wide_mm(a, b, out_dtype=None):
        if out_dtype is None:
            return mm(a, b)
        assert a.dtype == b.dtype != out_dtype == torch.float32
        with _disable_current_modes():  # a GPU makes no wide copies of the factors
            product = mm(a.to(out_dtype), b.to(out_dtype))
        return torch.zeros(product.shape).copy_(product)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(reference, "_has_wide_sums", lambda weight: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_precision_on_tensor_cores(dtype, bias, tensor_cores):
    check_precision(case("reference", random_labels(3, 17, classes=40), 40, 33, bias), dtype, only_rounds=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("announced", [False, True])
def test_precision_of_announced_cotangents(dtype, announced):
    """In half precision too nothing but the result is rounded, once."""
    c = case("reference", random_labels(3, 17, classes=40), 40, 33).to(dtype)
    a = torch.randn(3)
    results = []
    for f, x in ((linear_cross_entropy, c.inputs), (plain, c.to(F64).inputs)):
        hidden, weight, bias = x = tuple(t.detach().requires_grad_() for t in x)
        bar = {"loss_bar": a} if announced and f is linear_cross_entropy else {}
        loss = f(hidden, weight, c.aux["labels"], bias=bias, **bar)
        results.append(grad(loss, x, a.to(loss.dtype)))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 1.01 * (exact.to(dtype) - exact).norm()


MODES = ("forward", "no_grad", "backward", "double_backward", "dual", "dual_announced")


def sweep(mode, labels, classes, d, dtype):
    hidden, weight = (torch.randn(*shape, d, dtype=dtype).requires_grad_() for shape in (labels.shape, (classes,)))
    bar = torch.ones(labels.shape[0], dtype=torch.float64 if dtype == F64 else torch.float32)
    hidden_t = torch.randn_like(hidden).requires_grad_()

    def work():
        if mode == "no_grad":
            with torch.no_grad():
                return linear_cross_entropy(hidden, weight, labels)
        if mode.startswith("dual"):
            bars = {"loss_bar": bar, "loss_t_bar": bar} if mode == "dual_announced" else {}
            return grad(linear_cross_entropy_dual(hidden, weight, labels, hidden_t, **bars),
                        (hidden, weight, hidden_t), (bar, bar))
        loss = linear_cross_entropy(hidden, weight, labels)
        if mode == "forward":
            return loss
        first = grad(loss, (hidden, weight), bar, create_graph=mode == "double_backward")
        return grad(first, (hidden, weight), (hidden_t, weight)) if mode == "double_backward" else first

    return work


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_memory_is_that_of_one_chunk(mode, dtype, tensor_cores):
    labels, classes, budget = random_labels(3, 200, classes=1000, ignored=0.1), 1000, 60 * 1000 * 8
    with logits_budget(budget):
        peak = peak_live_bytes(sweep(mode, labels, classes, 1, dtype))
    # beside the chunk: some copies of hidden and weight, some numbers for each row; no second chunk, not all logits
    beside = 8 * (12 * labels.numel() + 8 * classes) + 30 * 8 * labels.numel()
    assert peak <= budget + beside
    assert beside < 0.6 * budget
    assert budget + beside < 2 * labels.numel() * classes


@pytest.mark.parametrize("mode", MODES)
def test_memory_at_a_large_vocabulary(mode):
    """The default budget holds at V = 262144, and is a handful of rows or more."""
    labels, classes = random_labels(2, 50, classes=2**18), 2**18
    with LiveMemory() as memory:
        sweep(mode, labels, classes, 1, torch.float32)()
    assert memory.peak <= 2**26 + 12 * 4 * classes
    assert 2**26 // reference.bytes_per_row(torch.empty(classes, 1), tangents=True) >= 8


def test_large_vocabulary():
    large = case("reference", [[2**18 - 1, IGNORE, 7]], 2**18, 1)
    with logits_budget(2**18 * 8):
        check_values(large)


def test_the_budget_of_a_call_is_that_of_its_derivatives():
    c = case("reference", random_labels(2, 6, classes=7), 7, 2, bias=False)
    hidden, weight = (t.requires_grad_() for t in c.inputs)
    with logits_budget(1):
        loss = c.run_op(hidden, weight)
    peak = peak_live_bytes(lambda: grad(loss.sum(), weight))
    assert peak < peak_live_bytes(lambda: grad(c.run_op(hidden, weight).sum(), weight))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "1"])
def test_bad_budgets(size):
    with pytest.raises(ArgumentError, match="logits_budget: size: expected an integer"), logits_budget(size):
        pass


@pytest.mark.parametrize(("arguments", "argument"), [
    ({"loss_bar": torch.ones(3)}, "loss_bar"), ({"loss_bar": torch.ones(B, dtype=F64)}, "loss_bar"),
    ({"loss_bar": 1.0}, "loss_bar"), ({"max_counted": -1}, "max_counted"), ({"max_counted": 2.0}, "max_counted")])
def test_bad_announcements(arguments, argument):
    x = torch.randn(B, S, D), torch.randn(V, D), torch.zeros(B, S, dtype=torch.int64)
    for op in (linear_cross_entropy, lambda *x, **kw: linear_cross_entropy_dual(*x, None, **kw)):
        with pytest.raises(ArgumentError, match=rf": {argument}: expected"):
            op(*x, **arguments)
    if argument == "loss_bar":
        with pytest.raises(ArgumentError, match=": loss_t_bar: expected"):
            linear_cross_entropy_dual(*x, None, loss_t_bar=arguments["loss_bar"])


@pytest.mark.parametrize("announced", [False, True])
def test_under_compilation(announced):
    """The op breaks the graph and works as outside."""
    torch._dynamo.reset()
    (hidden, weight, _), labels, ones = leaves(), torch.randint(V, (B, S)), torch.ones(B, dtype=F64)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, labels, loss_bar=ones if announced else None).sum() * 3

    expected = grad(loss(hidden, weight), (hidden, weight))
    actual = grad(torch.compile(loss, backend="eager")(hidden, weight), (hidden, weight))
    assert all(map(torch.equal, actual, expected))
    torch._dynamo.reset()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_pytorchs_chunked_loss_drops_the_second_order(reduction):
    """What docs/linear_cross_entropy.md says of it: a gradient penalty beside the loss adds nothing, silently."""
    hidden, weight = randn(S, D).requires_grad_(), randn(V, D).requires_grad_()
    labels = torch.randint(V, (S,))

    def gradients(penalty, **options):
        loss = F.linear_cross_entropy(hidden, weight, labels, reduction=reduction, **options).sum()
        first = grad(loss, (hidden, weight), create_graph=True)
        return grad(loss + penalty * sum(t.square().sum() for t in first), (hidden, weight))

    def ours(penalty):
        loss = linear_cross_entropy(hidden[None], weight, labels[None])[0] * (1 if reduction == "mean" else S)
        first = grad(loss, (hidden, weight), create_graph=True)
        return grad(loss + penalty * sum(t.square().sum() for t in first), (hidden, weight))

    def named(grads):
        return dict(zip(("hidden", "weight"), grads, strict=True))

    chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)
    assert_close(named(gradients(0.0, options=chunked)), named(gradients(0.0)))
    assert_close(named(ours(1.0)), named(gradients(1.0)))
    for with_penalty, without in zip(gradients(1.0, options=chunked), gradients(0.0), strict=True):
        torch.testing.assert_close(with_penalty, without)
        assert (with_penalty - without).norm() < 1e-9 < 1e-3 < (gradients(1.0)[0] - gradients(0.0)[0]).norm()


def test_every_combination():
    """Options together, several chunks: exact to second order in what is not frozen."""
    labels = torch.tensor([[1, 0, 1, 2], [1, 1, 1, 1], [3, 1, 0, 2]])
    for bias, ignore_index, announced, chunk in itertools.product((False, True), (1, -100), (False, True), (1, 3)):
        c = case("reference", labels, 4, 2, bias, ignore_index)
        a = c.cotangent()
        for frozen in itertools.product((False, True), repeat=len(c.inputs)):
            free = [t for t, flag in zip(c.inputs, frozen, strict=True) if not flag]
            if not free:
                continue

            def full(*some, c=c, frozen=frozen):
                rest = iter(some)
                return [t if flag else next(rest) for t, flag in zip(c.inputs, frozen, strict=True)]

            def op(*some, full=full, a=a, ignore_index=ignore_index, announced=announced):
                hidden, weight, *rest = full(*some)
                return linear_cross_entropy(hidden, weight, labels, bias=rest[0] if rest else None,
                                            ignore_index=ignore_index, loss_bar=a if announced else None)

            u = tuple(map(torch.randn_like, free))
            with logits_budget(chunk * 4 * 8):
                actual = derivatives(op, tuple(free), a, u)
            expected = derivatives(lambda *some, full=full, c=c: c.run_plain(*full(*some)), tuple(free), a, u)
            assert_close(actual.named(), expected.named())


@pytest.mark.parametrize("uses_losses", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
def test_write_takes_one_sweep_each_way(uses_losses, trained_head, monkeypatch):
    """WRITE's step: loss and hidden's cotangent. Its outer backward pass: all cotangents of the dual form."""
    calls = {}
    kernels = {name: getattr(reference, name) for name in ("forward", "backward", "dual_forward", "dual_backward")}
    for name, kernel in kernels.items():
        def spy(x, aux, *args, name=name, kernel=kernel, **options):
            calls[name] = aux, options["early"]
            return kernel(x, aux, *args, **options)

        monkeypatch.setattr(reference, name, spy)
    decoder, prefix = make(SHAPES[0]), Prefix(8, dtype=F64)
    context, head = torch.randn(2, 4, 8, dtype=F64), torch.randn(5, 8, dtype=F64, requires_grad=trained_head)
    memory = torch.randn(2, 3, 8, dtype=F64, requires_grad=True)
    out = write(PrefixLoss(decoder, prefix, context, torch.randint(5, (2, 4)), head), memory, steps=1, lr=0.1)
    (out.memory.square().sum() + (3 * out.losses.sum() if uses_losses else 0)).backward()
    one_way, both_ways = (True, False, False), (True, trained_head, False, True, False, False)
    assert {name: early for name, (_, early) in calls.items()} == {
        "forward": one_way, "backward": one_way, "dual_forward": both_ways, "dual_backward": both_ways}
    _, loss_bar, loss_t_bar = calls["dual_forward"][0]
    assert (loss_bar is not None) == uses_losses
    assert torch.equal(loss_t_bar, torch.ones(2, dtype=F64))
