"""Models, tokenizers and data sets by name or directory, through the loaders of their libraries."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from gradmem.errors import HubError, MissingExtraError

__all__ = ["PREFIX", "load_model", "load_records", "load_tokenizer", "optional_library"]

PREFIX = "hub:"  # of a data set's name, where a file's path is expected too
_T = TypeVar("_T")


def load_model(name: str) -> Any:
    """A causal language model of ``transformers``, in float32 and in evaluation mode.

    Args:
        name: of a model of the hub, or a directory of ``save_pretrained``.

    Raises:
        MissingExtraError: without transformers.
        HubError: if it cannot be loaded.
    """
    import torch

    library = optional_library("transformers", f"model {name}")
    return _load(f"model {name}", lambda: library.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))


def load_tokenizer(name: str) -> Any:
    """A tokenizer of ``transformers``; arguments and errors as those of :func:`load_model`."""
    library = optional_library("transformers", f"tokenizer {name}")
    return _load(f"tokenizer {name}", lambda: library.AutoTokenizer.from_pretrained(name))


def load_records(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a data set, each with what names it in a message.

    Args:
        name: ``hub:NAME:SPLIT`` or ``hub:NAME:CONFIGURATION:SPLIT``, where ``NAME`` may be a directory of data files.

    Raises:
        MissingExtraError: without datasets.
        HubError: for another form of the name, or if the data set cannot be loaded.
    """
    path, *rest = name.removeprefix(PREFIX).split(":")
    if not path or len(rest) not in (1, 2) or not all(rest):
        raise HubError(f"{name}: expected {PREFIX}NAME:SPLIT or {PREFIX}NAME:CONFIGURATION:SPLIT, such as "
                       f"{PREFIX}owner/name:train")
    library = optional_library("datasets", f"data set {name}")
    split = rest.pop()
    records = _load(f"data set {name}", lambda: library.load_dataset(path, *rest, split=split))
    return ((f"{name}: record {number}", record) for number, record in enumerate(records))


def optional_library(name: str, what: str) -> Any:
    """The module of an extra of that name, which ``what`` needs.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as reason:
        raise MissingExtraError(f"{what} needs {name}, which cannot be imported ({reason}): pip install "
                                f"'gradmem-kernels[{name}]'") from reason


def _load(what: str, load: Callable[[], _T]) -> _T:
    # what these libraries raise offline, for unknown names and for files that they cannot use
    try:
        return load()
    except (OSError, ValueError, RuntimeError, ImportError) as reason:
        message = str(reason).strip().partition("\n")[0] or type(reason).__name__
        raise HubError(f"{what}: cannot be loaded: {message}; without a connection, give the path of a copy on this "
                       f"machine") from reason
