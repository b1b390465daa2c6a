"""gelu by the Triton kernels of gated activations, in the interpreter; see also test_swiglu_triton.py."""

import pytest
import torch
from second_order import (
    CHECKS,
    check_dual_gradcheck,
    check_dual_once,
    check_gradcheck,
    check_precision,
    check_transforms,
    check_values,
    every_check,
)
from test_gelu import case, forms, test_empty, test_far_from_zero  # noqa: F401 - run here too

from gradmem_kernels import backend as backends

OP = "gelu"
BACKENDS = ("triton",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
THOROUGH = (check_gradcheck, check_dual_gradcheck, check_transforms)


def test_the_interpreter_runs_them():
    assert backends.select(OP, None).__name__ == "gradmem_kernels.triton.gelu"


@forms
@every_check(THOROUGH, one={"shape": (2,)})
def test_thorough(check, options, approximate, backend):
    check(case(backend, *options["shape"], approximate=approximate))


@forms
@every_check([check for check in CHECKS if check not in THOROUGH], rows={"shape": (2, 3)})
def test_guarantees(check, options, approximate, backend):
    check(case(backend, *options["shape"], approximate=approximate))


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision(dtype, approximate, backend):
    check_precision(case(backend, 33, 65, approximate=approximate), dtype)


@forms
def test_a_scalar(approximate, backend):
    one = case(backend, approximate=approximate)
    check_values(one)
    check_dual_once(one)
