"""What attention and attention_dual refuse, by name and with the remedy, whatever the backend."""

from __future__ import annotations

import pytest
import torch
from second_order import refused

from gradmem_kernels.attention import attention, attention_dual

Q, K, CU = torch.ones(2, 4, 3, 5), torch.ones(2, 2, 6, 5), torch.tensor([0, 1, 3])
ONE, SQUARE = {"q": Q[:1], "k": K[:1], "v": K[:1]}, {"q": K}


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"q": None}, "q", "a tensor", "NoneType"),
    ({"q": Q[0]}, "q", "shape [B, Hq, Sq, d]", "[4, 3, 5]"),
    ({"q": Q.long()}, "q", "float64", "int64"),
    ({"q": Q[:, :3]}, "q", "multiple of k's, 2", "3"),
    ({"k": K[:, :0], "v": K[:, :0]}, "q", "multiple of k's, 0", "4"),
    ({"k": K[..., :4]}, "k", "d=5", "[2, 2, 6, 4]"),
    ({"k": K[:1]}, "k", "B=2", "[1, 2, 6, 5]"),
    ({"k": K.half()}, "k", "the dtype of q, float32", "float16"),
    ({"v": K[:, :1]}, "v", "Hkv=2", "[2, 1, 6, 5]"),
    ({"v": K[:, :, :5]}, "v", "Sk=6", "[2, 2, 5, 5]"),
    ({"v": K.to("meta")}, "v", "the device of q, cpu", "meta"),
    ({"causal": 1}, "causal", "True or False", "1"),
    ({"scale": float("inf")}, "scale", "a finite number", "inf"),
    ({"scale": torch.tensor(1.0)}, "scale", "a number", "Tensor"),
    ({"seqlens": [3, 3]}, "seqlens", "a tensor", "list"),
    ({"seqlens": torch.tensor([3.0, 3.0])}, "seqlens", "int32", "float32"),
    ({"seqlens": torch.tensor([3])}, "seqlens", "B=2", "[1]"),
    ({"seqlens": torch.tensor([3, 7])}, "seqlens", "0..6", "3..7"),
    ({"seqlens": torch.tensor([-1, 3])}, "seqlens", "0..6", "-1..3"),
    ({"window": 0}, "window", "an integer >= 1", "0"),
    ({"window": 2.0}, "window", "an integer", "float"),
    ({"softcap": 0.0}, "softcap", "a finite number > 0", "0.0"),
    ({"softcap": "30"}, "softcap", "a number", "str"),
    ({"cu_seqlens": [0, 3]}, "cu_seqlens", "a tensor", "list"),
    ({"cu_seqlens": CU.float()}, "cu_seqlens", "int32 or int64", "float32"),
    ({"cu_seqlens": CU[None]}, "cu_seqlens", "shape [N+1]", "[1, 3]"),
    ({"cu_seqlens": CU}, "cu_seqlens", "B=1", "B=2"),
    ({"cu_seqlens": CU, "seqlens": CU[:2]}, "seqlens", "None beside cu_seqlens", "both"),
    ({**ONE, "cu_seqlens": CU}, "cu_seqlens_k", "3 queries and 6 keys", "None"),
    ({**ONE, "cu_seqlens": CU[:0], "cu_seqlens_k": CU}, "cu_seqlens", "at least one boundary", "none"),
    ({**ONE, "cu_seqlens": CU + 1, "cu_seqlens_k": CU}, "cu_seqlens", "from 0", "[1, 2, 4]"),
    ({**ONE, "cu_seqlens": CU.flip(0), "cu_seqlens_k": CU}, "cu_seqlens", "do not decrease", "[3, 1, 0]"),
    ({**ONE, "cu_seqlens": torch.tensor([0, 2, 1]), "cu_seqlens_k": CU}, "cu_seqlens", "do not decrease", "[0, 2, 1]"),
    ({**ONE, "cu_seqlens": 2 * CU, "cu_seqlens_k": CU}, "cu_seqlens", "up to 3", "[0, 2, 6]"),
    ({**ONE, "cu_seqlens": CU, "cu_seqlens_k": 3 * CU}, "cu_seqlens_k", "up to 6", "[0, 3, 9]"),
    ({**ONE, "cu_seqlens": CU, "cu_seqlens_k": CU[:2]}, "cu_seqlens_k", "N+1=3", "[2]"),
    ({"cu_seqlens_k": CU}, "cu_seqlens_k", "None without cu_seqlens", "Tensor"),
    ({"mask": torch.ones(2, 4, 3, 6)}, "mask", "bool", "float32"),
    ({"mask": torch.ones(3, 6, dtype=torch.bool)}, "mask", "shape [2 or 1, 4 or 1, 3 or 1, 6]", "[3, 6]"),
    ({"mask": torch.ones(2, 2, 3, 6, dtype=torch.bool)}, "mask", "4 or 1", "[2, 2, 3, 6]"),
    ({"mask": torch.ones(2, 4, 3, 1, dtype=torch.bool)}, "mask", "Sk=6", "[2, 4, 3, 1]"),
    ({"mask": torch.ones(1, 1, 1, 6, dtype=torch.bool, device="meta")}, "mask", "the device of q, cpu", "meta"),
    ({"bias": torch.ones(1, 1, 3, 6, dtype=torch.bool)}, "bias", "float32", "bool"),
    ({"bias": torch.ones(1, 1, 3, 6).double()}, "bias", "float32", "float64"),
    ({"bias": torch.ones(1, 3, 6)}, "bias", "shape [2 or 1, ", "[1, 3, 6]"),
    ({"bias": torch.ones(1, 1, 3, 6, requires_grad=True)}, "bias", "a constant", "bias.detach()"),
    ({"dropout": 1.0}, "dropout", "a probability below 1", "1.0"),
    ({"dropout": 1 - 2**-40}, "dropout", "a probability below 1", "0.99"),
    ({"dropout": -0.1}, "dropout", "a finite number >= 0", "-0.1"),
    ({"dropout": True}, "dropout", "a number", "bool"),
    ({"dropout_seed": 2**32}, "dropout_seed", "in 0..4294967295", "4294967296"),
    ({"dropout_seed": torch.tensor(1)}, "dropout_seed", "an integer", "Tensor"),
    ({**SQUARE, "grad_rows": 3}, "grad_rows", "two integers (start, stop)", "3"),
    ({**SQUARE, "grad_rows": (0, 1.0)}, "grad_rows", "two integers (start, stop)", "(0, 1.0)"),
    ({**SQUARE, "grad_rows": (2, 2)}, "grad_rows", "0 <= start < stop <= 6", "(2, 2)"),
    ({**SQUARE, "grad_rows": (0, 7)}, "grad_rows", "0 <= start < stop <= 6", "(0, 7)"),
    ({**SQUARE, "grad_rows": (-1, 2)}, "grad_rows", "0 <= start < stop <= 6", "(-1, 2)"),
    ({"grad_rows": (0, 1)}, "grad_rows", "as many queries as keys", "3 queries, 6 keys"),
    ({"q": K[:1], "k": K[:1], "v": K[:1], "cu_seqlens": CU, "grad_rows": (0, 1)}, "grad_rows", "no cu_seqlens",
     "cu_seqlens")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"q": Q, "k": K, "v": K, **arguments}
    refused(lambda: attention(**arguments), "attention", argument, expected, got)
    refused(lambda: attention_dual(**arguments, q_t=None, k_t=None, v_t=None), "attention_dual", argument, expected,
            got)


