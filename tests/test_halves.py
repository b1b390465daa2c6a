"""Primal and tangent as halves of one tensor: never a wrong value, and no copy where they lie together."""

import pytest
import torch

from gradmem_kernels.decoder.halves import join, split

F64 = torch.float64


def shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", ["rows", "transposed", "offset"])
def test_neighbours_are_joined_without_a_copy(layout):
    both = torch.randn(2, 3, 4, dtype=F64)
    if layout == "transposed":
        both = both.transpose(1, 2)
    if layout == "offset":
        both = torch.randn(3, 3, 4, dtype=F64)[1:]
    primal, tangent = both.unbind()
    joined = join(primal, tangent)
    assert shares(joined, both)
    assert torch.equal(joined, both)


@pytest.mark.parametrize("pair", [
    lambda x: (x[1], x[0]),  # in the wrong order
    lambda x: (x[0], x[2]),  # not next to each other
    lambda x: (x[0], x[0]),
    lambda x: (x[0, :, :3], x[0, :, 1:]),  # beside each other in every row
    lambda x: (x[0, :2], x[0, 1:]),  # overlapping
    lambda x: (x[0].expand(3, 4), x[1].t().contiguous().t()),
    lambda x: (x[0], torch.randn(3, 4, dtype=F64)),
    lambda x: (x[0, :1].expand(3, 4), x[1, :1].expand(3, 4))], ids=range(8))
def test_anything_else_is_copied(pair):
    primal, tangent = pair(torch.randn(3, 3, 4, dtype=F64))
    joined = join(primal, tangent)
    assert torch.equal(joined, torch.stack((primal, tangent)))
    assert not shares(joined, primal)


def test_nothing_in_halves():
    assert join(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (2, 0, 4)


def test_derivatives_of_every_order():
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)

    def there_and_back(x):
        primal, tangent = split(x)
        return join(primal.sin() * tangent, tangent.exp())

    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.autograd.gradgradcheck(there_and_back, x)
    mapped = torch.func.vmap(torch.func.grad(lambda x: there_and_back(x).sum()))(torch.stack([x.detach()] * 2))
    expected, = torch.autograd.grad(there_and_back(x).sum(), x)
    torch.testing.assert_close(mapped, torch.stack([expected] * 2))


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_nobody_uses_has_gradient_zero(half):
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    split(x)[half].sum().backward()
    expected = torch.zeros(2, 3, dtype=F64)
    expected[half] = 1
    assert torch.equal(x.grad, expected)


def test_cotangents_that_lie_together_come_back_without_a_copy():
    x, seen = torch.randn(2, 3, dtype=F64, requires_grad=True), []
    bars = torch.randn(2, 3, dtype=F64)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, primal, tangent):
            return primal + tangent

        @staticmethod
        def backward(ctx, bar):
            return bars.unbind()

    y = x * 1
    y.register_hook(seen.append)
    Op.apply(*split(y)).sum().backward()
    assert shares(seen[0], bars)
    assert torch.equal(x.grad, bars)
