"""Checkpoints of the paper's public code, github.com/yurakuratov/gradmem, as models of this package.

Its ``GradMemGPT`` computes what :class:`gradmem.GradMem` computes, under other names. WRITE reads
``[write_st; W M + b; write_end; context]`` and READ ``[read_st; W M + b; read_end; query]``, of the same ``W`` and
``b``. READ has the model's own head, WRITE that or ``write_head``; LoRA takes part in WRITE alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from gradmem.adapters import ADAPTER
from gradmem.config import GradMemConfig
from gradmem.errors import CheckpointError
from gradmem.hub import load_model, optional_library
from gradmem.lm import PretrainedBackbone
from gradmem.model import GradMem
from gradmem_kernels.checks import Checker

__all__ = ["convert_config", "from_gradmem_gpt", "load_gradmem_gpt", "read_gradmem_gpt"]

#: Tensors of GradMemGPT beside its language model, and the parameter of GradMem that each is.
NAMES = {"mem": "memory_init", "mem_proj.weight": "write_prefix.projection.weight",
         "mem_proj.bias": "write_prefix.projection.bias", "write_st": "write_prefix.start",
         "write_end": "write_prefix.end", "read_st": "read_prefix.start", "read_end": "read_prefix.end",
         "write_head.weight": "write_head"}
_MODEL, _PEFT = "model.", "base_model.model."
#: Fields that are an option here, and its name.
_FIELDS = {"n_mem_tokens": "memory_tokens", "K": "steps", "lr": "inner_lr", "grad_mode": "order",
           "n_ctrl_tokens": "control_tokens", "inner_clip_value": "inner_clip_value",
           "inner_clip_norm": "inner_clip_norm", "use_write_head": "write_head", "freeze_backbone": "freeze_backbone"}
#: What the fields that GradMemGPT leaves out stand for.
_DEFAULTS = {"n_mem_tokens": 8, "K": 2, "lr": 0.01}
#: Values of mem_proj_mode, and of memory_projection.
_PROJECTIONS = {"none": "none", "proj": "shared", "per_sample": "per_sample"}
#: Fields with one value that there is a counterpart of, and why not of others.
_ONLY: dict[str, tuple[Any, str]] = {
    "use_adam": (False, "its Adam clamps and detaches the gradient; no rule here does"),
    "use_hopfield_memory": (False, "memories of segments are not stored and retrieved here"),
    "hopfield_n_segments": (1, "a context is written whole here"),
    "memory_update": ("gradient", "a memory written by a forward pass is another model here, gradmem.baselines"),
    "use_reconstruction_loss": (False, "it goes with memory_update='forward'"),
    "use_mem_residual": (False, "it goes with memory_update='forward'")}
#: Fields that are read below, that name the language model, or that change nothing of what is computed.
_OTHERS = {"last_K_second_order", "mem_proj_mode", "use_mem_proj", "use_write_lora", "write_lora_r", "write_lora_alpha",
           "write_lora_dropout", "write_lora_target_modules", "add_inner_loss_to_outer", "inner_loss_weight",
           "pretrained_model", "base_config", "attn_implementation", "use_gradient_checkpointing",
           "reconstruction_loss_weight", "use_separate_hopfield_mem", "hopfield_segment_size", "hopfield_beta_init",
           "hopfield_retrieval_mode", "hopfield_proj_dim", "hopfield_direct_query", "hopfield_value_as_key",
           "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def convert_config(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> GradMemConfig:
    """The configuration of GradMem that computes what a ``GradMemGPT`` of these fields does.

    Args:
        config: what its ``config.json`` holds.
        state_dict: its tensors, whose names tell which layers have LoRA matrices.

    Raises:
        ArgumentError: for a field that is not known, or a value that has no counterpart here, with the reason.
    """
    check = Checker("from_gradmem_gpt")
    for name, value in config.items():
        if name in _ONLY and value != _ONLY[name][0]:
            check.fail(f"config[{name!r}]", repr(_ONLY[name][0]), repr(value), _ONLY[name][1])
        if name not in {*_FIELDS, *_ONLY, *_OTHERS}:
            check.fail("config", f"fields of GradMemGPT: {', '.join(sorted({*_FIELDS, *_ONLY, *_OTHERS}))}", repr(name),
                       "leave the field out if it changes nothing of what the model computes")
    mode = config.get("mem_proj_mode", "none")
    if mode not in _PROJECTIONS:
        check.fail("config['mem_proj_mode']", f"one of {', '.join(map(repr, _PROJECTIONS))}", repr(mode),
                   "a projection of its own in READ is not here")
    if mode == "per_sample" and "use_hopfield_memory" in config:
        check.fail("config['mem_proj_mode']", "'none' or 'proj' of the branch with memories of segments", repr(mode),
                   "READ there takes the projection as it was before WRITE")
    values = {**_DEFAULTS, **config}
    options = {ours: values[theirs] for theirs, ours in _FIELDS.items() if theirs in values}
    options["memory_projection"] = _PROJECTIONS[mode]
    last = config.get("last_K_second_order")
    if last is not None and options.get("order", "second") == "second" and last < options["steps"]:
        options["second_order_steps"] = max(last, 0)
    if config.get("add_inner_loss_to_outer", False):
        weight = config.get("inner_loss_weight")
        options["inner_loss_weight"] = 1.0 if weight is None else weight
    if config.get("use_write_lora", False):
        # as "attn.c_proj", which is not "mlp.c_proj"
        layers = {re.sub(r".*\.\d+\.", "", name.partition(".lora_A.")[0]) for name in state_dict if ".lora_A." in name}
        if not layers:
            check.fail("state_dict", "lora_A matrices with use_write_lora=True", "none")
        options |= {"write_lora_rank": config.get("write_lora_r", 8),
                    "write_lora_alpha": float(config.get("write_lora_alpha", 16)),
                    "write_lora_dropout": config.get("write_lora_dropout", 0.0),
                    "write_lora_targets": ",".join(sorted(layers))}
    return GradMemConfig.from_dict(options)


def from_gradmem_gpt(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], backbone: Any, *,
                     forward: str = "auto") -> GradMem:
    """A ``GradMemGPT`` as a :class:`gradmem.GradMem`: the same memories and logits.

    Args:
        state_dict: its tensors, ``model.*`` those of its language model.
        config: what its ``config.json`` holds.
        backbone: a causal language model of ``transformers`` of that architecture, whose parameters are replaced by
            those of ``state_dict``, in their own dtype.
        forward: see :meth:`gradmem.GradMem.from_pretrained_backbone`.

    Raises:
        ArgumentError: as :func:`convert_config` and :func:`load_gradmem_gpt`.
    """
    made = GradMem.from_pretrained_backbone(backbone, convert_config(config, state_dict), forward=forward)
    load_gradmem_gpt(made, state_dict)
    return made


@torch.no_grad()
def load_gradmem_gpt(model: GradMem, state_dict: Mapping[str, Tensor]) -> None:
    """Copies every tensor of a ``GradMemGPT`` into ``model``, which stays as it was if one does not fit.

    Args:
        model: around a model of ``transformers``, with the configuration of :func:`convert_config`.
        state_dict: the tensors.

    Raises:
        ArgumentError: naming a tensor that has no place in ``model``, one that it lacks, or one of another shape.
    """
    check = Checker("from_gradmem_gpt")
    assert isinstance(model.backbone, PretrainedBackbone)
    pretrained: nn.Module = model.backbone.pretrained
    places = {_MODEL + name: t for name, t in pretrained.state_dict(keep_vars=True).items()}
    ours = dict(model.named_parameters())
    places |= {theirs: ours[name] for theirs, name in NAMES.items() if name in ours}
    # buffers that older versions of transformers saved, by transformers' own list
    ignored = [re.compile(p) for p in getattr(pretrained, "_keys_to_ignore_on_load_unexpected", None) or ()]
    given = {}
    for name, t in state_dict.items():
        place = _place(name)
        if place not in places:
            if any(pattern.search(place) for pattern in ignored):
                continue
            check.fail("state_dict", "tensors that the configuration and the backbone have a place for", repr(name),
                       "the configuration, or the backbone, is another checkpoint's")
        if t.shape != places[place].shape:
            check.fail(f"state_dict[{name!r}]", f"shape {list(places[place].shape)}", list(t.shape))
        given[place] = t
    filled = {places[name].data_ptr() for name in given}  # safetensors keep one of two tensors that are tied
    for name, place in places.items():
        if name not in given and place.data_ptr() not in filled:
            check.fail("state_dict", f"all tensors of the model, {name!r} among them", "none of this name")
    for name, t in given.items():
        places[name].copy_(t)


def _place(name: str) -> str:
    """The name of a tensor of GradMemGPT in a model with adapters of this package, whatever wrapped it there."""
    if not name.startswith(_MODEL):
        return name
    own = name.removeprefix(_MODEL).removeprefix(_PEFT)
    return _MODEL + re.sub(r"(\.lora_[AB])\.default\.", rf"\1.{ADAPTER}.", own)


def read_gradmem_gpt(folder: str | Path, backbone: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """The tensors, the configuration and a language model of the architecture of a saved ``GradMemGPT``.

    Args:
        folder: has ``config.json``, and ``model.safetensors``, in parts or not, or ``pytorch_model.bin``.
        backbone: name or directory of a model of its architecture; default: the one that the configuration describes.

    Raises:
        CheckpointError: if a file is missing or cannot be read.
        HubError, MissingExtraError: if the language model cannot be made.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        if index.exists():
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            tensors = {name: t for part in parts for name, t in safetensors.torch.load_file(folder / part).items()}
        elif (folder / "model.safetensors").exists():
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
        else:
            tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as reason:
        raise CheckpointError(f"{folder}: expected config.json, and model.safetensors or pytorch_model.bin, of a "
                              f"GradMemGPT: {reason}") from reason
    name, base = backbone or config.get("pretrained_model"), config.get("base_config")
    if name is not None:
        return tensors, config, load_model(name)
    if not isinstance(base, dict) or "model_type" not in base:
        raise CheckpointError(f"{folder}: config.json: expected pretrained_model, or base_config with its model_type, "
                              f"got neither; name the language model by --backbone")
    library = optional_library("transformers", "gradmem convert")
    fields = dict(base)
    return tensors, config, library.AutoModelForCausalLM.from_config(
        library.AutoConfig.for_model(fields.pop("model_type"), **fields))
