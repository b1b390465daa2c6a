"""Files of this package: safetensors with a description, replaced in one step, refused with a reason."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from gradmem.errors import GradMemError

__all__ = ["load_about", "load_tensors", "remove_leftovers", "replacing", "save_tensors"]

_KEY = "gradmem"  # of the description in the safetensors metadata
_MAX_HEADER = 100_000_000  # bytes, the limit of the format


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well; else ``path`` stays as it was."""
    # machines that share a file system may have processes of one number
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Deletes what processes left beside ``path`` that were killed while they replaced it; none may be at it now."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def save_tensors(path: Path, kind: str, version: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes ``tensors`` with the JSON description ``about``; an interrupted write leaves the old file."""
    metadata = {_KEY: json.dumps({"kind": kind, "version": version, **about}, sort_keys=True)}
    with replacing(path) as temporary:
        safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)


def load_tensors(path: Path, kind: str, version: int,
                 error: type[GradMemError]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on CPU) and the description of a file made by :func:`save_tensors`.

    Raises:
        error: if the file does not exist, is truncated, is not safetensors, or is of another kind or version.
    """
    with _opened(path, kind, version, error) as (file, about):
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def load_about(path: Path, kind: str, version: int, error: type[GradMemError]) -> dict[str, Any]:
    """The description alone, without reading a tensor; raises as :func:`load_tensors`."""
    with _opened(path, kind, version, error) as (_, about):
        return about


@contextlib.contextmanager
def _opened(path: Path, kind: str, version: int, error: type[GradMemError]) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        _check_safetensors(path, error)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = _description(metadata.get(_KEY, "{}"))
            if about.get("kind") != kind:
                raise error(f"{path}: expected a {kind} file of gradmem, got "
                            f"{'a ' + about['kind'] + ' file' if 'kind' in about else 'safetensors of something else'}")
            if about.get("version") != version:
                raise error(f"{path}: expected version {version} of the {kind} format, got {about.get('version')}")
            yield file, about
    except safetensors.SafetensorError as reason:
        raise error(f"{path}: not a valid safetensors file: {reason}") from reason
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from reason


def _description(text: str) -> dict[str, Any]:
    """The description in a file's metadata; empty if it is none of ours."""
    try:
        about = json.loads(text)
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _check_safetensors(path: Path, error: type[GradMemError]) -> None:
    """Tells a truncated file from one of another format, which the safetensors library does not."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = file.read(min(length, _MAX_HEADER))
    if len(start) < 8 or length > _MAX_HEADER or not header.startswith(b"{"):
        raise error(f"{path}: not a safetensors file" + (" (it is empty)" if size == 0 else ""))
    if len(header) < length:
        raise error(f"{path}: truncated safetensors file: its header has {len(header)} of {length} bytes")
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as reason:
        raise error(f"{path}: not a safetensors file: its header cannot be parsed") from reason
    if size < 8 + length + end:
        raise error(f"{path}: truncated safetensors file: {size} of {8 + length + end} bytes")
