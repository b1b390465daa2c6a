"""GradMem as a model of ``transformers``: for its Trainer, accelerate, and whatever takes a ``PreTrainedModel``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradmem.adapters import adapter_layers, freeze
from gradmem.config import GradMemConfig
from gradmem.errors import CheckpointError
from gradmem.hub import load_model, optional_library
from gradmem.model import GradMem
from gradmem.own_forward import OwnForwardLM
from gradmem.tasks.batch import IGNORE
from gradmem_kernels.checks import Checker, check_values

optional_library("transformers", "gradmem.hf")
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel  # noqa: E402
from transformers.utils.generic import ModelOutput  # noqa: E402

__all__ = ["ContextCollator", "GradMemForCausalLM", "GradMemHFConfig", "GradMemHFOutput"]


class GradMemHFConfig(PretrainedConfig):
    """What a saved :class:`GradMemForCausalLM` needs to be made again.

    Args:
        base_config: configuration of the backbone, of transformers, or its fields.
        gradmem: the fields of :class:`gradmem.GradMemConfig` that are not the default.
        backbone_forward: ``"auto"``, ``"fused"`` or ``"own"``, see :meth:`gradmem.GradMem.from_pretrained_backbone`.
    """

    model_type = "gradmem"
    base_config: Any = None
    gradmem: dict[str, Any] | None = None
    backbone_forward: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.base_config, Mapping):
            fields = dict(self.base_config)
            self.base_config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        self.gradmem = GradMemConfig.from_dict(self.gradmem or {}).to_dict()


@dataclass
class GradMemHFOutput(ModelOutput):
    """What :class:`GradMemForCausalLM` returns; shapes as in :class:`gradmem.GradMemOutput`.

    Attributes:
        loss: of READ, plus the weighted inner loss; ``None`` without labels.
        logits: ``[B, T, V]``; ``logits[:, t]`` predicts query token ``t`` (labels are not shifted).
        inner_losses: ``[B, steps]``, batch first, as gathering wants it.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    inner_losses: Tensor | None = None


