"""The decoder: blocks and a final norm over input embeddings, plain, dual, and with a cache (docs/decoder.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradmem_kernels import backend as backends
from gradmem_kernels.checks import Checker
from gradmem_kernels.decoder.block import Block, ContextRows, LayerNames, Norm, make_norm
from gradmem_kernels.decoder.cache import KVCache, LayerCache
from gradmem_kernels.decoder.config import DecoderConfig
from gradmem_kernels.decoder.halves import split
from gradmem_kernels.decoder.rope import Rope, inverse_frequencies, tables

__all__ = ["Borrowed", "Decoder"]


@dataclass(frozen=True)
class Borrowed:
    """The modules of an existing model that a :class:`Decoder` reads.

    Attributes:
        layers: one for each block, with submodules under ``names``.
        norm: the final norm.
        embed_positions: the table of learned positions.
        rotary_emb: the module whose buffer ``inv_freq [r/2]`` has the rotary frequencies.
        dropout: what the model would drop in training, as ``"field=probability"``; the decoder drops nothing, and
            refuses to run in the layers' training mode if this is not empty.
    """

    layers: tuple[nn.Module, ...]
    names: LayerNames
    norm: nn.Module
    embed_positions: nn.Module | None = None
    rotary_emb: nn.Module | None = None
    dropout: str = ""


class Decoder(nn.Module):
    """Decoder of the Llama, Mistral, Qwen, GPT-2 and GPT-NeoX families, causal, without embeddings and head.

    Parameter names are those of a ``transformers`` Llama model (Qwen3 for ``qk_norm``), so that its state dict loads;
    learned positions are ``embed_positions``. :meth:`from_transformers` reads the parameters of a model in place.

    Args:
        config: its shape.
        device, dtype: of its parameters.
        borrowed: modules to read instead of making some.

    Source: Touvron et al., LLaMA, arXiv 2302.13971; Radford et al., GPT-2, 2019; Black et al., GPT-NeoX, arXiv
    2204.06745; the dual form is derived in docs/decoder.md.
    """

    def __init__(self, config: DecoderConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None,
                 borrowed: Borrowed | None = None) -> None:
        super().__init__()
        self.config, self.borrowed_dropout = config, "" if borrowed is None else borrowed.dropout
        self.embed_positions: nn.Module | None = None
        self.rotary_emb: nn.Module | None = None
        if borrowed is None:
            self.layers = nn.ModuleList(Block(config, index, device=device, dtype=dtype)
                                        for index in range(config.num_layers))
            self.norm = make_norm(config, config.hidden_size, device, dtype)
            if config.learned_positions is not None:
                self.embed_positions = nn.Embedding(config.learned_positions, config.hidden_size, device=device,
                                                    dtype=dtype)
                nn.init.normal_(self.embed_positions.weight, std=0.02)
        else:
            self.layers = nn.ModuleList(Block(config, index, borrowed.names, layer)
                                        for index, layer in enumerate(borrowed.layers))
            self.norm = borrowed.norm
            self.embed_positions, self.rotary_emb = borrowed.embed_positions, borrowed.rotary_emb
        #: entered around a checkpointed layer, so that it runs again in what the caller had entered around :meth:`dual`
        self.recompute_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._final_norm = Norm(config)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor | None, Rope]] = {}

    @classmethod
    def from_transformers(cls, model: Any) -> Decoder:
        """A decoder over the modules of a causal language model of ``transformers``, which it borrows and never copies.

        To train, load or move one is to train, load or move the other. Layers' modules are looked up at every call:
        adapters may be added before or after. Embeddings and head stay the model's own matter.

        Args:
            model: a ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM``, ``Qwen3ForCausalLM``,
                ``GPT2LMHeadModel`` or ``GPTNeoXForCausalLM``.

        Raises:
            ArgumentError: for a model or a field of its configuration that would not be served exactly; docs/decoder.md
                lists them.
        """
        from gradmem_kernels.decoder.borrow import borrow

        config, borrowed = borrow(model)
        return cls(config, borrowed=borrowed)

    def forward(self, inputs_embeds: Tensor, *, start: int = 0, context: ContextRows | None = None) -> Tensor:
        """Hidden states ``[B, S - start, D]`` of the rows from ``start`` on, after the final norm.

        Args:
            inputs_embeds: ``[B, S, D]``, of the parameters' dtype; the rows before ``context``, where that is given.
            start: first row whose hidden state is wanted, in ``0..S``.
            context: the rows behind ``inputs_embeds``, from :meth:`project_context`.
        """
        x = self._check("Decoder", inputs_embeds, start, context)
        x, rope, layers = self._place("Decoder", x, 0), self._rope(*self._span(x, context), x), iter(self.layers)
        if context is not None:
            x = next(layers)(x, self._rope(0, x.shape[1], x), context=context)
        for layer in layers:
            x = layer(x, rope)
        return self._final_norm.forward(self.norm, x[:, start:])

    def project_context(self, inputs_embeds: Tensor, *, first: int) -> ContextRows:
        """What the first layer makes of the rows ``inputs_embeds [B, T, D]`` at the positions from ``first`` on.

        Whatever stands before them does not change it: made once, it serves every prefix of ``first`` rows, in
        :meth:`forward` and :meth:`dual`, until parameters change. Gradients flow through it, in ``dual`` once.
        """
        x = self._check("Decoder.project_context", inputs_embeds, 0)
        x = self._place("Decoder.project_context", x, first)
        layer = cast(Block, self.layers[0])
        return layer.project_context(x, self._rope(first, first + x.shape[1], x), first)

    def dual(self, inputs_embeds: Tensor, inputs_embeds_t: Tensor, *, start: int = 0,
             context: ContextRows | None = None, checkpoint_layers: bool = False) -> tuple[Tensor, Tensor]:
        """:meth:`forward` and its tangent along ``inputs_embeds_t``: returns ``hidden, hidden_t``.

        ``context`` has no tangent, so the first layer's tangents take work in the rows of ``inputs_embeds`` alone.

        With ``checkpoint_layers`` only the ``[2, B, S, D]`` between the layers is kept for the backward pass, which
        runs each layer's dual form again.
        """
        x = self._check("Decoder.dual", inputs_embeds, start, context)
        Checker("Decoder.dual").tangent("inputs_embeds_t", inputs_embeds_t, inputs_embeds)
        rope = self._rope(*self._span(x, context), x)
        arguments: list[tuple[Rope | None, ContextRows | None]] = [(rope, None)] * len(self.layers)
        if context is not None:
            arguments[0] = self._rope(0, x.shape[1], x), context
        x = torch.stack([self._place("Decoder.dual", x, 0), inputs_embeds_t])
        for layer, given in zip(cast(Iterable[Block], self.layers), arguments, strict=True):
            if checkpoint_layers:
                x = checkpoint(self._dual_again, backends.requested(), layer, x, *given, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = layer.dual(x, *given)
        return split(self._final_norm.dual(self.norm, x[:, :, start:]))

    def _dual_again(self, backend: str | None, layer: Block, x: Tensor, *given: Any) -> Tensor:
        """A layer's dual form, which may run again, out of the caller's ``with`` blocks, by the same backend."""
        with backends.use_backend(backend), self.recompute_context():
            return layer.dual(x, *given)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``capacity`` positions."""
        weight = cast(Tensor, self.norm.weight)
        shape = (batch, self.config.kv_heads, capacity, self.config.head_size)
        keys, values = ([weight.new_zeros(shape) for _ in self.layers] for _ in range(2))
        return KVCache(keys, values, torch.zeros(batch, dtype=torch.int64, device=weight.device), 0)

    @torch.no_grad()
    def prefill(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        """Appends ``T`` positions to every row of ``cache``; their hidden states ``[B, T, D]``, without a graph.

        Raises:
            ArgumentError: if the rows of ``cache`` have different lengths, or have no room left.
        """
        x = self._check("Decoder.prefill", inputs_embeds, 0)
        first, rows = cache.common_length("Decoder.prefill"), x.shape[1]
        cache.check_room("Decoder.prefill", x, first + rows)
        x, rope = self._place("Decoder.prefill", x, first), self._rope(first, first + rows, x)
        return self._append(x, rope, cache, slice(first, first + rows), None)

    @torch.no_grad()
    def step(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        """Appends one position to every row of ``cache``, each at its own length; ``[B, 1, D]``, without a graph."""
        x = self._check("Decoder.step", inputs_embeds, 0)
        if x.shape[1] != 1:
            Checker("Decoder.step").fail("inputs_embeds", "one position a row, [B, 1, D]", list(x.shape))
        cache.check_room("Decoder.step", x, cache.longest + 1)
        positions = cache.lengths.unsqueeze(-1)
        if self.embed_positions is None:
            rope = tables(positions, self._frequencies(x.device), x.dtype)
            return self._append(x, rope, cache, cache.lengths, cache.lengths + 1)
        self._check_learned("Decoder.step", cache.longest + 1)
        return self._append(x + self.embed_positions(positions), None, cache, cache.lengths, cache.lengths + 1)

    def _append(self, x: Tensor, rope: Rope | None, cache: KVCache, at: slice | Tensor,
                seqlens: Tensor | None) -> Tensor:
        rows = x.shape[1]
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, LayerCache(cache.keys[index], cache.values[index], at, seqlens))
        cache.advance(rows)
        return self._final_norm.forward(self.norm, x)

    def _place(self, op: str, x: Tensor, first: int) -> Tensor:
        """Adds learned positions, ``first`` and on, to the rows of ``x [B, S, D]``, where the decoder has them."""
        if self.embed_positions is None:
            return x
        length = first + x.shape[1]
        self._check_learned(op, length)
        return x + self.embed_positions(torch.arange(first, length, device=x.device))

    @staticmethod
    def _span(x: Tensor, context: ContextRows | None) -> tuple[int, int]:
        """The positions of the rows of ``x`` and of ``context`` behind it."""
        return 0, x.shape[1] + (0 if context is None else context.residual.shape[1])

    def _rope(self, first: int, end: int, x: Tensor) -> Rope | None:
        """The rotary tables of positions ``first .. end - 1``; ``None`` where positions are learned.

        They are made once for each device and dtype, and grow when needed.
        """
        if self.embed_positions is not None:
            return None
        source = None if self.rotary_emb is None else cast(Tensor, self.rotary_emb.inv_freq)
        made_of, rope = self._tables.get((x.device, x.dtype), (None, None))
        if rope is None or made_of is not source or rope[0].shape[0] < end:
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(max(64, 1 << (end - 1).bit_length()), device=x.device)
                rope = tables(positions, self._frequencies(x.device), x.dtype)
            if not torch._C._functorch.is_functorch_wrapped_tensor(rope[0]):  # it must not outlive its transform
                self._tables[x.device, x.dtype] = source, rope
        return rope[0][first:end], rope[1][first:end]

    def _frequencies(self, device: torch.device) -> Tensor:
        if self.rotary_emb is None:
            return inverse_frequencies(self.config, device)
        return cast(Tensor, self.rotary_emb.inv_freq).to(device)

    def _check_learned(self, op: str, length: int) -> None:
        rows = cast(int, self.config.learned_positions)
        if length > rows:
            Checker(op).fail("inputs_embeds", f"at most the {rows} positions that have learned embeddings", length,
                             "prefix rows count too")

    def _check(self, op: str, inputs_embeds: Tensor, start: int, context: ContextRows | None = None) -> Tensor:
        check = Checker(op)
        check.tensor("the decoder's weight", self.norm.weight, ("D",))
        check.tensor("inputs_embeds", inputs_embeds, ("B", "S", "D"))
        if context is not None:
            check.tensor("context", context.residual, ("B", "T", "D"))
            if context.first != inputs_embeds.shape[1]:
                check.fail("context", f"rows projected for first={inputs_embeds.shape[1]}, behind inputs_embeds",
                           f"first={context.first}", "project_context again, for a prefix of this length")
        _, rows = self._span(inputs_embeds, context)
        if not isinstance(start, int) or not 0 <= start <= rows:
            check.fail("start", f"a row in 0..{rows}", start)
        if self.borrowed_dropout and any(layer.source.training for layer in cast(Iterable[Block], self.layers)):
            check.fail("training", "a model in eval mode, or without dropout", self.borrowed_dropout,
                       "call model.eval(), which keeps gradients, or load it with these set to 0.0, or use the model's "
                       "own forward with attn_implementation='gradmem'")
        return inputs_embeds
