"""rms_norm by the Triton kernels of norms, in the interpreter; see also test_layer_norm_triton.py."""

import pytest
import torch
from second_order import CHECKS, check_gradcheck, check_precision, check_values, every_check
from test_layer_norm_triton import THOROUGH, tiled  # noqa: F401 - a fixture
from test_rms_norm import case, test_empty, test_vector, test_zero_row  # noqa: F401 - run here too

from gradmem_kernels import backend as backends
from gradmem_kernels.backend import BackendError
from gradmem_kernels.rms_norm import rms_norm

OP = "rms_norm"
BACKENDS = ("triton",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_the_interpreter_runs_them():
    assert backends.select(OP, None).__name__ == "gradmem_kernels.triton.rms_norm"


@every_check([check for check in CHECKS if check not in THOROUGH],
             rows={"shape": (2, 3), "eps": 0.5}, width_1={"shape": (3, 1), "eps": 0.3})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


def test_gradcheck(backend):
    check_gradcheck(case(backend, (1, 2)))


def test_tiles(tiled, backend):  # noqa: F811 - the fixture
    check_values(case(backend, (2, 3, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision(dtype, backend):
    check_precision(case(backend, (3, 5, 300)), dtype)


def test_a_mapped_weight(backend):
    """Each of several weights for itself, on the same rows."""
    one = case(backend, (2, 3))
    x, weights = one.inputs[0], torch.randn(3, 4, dtype=torch.float64)
    actual = torch.func.vmap(one.run_op, in_dims=(None, 1))(x, weights)
    torch.testing.assert_close(actual, torch.stack([one.run_plain(x, w) for w in weights.unbind(1)]))


def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(BackendError, match="interpreter is wrong for bfloat16"):
        rms_norm(torch.ones(2, 3).bfloat16(), torch.ones(3).bfloat16(), backend="triton")