class GradMemForCausalLM(PreTrainedModel):
    """:class:`gradmem.GradMem` with flat inputs, saved and loaded as any model of transformers is.

    Make one with :meth:`from_backbone`, save it with ``save_pretrained``, load it with ``from_pretrained``.
    ``gradmem`` is the model within, which writes, reads and generates.
    """

    config_class = GradMemHFConfig
    base_model_prefix = ""
    main_input_name = "context_input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer counts the labels of all micro-batches of a step: num_items_in_batch
    _supports_sdpa = _supports_attention_backend = True  # the backbone chooses its own

    def __init__(self, config: GradMemHFConfig, backbone: Any = None) -> None:
        super().__init__(config)
        # Trainer would take the class's name for that of a loss which shifts labels
        self.loss_type = None  # type: ignore[assignment]
        if backbone is None:
            if config.base_config is None:
                Checker("GradMemForCausalLM").fail("config.base_config", "the configuration of a backbone", None,
                                                   "make one with from_backbone, or load what save_pretrained saved")
            backbone = AutoModelForCausalLM.from_config(config.base_config)
            if getattr(config.base_config.get_text_config(), "tie_word_embeddings", False):
                # from_pretrained does so when everything is loaded, and the names are settled
                backbone.get_output_embeddings().weight = backbone.get_input_embeddings().weight
        self.gradmem = GradMem.from_pretrained_backbone(backbone, GradMemConfig.from_dict(config.gradmem or {}),
                                                        forward=config.backbone_forward)
        self._checkpointed = self.gradmem.config.recompute
        self.post_init()
        if self.gradmem.config.memory_projection == "shared":
            shared = {f"gradmem.read_prefix.projection.{name}": f"gradmem.write_prefix.projection.{name}"
                      for name in ("weight", "bias")}
            self.all_tied_weights_keys.update(shared)  # what loading ties
            self._tied_weights_keys = shared  # what saving leaves out
        own = self._own_forward()
        if own is not None:
            names = own.all_tied_weights_keys
            self.all_tied_weights_keys.update({f"gradmem.backbone.model.{target}": f"gradmem.backbone.model.{source}"
                                               for target, source in names.items()})

    @classmethod
    def from_backbone(cls, backbone: Any, config: GradMemConfig, *, forward: str = "auto") -> GradMemForCausalLM:
        """Around a causal language model, whose parameters are used in place, or the name or path of one.

        Arguments and errors are those of :meth:`gradmem.GradMem.from_pretrained_backbone`; a backbone with adapters of
        ``peft`` is refused as well, as loading would make one without.
        """
        model = load_model(str(backbone)) if isinstance(backbone, str) or hasattr(backbone, "__fspath__") else backbone
        if isinstance(model, torch.nn.Module) and adapter_layers(model):
            Checker("GradMemForCausalLM.from_backbone").fail(
                "backbone", "a model without adapters of peft", f"one with {next(iter(adapter_layers(model)))}",
                "merge them into the model (merge_and_unload); for adapters of WRITE alone, set write_lora_rank")
        # a configuration of its own: adapters and attention change the model's
        base = type(model.config).from_dict(model.config.to_dict())
        return cls(GradMemHFConfig(base_config=base, gradmem=config.to_dict(), backbone_forward=forward), model)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As that of any model of ``transformers``, but for tensors that the files lack.

        Raises:
            CheckpointError: naming one of these, which ``transformers`` would make up.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if info["missing_keys"]:
            raise CheckpointError(f"{args[0] if args else 'checkpoint'}: expected all tensors of GradMemForCausalLM, "
                                  f"got none named {min(info['missing_keys'])}")
        if model.gradmem.config.freeze_backbone:  # loading has put other parameters in the place of frozen ones
            freeze(model.gradmem.backbone)
        return (model, info) if output_loading_info else model

    def forward(self, context_input_ids: Tensor, query_input_ids: Tensor, labels: Tensor | None = None,
                context_attention_mask: Tensor | None = None, context_lengths: Tensor | None = None,
                num_items_in_batch: Tensor | int | None = None) -> GradMemHFOutput:
        """See :meth:`gradmem.GradMem.forward`.

        Args:
            context_input_ids: ``[B, S]`` int64, right-padded.
            query_input_ids: ``[B, T]`` int64: each query with its answer behind it.
            labels: ``[B, T]``: the token at each position that counts for the loss, else -100; not shifted.
            context_attention_mask: ``[B, S]``, 1 for tokens and 0 for padding to their right.
            context_lengths: ``[B]``, the same as lengths; default without either: no padding.
            num_items_in_batch: with ``labels``, the labels of all micro-batches whose gradients are added up. The loss
                is multiplied with this batch's share of these, so that the losses add up to the mean over all labels
                (and, of the inner losses, to a mean that weighs each micro-batch so). Default: those of this batch.

        Raises:
            ArgumentError: as there, for both a mask and lengths, and for a mask that is not padded right.
        """
        check = Checker("GradMemForCausalLM")
        if context_attention_mask is not None:
            if context_lengths is not None:
                check.fail("context_lengths", "None with context_attention_mask", "both", "pass one of them")
            context_lengths = _lengths(check, context_attention_mask, context_input_ids)
        out = self.gradmem(context_input_ids, query_input_ids, labels, context_lengths)
        loss = out.loss
        if loss is not None and labels is not None and num_items_in_batch is not None:
            count = torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)
            loss = loss * ((labels != IGNORE).sum() / count)
        return GradMemHFOutput(loss=loss, logits=out.logits, inner_losses=out.inner_losses.detach().T)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.gradmem.backbone.embed_tokens

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            ArgumentError: always; heads and the saved configuration would stay as they are.
        """
        Checker("GradMemForCausalLM.resize_token_embeddings").fail(
            "the model", "a backbone around which there is no GradMem yet", "GradMemForCausalLM",
            "resize the backbone's, then call from_backbone")

    def init_weights(self) -> None:
        """Nothing: parameters have their values when they are made, those of a backbone as it was given."""

    def _init_weights(self, module: Any) -> None:
        """Buffers that no file holds."""
        if not list(module.parameters(recurse=False)) and hasattr(module, "inv_freq"):
            super()._init_weights(module)

    def _own_forward(self) -> Any:
        """The model whose own forward is run; ``None`` for the fused decoder."""
        backbone = self.gradmem.backbone
        return backbone.model if isinstance(backbone, OwnForwardLM) else None

    def _activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, *args: Any,
                                         **kwargs: Any) -> None:
        self._checkpoint_layers(activation_checkpointing_kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Checkpoints layers: on the fused decoder those of WRITE (``recompute="layer"``), else the model's own."""
        self._checkpoint_layers(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        own = self._own_forward()
        if own is not None:
            own.gradient_checkpointing_disable()
        else:
            self.gradmem.config = dataclasses.replace(self.gradmem.config, recompute=self._checkpointed)

    def _checkpoint_layers(self, options: Any) -> None:
        options = {"use_reentrant": False, **(options or {})}
        if options["use_reentrant"]:
            Checker("GradMemForCausalLM").fail("use_reentrant", "False", True, "reentrant checkpoints refuse the inner "
                                               "gradient")
        own = self._own_forward()
        if own is not None:
            own.gradient_checkpointing_enable(options)
        else:
            self.gradmem.config = dataclasses.replace(self.gradmem.config, recompute="layer")


@dataclass(frozen=True)
class ContextCollator:
    """Batches of records ``{"context": ids, "query": ids, "target": ids}``, lists or tensors of token ids.

    Returns ``context_input_ids`` and ``context_attention_mask`` ``[B, S]``, ``query_input_ids`` (each query with its
    target behind it) and ``labels`` ``[B, T]``, which count targets alone, padded right. ``Trainer`` needs
    ``remove_unused_columns=False`` to hand records on.

    Args:
        pad_token_id: where padded; no result depends on it.
    """

    pad_token_id: int = 0

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        check = Checker("ContextCollator")
        for i, record in enumerate(records):
            for name in ("context", "query", "target"):
                if name not in record:
                    check.fail(f"records[{i}]", "context, query and target", ", ".join(map(str, record)),
                               "with Trainer, set remove_unused_columns=False")
        contexts, queries, targets = ([torch.as_tensor(record[name], dtype=torch.int64) for record in records]
                                      for name in ("context", "query", "target"))
        pairs = list(zip(queries, targets, strict=True))

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value)

        return {
            "context_input_ids": padded(contexts, self.pad_token_id),
            "context_attention_mask": padded([torch.ones_like(context) for context in contexts], 0),
            "query_input_ids": padded([torch.cat(pair) for pair in pairs], self.pad_token_id),
            "labels": padded([torch.cat([torch.full_like(q, IGNORE), t]) for q, t in pairs], IGNORE)}


def _lengths(check: Checker, mask: Tensor, ids: Tensor) -> Tensor:
    check.tensor("context_attention_mask", mask, ("B", "S"), dtypes=(torch.int64, torch.int32, torch.bool))
    check.same_shape("context_attention_mask", mask, "context_input_ids", ids)
    if check_values(mask) and bool((mask[:, 1:].int() > mask[:, :-1].int()).any()):
        check.fail("context_attention_mask", "padding on the right", "a 0 before a 1",
                   "use tokenizer.padding_side = 'right'")
    return mask.long().sum(1)