def test_bad_first_order():
    refused(lambda: attention(Q, K, K, first_order="fast"), "attention", "first_order", "own", "'fast'")


@pytest.mark.parametrize(("rows", "expected", "got"), [
    ({"tangent_rows": [0, 1]}, "two integers (start, stop)", "[0, 1]"),
    ({"tangent_rows": (3, 7)}, "0 <= start < stop <= 6", "(3, 7)"),
    ({"tangent_rows": (1, 3), "grad_rows": (2, 4)}, "2 <= start < stop <= 4 (grad_rows)", "(1, 3)")])
def test_bad_tangent_rows(rows, expected, got):
    refused(lambda: attention_dual(K, K, K, None, None, None, **rows), "attention_dual", "tangent_rows", expected, got)


def test_bias_is_not_differentiated():
    """Neither way of asking for its derivatives is ignored."""
    def of_bias(bias):
        return attention(Q, K, K, bias=bias).sum()

    bias = torch.ones(1, 1, 3, 6)
    for derivative in (lambda: torch.func.grad(of_bias)(bias), lambda: torch.func.jvp(of_bias, (bias,), (bias,))):
        refused(derivative, "attention", "bias", "a constant", "bias.detach()")


@pytest.mark.parametrize("argument", ["q_t", "k_t", "v_t"])
def test_bad_tangents(argument):
    tangents = {"q_t": None, "k_t": None, "v_t": None, argument: torch.ones(2, 3)}
    refused(lambda: attention_dual(Q, K, K, **tangents), "attention_dual", argument, "shape [2, ", "[2, 3]")
