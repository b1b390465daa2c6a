"""Backbones: a decoder with its embedding table and head; a small one of its own, or a model of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmem import generation
from gradmem.adapters import WriteAdapter
from gradmem.config import GradMemConfig, LMConfig
from gradmem_kernels import Decoder, DecoderConfig, Prefix, PrefixLoss
from gradmem_kernels.checks import Checker

__all__ = ["Backbone", "CausalLM", "PretrainedBackbone", "TransformersLM"]


class _Described(Protocol):
    def to_dict(self) -> dict[str, Any]:
        """Its fields by name, in types that JSON has."""


class Backbone(nn.Module):
    """What :class:`gradmem.GradMem` asks of a language model; what is computed here is computed by ``decoder``.

    Attributes:
        config: what the model is, for fingerprints.
        embed_tokens: an ``nn.Embedding`` ``[V, D]``.
        decoder: from input embeddings to hidden states.
        adapter: takes part in WRITE alone, where there is one.
        RECOMPUTE: what WRITE may recompute.
    """

    config: _Described
    embed_tokens: nn.Embedding
    decoder: Decoder
    adapter: WriteAdapter | None = None
    RECOMPUTE: tuple[str, ...] = ("none", "step", "layer", "auto")

    @property
    def head_weight(self) -> Tensor:
        """``[V, D]``."""
        raise NotImplementedError

    def write_loss(self, prefix: Prefix, ids: Tensor, labels: Tensor, head: Tensor | None, *,
                   second_order: bool) -> Callable[..., Tensor]:
        """The WRITE loss of contexts, as :func:`gradmem_kernels.write` takes it.

        Args:
            prefix: makes the rows of the memory.
            ids: ``[B, S]``, the contexts, right-padded.
            labels: ``[B, S]``, the same, -100 where padded.
            head: ``[V, D]`` in the place of the model's own.
            second_order: whether it will be differentiated twice.
        """
        loss = _Adapted(self.decoder, prefix, self.embed_tokens(ids), labels,
                        self.head_weight if head is None else head)
        loss.adapter = self.adapter
        return loss

    def adapt(self, config: GradMemConfig) -> None:
        """Adds the adapter that ``config`` describes.

        Raises:
            ArgumentError: for a backbone that can have none.
        """
        config.fail("write_lora_rank", f"0 with a {type(self).__name__}", config.write_lora_rank,
                    "adapters of peft are for models of transformers")

    def logits(self, rows: Tensor, start: int) -> Tensor:
        """What the model reads from input embeddings ``[N, S, D]``, from row ``start`` on: ``[N, S - start, V]``."""
        return F.linear(self.decoder(rows, start=start), self.head_weight)

    def greedy(self, prefix: Tensor, query_ids: Tensor, lengths: Tensor, max_new_tokens: int,
               eos_token_id: int | None) -> Tensor:
        """Greedy continuations: see :func:`gradmem.generation.greedy`."""
        return generation.greedy(self, prefix, query_ids, lengths, max_new_tokens, eos_token_id)


class _Adapted(PrefixLoss):
    """The WRITE loss with the adapter on, where there is one."""

    adapter: WriteAdapter | None = None

    def prepared(self, *memory: Tensor) -> PrefixLoss:
        with self._on():
            return super().prepared(*memory)

    def __call__(self, *memory: Tensor) -> Tensor:
        with self._on():
            return super().__call__(*memory)

    def dual(self, *tensors: Tensor, checkpoint_layers: bool = False,
             cotangents: tuple[Tensor | None, Tensor | None] = (None, None)) -> tuple[Tensor, Tensor]:
        with self._on():
            return super().dual(*tensors, checkpoint_layers=checkpoint_layers, cotangents=cotangents)

    def _on(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.adapter is None else self.adapter.enabled()


class CausalLM(Backbone):
    """Embedding table, :class:`gradmem_kernels.Decoder` of the Llama family, and head.

    Matrices start normal with standard deviation ``fan_in ** -0.5`` (those that write into the residual stream with
    half of it), which lets models of small width learn quickly; the embedding table and the head with 0.02.
    """

    config: LMConfig

    def __init__(self, config: LMConfig, *, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.decoder = Decoder(DecoderConfig(
            hidden_size=config.hidden_size, num_layers=config.num_layers, num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads, intermediate_size=config.intermediate_size,
            norm_eps=config.norm_eps, rope_theta=config.rope_theta), device=device, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
            nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, weight in self.decoder.named_parameters():
            if weight.ndim == 2:
                to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * (0.5 if to_residual else 1.0))

    @property
    def head_weight(self) -> Tensor:
        """``[V, D]``."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight


class PretrainedBackbone(Backbone):
    """A causal language model of ``transformers``, whose parameters are used in place.

    Attributes:
        heads, layers: of attention; of the model.
    """

    heads: int
    layers: int

    @property
    def pretrained(self) -> Any:
        """The model."""
        raise NotImplementedError

    @property
    def name_or_path(self) -> str:
        """What the model was loaded from; empty for one that was not."""
        return str(getattr(self.pretrained, "name_or_path", ""))

    def save_pretrained(self, path: str | Path) -> None:
        """Saves the model as it is now, trained or not, for servers and ``from_pretrained`` to load.

        An adapter of WRITE is left out: READ does without.
        """
        state = {} if self.adapter is None else {"state_dict": self.adapter.base_state(self.pretrained)}
        self.pretrained.save_pretrained(path, **state)

    def adapt(self, config: GradMemConfig) -> None:
        self.adapter = WriteAdapter(self.pretrained, config)


class TransformersLM(PretrainedBackbone):
    """A model of ``transformers`` read by the fused decoder, which borrows its modules: no parameter is copied.

    Embeddings that adapters are to wrap must be wrapped before; a head that is wrapped is refused.

    Args:
        model: of a class that :meth:`gradmem_kernels.Decoder.from_transformers` serves.

    Raises:
        ArgumentError: as there, and for a head that is no plain linear layer without bias.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = (model,)  # a tuple, so that its parameters have one name here
        self.decoder = Decoder.from_transformers(model)
        self.config = self.decoder.config
        self.heads, self.layers = self.decoder.config.num_heads, self.decoder.config.num_layers
        self.embed_tokens = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
            Checker("TransformersLM").fail("model", "a head that is an nn.Linear without bias", head,
                                           "leave adapters off the head")
        self.lm_head = None if head.weight is self.embed_tokens.weight else head

    @property
    def pretrained(self) -> Any:
        return self._model[0]

    def adapt(self, config: GradMemConfig) -> None:
        if config.write_lora_dropout:
            config.fail("write_lora_dropout", "0.0 with the fused decoder, whose dual form drops nothing",
                        config.write_lora_dropout, "use the model's own forward")
        super().adapt(config)
        assert self.adapter is not None
        self.decoder.recompute_context = self.adapter.enabled

    @property
    def head_weight(self) -> Tensor:
        """``[V, D]``, the embedding table where the model ties them."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
