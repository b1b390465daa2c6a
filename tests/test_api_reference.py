"""What the reference made by ``make docs`` shows: every public name has a docstring, and documents its arguments."""

from __future__ import annotations

import inspect
import re
import types

import pytest

import gradmem
import gradmem_kernels

PUBLIC = [(f"{package.__name__}.{name}", getattr(package, name)) for package in (gradmem, gradmem_kernels)
          for name in package.__all__]


@pytest.mark.parametrize(("name", "value"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_public_names_are_documented(name: str, value: object) -> None:
    if not (inspect.isclass(value) or inspect.isroutine(value)) or isinstance(value, types.GenericAlias):
        return
    text = inspect.getdoc(value)
    assert text
    if inspect.isfunction(value):
        missing = [argument for argument in inspect.signature(value).parameters
                   if not re.search(rf"\b{argument}\b", text)]
        if name.endswith("_dual") and name.rpartition(".")[2].removesuffix("_dual") in text:
            return  # arguments of the op, which the text names, and tangents
        assert not missing, f"{name}: {missing}"
