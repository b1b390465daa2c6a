"""CUDA C++ kernels of ops on rows without a GPU: their sources, compiled for a CPU (csrc/tests/cuda_on_cpu).

Arithmetic, addresses, reductions and barriers are those of the kernels; timing, races between threads, the hardware's
functions and CUDA itself are not tested here (tests/gpu/test_native_rows_gpu.py).
"""

import importlib.util
import math
import platform
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from second_order import check_determinism, check_empty

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from native_rows_checks import (
    CHECKS,
    DTYPES,
    LAYOUTS,
    ROTARY,
    ROWS,
    WIDTHS,
    check_rounding,
    laid_out,
    rotary_case,
)

from gradmem_kernels import backend as backends
from gradmem_kernels.native import build_info, common

FOLDER = Path(__file__).parent.parent / "build" / (
    f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}") / "cuda_on_cpu"
BUILT = FOLDER / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
needs_module = pytest.mark.skipif(not BUILT.is_file(), reason=f"{BUILT} is not there: make test-native builds it")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("cuda_on_cpu._cuda", BUILT)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def on_cpu(module, monkeypatch):
    """Has these kernels serve tensors on a CPU."""
    monkeypatch.setattr(common, "cuda", lambda: module)
    monkeypatch.setattr(common, "is_cuda", lambda t: True)
    monkeypatch.setattr(common, "multiprocessors", lambda t: 2)
    monkeypatch.setattr(common, "stream", lambda t: 0)
    monkeypatch.setattr(common, "CPU_DTYPES", tuple(common.DTYPES))


@needs_module
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", ROWS)
def test_guarantees(name, check):
    check(ROWS[name](2, 3, 5))
    check(ROWS[name](2, 2, 1))


@needs_module
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["inner_sgd_clipped", "rms_norm", "add_layer_norm", "swiglu",
                                  "linear_cross_entropy"])
def test_every_layout(name, width, dtype):
    check_rounding(ROWS[name](2, 3 if width > 200 else 21, width), "dense", dtype)


@needs_module
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dense"])
@pytest.mark.parametrize("name", ROWS)
def test_unaligned_and_padded_tensors(name, layout):
    check_rounding(ROWS[name](3, 11, 128), layout, torch.bfloat16)


@needs_module
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ROTARY)
def test_rotary(name, dtype):
    for layout in LAYOUTS:
        check_rounding(rotary_case(name), layout, dtype)


@needs_module
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ROWS)
def test_empty(name):
    for shape in ((0, 2, 3), (2, 0, 3)):
        check_empty(ROWS[name](*shape))


@needs_module
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("width", [33, 64, 8200])
@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_written_beside_results(name, width, monkeypatch):
    before, guard, found = torch.Tensor.new_empty, 64, []

    def guarded(like, *size, **options):
        shape = size[0] if size and not isinstance(size[0], int) else size
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        whole = before(like, math.prod(shape) + 2 * guard, **options).fill_(7)
        found.append(whole)
        return whole[guard:-guard].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    one = ROWS[name](2, 3, width).to(torch.bfloat16)
    tangents = tuple(torch.randn_like(one.inputs[i]).requires_grad_() for i in one.active)
    x = tuple(t.requires_grad_() for t in one.inputs)
    sum(t.sum() for t in one.run_dual(*x, *tangents)).backward()
    one.run_op(*x).sum().backward()
    assert found
    assert all((edge == 7).all() for whole in found for edge in (whole[:guard], whole[-guard:]))


@needs_module
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ROWS)
def test_repeatable(name):
    """Threads start in the opposite order the second time."""
    check_determinism(ROWS[name](3, 7, 128).to(torch.bfloat16))
    check_determinism(laid_out(ROWS[name](3, 7, 33), "unaligned").to(torch.float32))


@needs_module
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_any_number_of_programs(parts, monkeypatch):
    """More of them than there are rows, too."""
    monkeypatch.setattr(common, "multiprocessors", lambda t: parts)
    monkeypatch.setattr(common, "PROGRAMS", 1)
    for shape, dtype in (((2, 9, 64), torch.bfloat16), ((1, 3, 1024), torch.float32), ((2, 5, 7), torch.float32)):
        check_rounding(ROWS["layer_norm"](*shape), "dense", dtype)


@needs_module
def test_bad_calls_are_refused(module):
    with pytest.raises(KeyError, match="device"):
        module.rotary({})
    where = {"device": 0, "stream": 0, "workspace": 0, "parts": 0}
    with pytest.raises(KeyError, match="dtype"):
        module.norm_forward(where)
    arguments = {"dtype": 1, "threads": 0, "batch": 1, "width": 2**31, "lr": 0.0, "clamp": False, "clip_value": 1.0,
                 "clip_norm": 1.0, "rate": None, "rate_t": None,
                 **dict.fromkeys(("grad", "grad_t", "memory", "memory_t", "y", "y_t"), 0)}
    with pytest.raises(ValueError, match=r"^inner_sgd_forward: width: expected at most 2147418111 .* got 2147483648$"):
        module.inner_sgd_forward({**arguments, **where})
    arguments["width"] = 0
    with pytest.raises(RuntimeError, match=r"^launch of inner_sgd_forward: "):
        module.inner_sgd_forward({**arguments, **where})


@pytest.mark.parametrize(("architectures", "capability", "runs"), [
    (["80", "90a"], (8, 0), True), (["80", "90a"], (8, 9), True), (["80", "90a"], (9, 0), True),
    (["80", "90a"], (10, 0), True), (["80", "90a"], (7, 5), False), (["90a"], (9, 0), True), (["90a"], (10, 0), False),
    (["100f"], (10, 3), True), (["100f"], (12, 0), False), (["90"], (8, 6), False), (["120"], (12, 1), True)])
def test_devices_run_what_was_compiled_for_them(architectures, capability, runs):
    assert common.runs_on(architectures, capability) == runs


GPU = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, is_cuda=True)


@pytest.mark.parametrize(("op", "missing", "info", "capability", "reason"), [
    ("rms_norm", "this installation has no compiled kernels for CUDA", {}, (9, 0), "no compiled kernels for CUDA"),
    ("rms_norm", None, {"cuda_toolkit": "99.0", "cuda_architectures": ["80"]}, (9, 0), "the driver knows CUDA 12.4"),
    ("swiglu", None, {"cuda_toolkit": "12.1", "cuda_architectures": ["80"]}, (7, 0), "compute capability 7.0")])
def test_refusals_name_what_is_missing(op, missing, info, capability, reason, monkeypatch):
    from gradmem_kernels.native import driver

    monkeypatch.setattr(build_info, "missing", lambda module: missing if module == "_cuda" else None)
    monkeypatch.setattr(build_info, "build_info", lambda: info)
    monkeypatch.setattr(driver, "driver", lambda: (12, 4))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(backends.BackendError, match=rf"^{op}: backend: 'native' cannot serve this call: .*{reason}"):
        backends.select(op, "native", GPU)


@pytest.mark.skipif(platform.system() != "Linux", reason="nothing is compiled there")
def test_kernels_that_were_never_measured_serve_by_name_alone(monkeypatch):
    monkeypatch.setattr(build_info, "missing", lambda module: None)
    monkeypatch.setattr(build_info, "build_info", lambda: {"cuda_toolkit": "12.1", "cuda_architectures": ["80"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends.select("inner_sgd", "native", GPU).__name__ == "gradmem_kernels.native.inner_sgd"
    assert backends.select("inner_sgd", None, GPU).__name__ == "gradmem_kernels.reference.inner_sgd"
