"""A wheel and an editable installation from a source distribution, in isolation where there is no torch.

They take minutes, and a package index: `make test-wheel` runs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.environ.get("GRADMEM_TEST_WHEEL") != "1", reason="for `make test-wheel`")
ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "build_info.json")

#: Where no kernels were compiled this raises.
CHECK = """
import sys, torch, gradmem_kernels
assert gradmem_kernels.__file__.startswith(sys.argv[1]), gradmem_kernels.__file__
x = [torch.randn(1, 2, 70, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
def second(backend):
    o = gradmem_kernels.attention(*x, causal=True, backend=backend)
    grads = torch.autograd.grad(o.square().sum(), x, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), x)
torch.testing.assert_close(second("native"), second("reference"))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    _run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('../sdist')",
         cwd=folder / "tree")
    archive, = (folder / "sdist").iterdir()
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    """A new environment's, where nothing else is."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    return folder / "bin" / "pip"


def _run(*command, **options):
    run = subprocess.run([str(word) for word in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         check=False, **options)
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout


def _use(package, folder):
    """Runs kernels and the command of what is in ``package``, with this environment's torch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, package)), "COLUMNS": "200"}
    _run(sys.executable, "-c", CHECK, package[0], cwd=folder, env=environment)
    return _run(sys.executable, "-m", "gradmem", "doctor", cwd=folder, env=environment)


def test_a_wheel_that_is_run_elsewhere(source, pip, tmp_path):
    # there is no nvcc
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "GRADMEM_NATIVE": "on", "GRADMEM_CUDA": "auto"}
    _run(pip, "wheel", "--no-deps", "-w", tmp_path / "wheels", source, env=environment)
    wheel, = (tmp_path / "wheels").iterdir()
    assert "-none-any" not in wheel.name
    _run(pip, "install", "--no-deps", "--target", tmp_path / "site", wheel)
    told = _use([tmp_path / "site"], tmp_path)
    assert "no nvcc was found" in told


def test_a_second_build_in_the_same_tree_is_incremental_and_editable(source, pip):
    objects = {path: path.stat().st_mtime_ns for path in source.glob("build/native-*/CMakeFiles/cpu_*.dir/**/*.o")}
    assert objects, "the test above builds them"
    _run(pip, "install", "--no-deps", "-e", source, env={**os.environ, "GRADMEM_CUDA": "off"})
    assert objects == {path: path.stat().st_mtime_ns for path in objects}
    assert "GRADMEM_CUDA=off switched them off" in _use([source, source / "python"], source)
