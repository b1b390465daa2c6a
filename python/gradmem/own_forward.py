"""A model of transformers of any architecture, by its own forward, differentiated twice by autograd."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gradmem.first_order import refuse_first_order_kernels
from gradmem.lm import PretrainedBackbone
from gradmem.tasks.batch import IGNORE
from gradmem_kernels import Decoder, Prefix
from gradmem_kernels.checks import Checker
from gradmem_kernels.integrations.transformers import register

__all__ = ["OwnForwardLM"]

#: What of a configuration is no matter of what the model computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


class OwnForwardLM(PretrainedBackbone):
    """A causal language model of ``transformers`` that computes everything by its own forward.

    It is given ``inputs_embeds``, so soft caps, scaled embeddings, biased heads, dropout and gradient checkpointing are
    the model's own matter. There is no dual form: second order is reverse mode over reverse mode.

    Args:
        model: a causal language model that takes ``inputs_embeds``.
        attn_implementation: which attention its layers run; models that cannot choose keep ``"eager"``.

    Raises:
        ArgumentError: for a model that is not causal, or that takes no embeddings.
        ImportError: if transformers is older than attention of these kernels needs.
    """

    RECOMPUTE = ("none", "step", "auto")

    def __init__(self, model: Any, *, attn_implementation: str = "gradmem") -> None:
        super().__init__()
        check = Checker("OwnForwardLM")
        arguments = inspect.signature(model.forward).parameters if isinstance(model, nn.Module) else {}
        settings: Any = getattr(model, "config", None)
        if "inputs_embeds" not in arguments or not hasattr(settings, "to_json_string"):
            check.fail("model", "a causal language model of transformers that takes inputs_embeds",
                       type(model).__name__)
        if getattr(settings, "is_encoder_decoder", False) or getattr(settings, "is_causal", True) is False:
            check.fail("model.config", "a causal decoder", "is_encoder_decoder=True or is_causal=False",
                       "padding, and the tokens to predict, would be seen")
        if model.get_output_embeddings() is None:
            check.fail("model", "a language model with a head", type(model).__name__,
                       "load it with AutoModelForCausalLM")
        if attn_implementation == "gradmem":
            register()
        if model._can_set_attn_implementation():
            model.set_attn_implementation(attn_implementation)
        self.model = model
        self.config = _Settings(settings)
        text = settings.get_text_config()
        self.heads, self.layers = getattr(text, "num_attention_heads", 1), text.num_hidden_layers
        self._keeps_logits = "logits_to_keep" in arguments
        self._growing = [module for module in model.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]

    @property
    def pretrained(self) -> Any:
        return self.model

    @property
    def decoder(self) -> Decoder:  # type: ignore[override]
        return Checker("OwnForwardLM").fail("backbone", "one with the fused decoder", "a model's own forward",
                                            "use gradmem.TransformersLM or gradmem.CausalLM")

    @property
    def embed_tokens(self) -> nn.Embedding:  # type: ignore[override]
        """The embedding table, ``[V, D]``."""
        return self.model.get_input_embeddings()

    @property
    def head_weight(self) -> Tensor:
        """``[V, D]``, the embedding table where the model ties them."""
        return self.model.get_output_embeddings().weight

    def write_loss(self, prefix: Prefix, ids: Tensor, labels: Tensor, head: Tensor | None, *,
                   second_order: bool) -> Callable[..., Tensor]:
        """See :meth:`gradmem.lm.Backbone.write_loss`.

        Raises:
            ArgumentError: for a model with kernels that cannot be differentiated twice, if they will be.
        """
        if second_order:
            refuse_first_order_kernels("OwnForwardLM", self.model)

        def loss(*memory: Tensor) -> Tensor:
            # everything that is trained is reached from here as a leaf, for recompute="step" to find
            context = self.embed_tokens(ids[:, :-1])
            rows = prefix(*(t.to(context.dtype) for t in memory))
            with contextlib.nullcontext() if self.adapter is None else self.adapter.enabled():
                logits = self.logits(torch.cat([rows, context], 1), rows.shape[1] - 1, head)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(wide.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE)
            return losses.sum(1) / (labels != IGNORE).sum(1).clamp(min=1)

        return loss

    def logits(self, rows: Tensor, start: int, head: Tensor | None = None) -> Tensor:
        """See :meth:`gradmem.lm.Backbone.logits`; ``head [V, D]`` takes the place of the head's weight."""
        count = rows.shape[1] - start
        self._shrink()
        if self.adapter is not None:
            for module in self.model.modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = self.adapter.remembered(module._gradient_checkpointing_func)
        inputs = {"inputs_embeds": rows, "use_cache": False}
        if self._keeps_logits:
            inputs["logits_to_keep"] = count
        if head is None:
            out = self.model(**inputs)
        else:
            out = functional_call(self.model, {self._head_name(): head}, (), inputs, tie_weights=False)
        return out.logits[:, -count:]

    @torch.no_grad()
    def greedy(self, prefix: Tensor, query_ids: Tensor, lengths: Tensor, max_new_tokens: int,
               eos_token_id: int | None) -> Tensor:
        """Greedy continuations by the model's ``generate``, on rows that are padded left."""
        from transformers import GenerationConfig

        queries = query_ids.flatten(0, 1)
        rows = torch.cat([prefix.repeat_interleave(query_ids.shape[1], 0), self.embed_tokens(queries)], 1)
        # each row is turned right until its last valid token is the last
        width = rows.shape[1]
        shift = (queries.shape[1] - lengths.to(rows.device)).unsqueeze(1)
        place = torch.arange(width, device=rows.device) - shift
        rows = rows.gather(1, (place % width).unsqueeze(-1).expand_as(rows))
        config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id,
                                  pad_token_id=0 if eos_token_id is None else eos_token_id)
        self._shrink()
        # the model's own settings would stand in for what is not set here: an end, penalties, sampling
        settings, self.model.generation_config = self.model.generation_config, config
        try:
            tokens = self.model.generate(inputs_embeds=rows, attention_mask=(place >= 0).long(),
                                         generation_config=config)
        finally:
            self.model.generation_config = settings
        return F.pad(tokens, (0, max_new_tokens - tokens.shape[1]), value=eos_token_id or 0)

    def _shrink(self) -> None:
        """Takes from dynamic rotary embeddings what longer sequences before have made of them.

        What is computed shall depend on its rows alone, also where it is computed again.
        """
        for module in self._growing:
            kinds = [f"{kind}_" for kind in module.rope_type] if isinstance(module.rope_type, dict) else [""]
            for kind in kinds:
                setattr(module, f"{kind}inv_freq", getattr(module, f"{kind}original_inv_freq").clone())
                setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)

    def _head_name(self) -> str:
        head = self.model.get_output_embeddings()
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is head)


class _Settings:
    """What a model computes, of its configuration."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def to_dict(self) -> dict[str, Any]:
        fields = json.loads(self.config.to_json_string(use_diff=False))
        return {name: value for name, value in fields.items() if name not in _INCIDENTAL}
