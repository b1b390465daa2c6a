"""One model on many processes, replicated (DDP) or sharded (FSDP2), with one process's gradients (docs/parallel.md).

WRITE differentiates inside the forward pass and runs layers again, as dual numbers, inside the backward pass. FSDP2's
hooks on layers would gather, reduce and free there, each at the wrong time. So layers are sharded as groups of their
own, and the model's own forward and backward decide: parameters are gathered when its forward pass begins, and when its
outer backward pass has ended gradients are reduced and parameters freed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradmem.errors import CheckpointError
from gradmem.model import GradMem, GradMemOutput
from gradmem.own_forward import OwnForwardLM
from gradmem_kernels.checks import Checker

if TYPE_CHECKING:
    from gradmem.baselines import Model

__all__ = ["Replicated", "gathered", "load", "replicate", "save", "shard"]


def replicate(model: Model, group: dist.ProcessGroup | None = None) -> Replicated:
    """``model`` on every process of ``group`` (default: all), whose gradients are those of the whole batch.

    The loss is the mean over the labels, and the inner loss that over the contexts, of all processes: each may have
    another number of them, and none of its own batch need have a label. ``loss`` in the output is the whole batch's.

    Returns:
        The wrapper to call; ``model`` stays what writes, reads and is saved.

    Raises:
        ArgumentError: without a process group.
    """
    model.ranks = group = _group("replicate", group)
    devices = {p.device for p in model.parameters()}
    on_gpu = all(device.type != "cpu" for device in devices)
    return Replicated(model, device_ids=[devices.pop()] if on_gpu and len(devices) == 1 else None, process_group=group,
                      find_unused_parameters=True)


class Replicated(DistributedDataParallel):
    """DDP of a GradMem, in which a parameter counts as used where the loss depends on it.

    DDP asks all outputs, and would wait for gradients of parameters that inner losses alone depend on. So it is shown
    the loss alone; backward passes from other outputs are not reduced.
    """

    def forward(self, *inputs: Any, **options: Any) -> GradMemOutput:
        hook = self.module.register_forward_hook(lambda _, __, output: (output.loss, _Unseen(output)))
        try:
            loss, unseen = super().forward(*inputs, **options)
        finally:
            hook.remove()
        return dataclasses.replace(unseen.output, loss=loss)


class _Unseen:
    """Of no kind in which DDP looks for tensors."""

    def __init__(self, output: GradMemOutput) -> None:
        self.output = output


def shard(model: Model, mesh: DeviceMesh | None = None) -> None:
    """Shards the parameters of ``model``, in place, over the processes of ``mesh`` (default: all) by FSDP2.

    A group for each layer, and one for what is left. Between steps a process holds its part of parameters, gradients
    and optimizer state; from the beginning of ``model(...)`` to the end of the outer backward pass it holds all
    parameters. Losses and gradients are those of :func:`replicate`. ``write``, ``read`` and whatever else looks at
    parameters belong into :func:`gathered`. Optimizers are made afterwards.

    Raises:
        ArgumentError: without a process group, or for a mesh of more than one dimension.
    """
    check, group = Checker("shard"), _group("shard", None)
    if mesh is None:
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (group.size(),))
    if mesh.ndim != 1:
        check.fail("mesh", "one dimension", mesh.ndim, "pass mesh['name'] of the one to shard over")
    _show_outputs()
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
        state = fully_shard.state(layer)  # type: ignore[attr-defined] # @contract adds it
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined] # gathered() may come before the first forward
    model.register_forward_pre_hook(lambda module, _: _gather(module))
    model.register_forward_hook(lambda module, *_: None if torch.is_grad_enabled() else _free(module))
    model.ranks = mesh.get_group()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it every process holds all parameters of a sharded ``model``, as plain tensors; for others, nothing.

    Every process must enter it. It is for reading them: changes of values do not last.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    _gather(model)
    try:
        yield
    finally:
        _free(model)


def save(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Writes a folder of ``torch.distributed.checkpoint``, each process its part.

    Args:
        path: folder, which must not hold a checkpoint yet: nothing is ever half replaced.
        model: sharded, replicated, or of one process.
        optimizer: of its parameters.

    Raises:
        CheckpointError: if there is one.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_state

    if (Path(path) / ".metadata").exists():
        raise CheckpointError(f"{path}: holds a checkpoint already; name another folder")
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    if dist.is_initialized():
        dist.barrier()  # nobody writes before all have looked
    save_state(state, checkpoint_id=path)


def load(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reads what :func:`save` wrote, by any number of processes, into ``model`` and ``optimizer``.

    Raises:
        CheckpointError: if there is none, or it is of another model.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load as load_state

    if not (Path(path) / ".metadata").exists():
        raise CheckpointError(f"{path}: expected a folder of a distributed checkpoint, got one without .metadata")
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    try:
        load_state(state, checkpoint_id=path)
    except (CheckpointException, RuntimeError, ValueError) as reason:
        raise CheckpointError(f"{path}: cannot be loaded into this model: {str(reason).splitlines()[0]}") from reason
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _group(op: str, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_initialized():
        Checker(op).fail("group", "processes that know each other", "none",
                         "start them with torchrun and call torch.distributed.init_process_group()")
    return cast(dist.ProcessGroup, dist.group.WORLD) if group is None else group


@functools.cache  # once
def _show_outputs() -> None:
    """FSDP2 of older PyTorch finds tensors in what pytrees know alone, and would reduce no gradient of others."""
    import torch.export

    torch.export.register_dataclass(GradMemOutput)


def _layers(model: Model) -> list[nn.Module]:
    backbone = model.backbone
    if not isinstance(backbone, OwnForwardLM):
        return list(backbone.decoder.layers)
    names = backbone.pretrained._no_split_modules or ()  # what transformers knows as layers
    return [module for module in backbone.modules() if type(module).__name__ in names]


def _sharded(model: nn.Module) -> Iterable[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _gather(model: nn.Module) -> None:
    handles = [module.unshard(async_op=True) for module in _sharded(model)]
    for handle in handles:
        if handle is not None:
            handle.wait()
    # values came into the same tensors, which nothing counts as a change
    if isinstance(model, GradMem):
        model._fingerprint = None


def _free(model: nn.Module) -> None:
    for module in _sharded(model):
        module.reshard()
