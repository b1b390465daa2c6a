"""Memory: slices, its file, and the files it refuses."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gradmem import GradMem, Memory, MemoryFileError
from gradmem.files import save_tensors
from gradmem.memory import context_hash
from gradmem_kernels import ArgumentError

MakeModel = Callable[..., GradMem]
CONTEXTS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3]])


@pytest.fixture
def model(make_model: MakeModel) -> GradMem:
    return make_model(learn_inner_lr="step")


@pytest.fixture
def memory(model: GradMem) -> Memory:
    with torch.inference_mode():
        return model.write(CONTEXTS, context_lengths=torch.tensor([4, 3, 4]))


def test_a_memory_comes_back_from_its_file(model: GradMem, memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "doc.memory.safetensors"
    memory.save(path)
    for loaded in (Memory.load(path), Memory.load(str(path), model)):
        assert torch.equal(loaded.tensor, memory.tensor)
        assert loaded.provenance == memory.provenance
    assert memory.provenance[1].context == context_hash([5, 6, 7])
    assert memory.provenance[1].model == model.fingerprint()
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_slices_and_cat(memory: Memory) -> None:
    assert len(memory) == 3
    assert torch.equal(memory[-1].tensor, memory.tensor[2:])
    assert memory[1:].provenance == memory.provenance[1:]
    joined = Memory.cat(list(memory))
    assert torch.equal(joined.tensor, memory.tensor)
    assert joined.provenance == memory.provenance
    assert memory.to("meta").tensor.device.type == "meta"
    with pytest.raises(IndexError):
        memory[3]


@pytest.mark.parametrize("index", [[2, 0, 2], [-1, 0, -1], torch.tensor([2, 0, 2]), (2, 0, 2)], ids=str)
def test_positions_keep_their_provenance(memory: Memory, index: Any) -> None:
    chosen = memory[index]
    assert torch.equal(chosen.tensor, memory.tensor[[2, 0, 2]])
    assert [entry.context for entry in chosen.provenance] == [memory.provenance[i].context for i in (2, 0, 2)]
    assert chosen.model is memory.model


def test_masks_and_empty_indices(memory: Memory) -> None:
    for mask in ([True, False, True], torch.tensor([True, False, True])):
        assert memory[mask].provenance == (memory.provenance[0], memory.provenance[2])
        assert torch.equal(memory[mask].tensor, memory.tensor[[0, 2]])
    assert len(memory[[]]) == len(memory[3:]) == 0
    assert memory[::2].provenance == memory.provenance[::2]
    for index in ([3], [True, False], torch.tensor([-4])):
        with pytest.raises(IndexError):
            memory[index]
    for wrong in (1.5, [0.5], torch.tensor([[0]]), "0", None):
        with pytest.raises(ArgumentError, match="Memory: index: expected an integer, a slice"):
            memory[wrong]  # type: ignore[index]


def test_moving_keeps_provenance_and_model(memory: Memory) -> None:
    half = memory.to(dtype=torch.bfloat16)
    assert half.tensor.dtype == torch.bfloat16
    for moved in (half, memory.to("cpu"), memory.to("meta", dtype=torch.float32), memory.to()):
        assert moved.provenance == memory.provenance
        assert moved.model is memory.model
    with pytest.raises(ArgumentError, match="Memory: tensor: expected a dtype of"):
        memory.to(dtype=torch.int64)


def test_a_model_is_kept_and_stays_out_of_files_and_pickles(model: GradMem, memory: Memory, tmp_path: Path) -> None:
    assert memory.model is memory[0].model is Memory.cat([memory, memory]).model is model
    memory.save(tmp_path / "m")
    bare, loaded = Memory.load(tmp_path / "m"), Memory.load(tmp_path / "m", model)
    assert bare.model is None
    assert loaded.model is model
    assert Memory.cat([bare, loaded]).model is model
    for again in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert again.model is None
        assert again.provenance == memory.provenance
        assert torch.equal(again.tensor, memory.tensor)


def test_a_memory_of_another_dtype_comes_back_from_its_file(memory: Memory, model: GradMem, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        memory.to(dtype=dtype).save(tmp_path / "m")
        loaded = Memory.load(tmp_path / "m", model)
        assert loaded.tensor.dtype == dtype
        assert loaded.provenance == memory.provenance


def test_cat_refuses_memories_of_different_models(memory: Memory, make_model: MakeModel) -> None:
    with pytest.raises(ArgumentError, match="memories of one model"):
        Memory.cat([memory, make_model(seed=1).write(CONTEXTS)])
    with pytest.raises(ArgumentError, match="got 0"):
        Memory.cat([])
    with pytest.raises(ArgumentError, match=r"Memory.cat: memories\[1\]: expected the dtype of memories\[0\], float64"):
        Memory.cat([memory, memory.to(dtype=torch.float32)])
    with pytest.raises(ArgumentError, match=r"memories\[1\]: expected the device of"):
        Memory.cat([memory, memory.to("meta")])


def test_provenance_counts(memory: Memory) -> None:
    with pytest.raises(ArgumentError, match="provenance: expected one entry for each of the 2"):
        Memory(memory.tensor[:2], memory.provenance)


def test_every_truncation_is_refused(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "m"
    memory.save(path)
    whole = path.read_bytes()
    for size in (0, 5, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(MemoryFileError, match=rf"{path}: (truncated|not a) safetensors"):
            Memory.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(MemoryFileError, match="not a valid safetensors file"):
        Memory.load(path)


@pytest.mark.parametrize("content", [
    b"some text that is no tensor file at all\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b"{}",
    (2).to_bytes(8, "little") + b"[]", (2).to_bytes(8, "little") + b"{x", (9).to_bytes(8, "little") + b'{"a": 12}'])
def test_other_formats_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(content)
    with pytest.raises(MemoryFileError, match=rf"{path}: not a safetensors file"):
        Memory.load(path)


@pytest.mark.parametrize("description", ["no JSON", "[1]", "3"])
def test_a_foreign_description_is_refused(tmp_path: Path, description: str) -> None:
    path = tmp_path / "m"
    safetensors.torch.save_file({"memory": torch.zeros(1, 2, 3)}, path, {"gradmem": description})
    with pytest.raises(MemoryFileError, match="expected a memory file of gradmem, got safetensors of something else"):
        Memory.load(path)


def test_other_safetensors_files_are_refused(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "m"
    safetensors.torch.save_file({"memory": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(MemoryFileError, match=r"expected a memory file of gradmem, got safetensors of something else"):
        Memory.load(path)
    save_tensors(path, "checkpoint", 1, {}, {})
    with pytest.raises(MemoryFileError, match=r"expected a memory file of gradmem, got a checkpoint file"):
        Memory.load(path)
    save_tensors(path, "memory", 2, {}, {})
    with pytest.raises(MemoryFileError, match=r"expected version 1 of the memory format, got 2"):
        Memory.load(path)
    entry = dataclasses.asdict(memory.provenance[0])
    for tensors, about in (({}, {"provenance": []}), ({"memory": torch.zeros(2, 3, 4)}, {"provenance": [entry]}),
                           ({"memory": torch.zeros(1, 3, 4)}, {"provenance": [{"model": "x"}]})):
        save_tensors(path, "memory", 1, tensors, about)
        with pytest.raises(MemoryFileError, match="not a valid memory file"):
            Memory.load(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemoryFileError, match="No such file"):
        Memory.load(tmp_path / "nothing")
    with pytest.raises(MemoryFileError, match="Is a directory"):
        Memory.load(tmp_path)


def test_a_memory_of_another_model_is_refused(model: GradMem, memory: Memory, make_model: MakeModel,
                                              tmp_path: Path) -> None:
    path = tmp_path / "m"
    memory.save(path)
    for other in (make_model(seed=1), make_model(memory_tokens=2), make_model().float()):
        with pytest.raises(MemoryFileError, match=rf"written by another model: .* {model.fingerprint()[:12]}"):
            Memory.load(path, other)
    with torch.no_grad():
        model.backbone.decoder.norm.weight[0] += 1e-3  # trained on
    with pytest.raises(MemoryFileError, match="written by another model"):
        Memory.load(path, model)


def test_a_memory_that_is_not_finite_is_not_saved(memory: Memory, tmp_path: Path) -> None:
    tensor = memory.tensor.clone()
    tensor[1, 0, 0] = torch.nan
    with pytest.raises(MemoryFileError, match="memory 1 is not finite"):
        dataclasses.replace(memory, tensor=tensor).save(tmp_path / "m")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_an_interrupted_save_leaves_the_old_file(memory: Memory, tmp_path: Path, moment: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    memory[0].save(path)
    before = path.read_bytes()

    def cut_off(tensors, filename, metadata):
        Path(filename).write_bytes(b"half of a file")
        raise KeyboardInterrupt

    def no_replace(*_):
        raise OSError(28, "No space left on device")

    if moment == "writing":
        monkeypatch.setattr(safetensors.torch, "save_file", cut_off)
    else:
        monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises((KeyboardInterrupt, OSError)):
        memory[1].save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_context_hash_is_of_the_token_ids() -> None:
    assert context_hash([1, 2]) != context_hash([2, 1])
    assert context_hash([1]) != context_hash([1, 0])
    assert context_hash([1, -1]) == hashlib.sha256(bytes([1] + [0] * 7 + [255] * 8)).hexdigest()
