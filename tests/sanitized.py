"""A plugin of pytest for `make sanitize`: kernels on CPUs come from the module that GRADMEM_SANITIZED names."""

import importlib.util
import os
import sys

import torch  # noqa: F401  (its threads are the module's, so that it is loaded first)

NAME = "gradmem_kernels.native._cpu"

_spec = importlib.util.spec_from_file_location(NAME, os.environ["GRADMEM_SANITIZED"])
sys.modules[NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[NAME])


def pytest_report_header() -> str:
    return f"{NAME}: {sys.modules[NAME].__file__}, {sys.modules[NAME].instruction_set()}"
