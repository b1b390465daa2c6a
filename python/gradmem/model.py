"""GradMem: a language model that writes contexts into memory vectors by gradient descent, and reads them.

Kuratov et al., arXiv 2603.13875. WRITE descends, from a learned initial memory, the loss of the context read from
``[prefix(memory); context]``; READ predicts the query and its answer from ``[prefix(memory); query]``, with the
context gone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmem.adapters import ADAPTER, freeze
from gradmem.config import GradMemConfig
from gradmem.inputs import check_contexts, check_count, check_labels, check_lengths, check_queries
from gradmem.lm import Backbone
from gradmem.memory import Memory, Provenance, context_hash
from gradmem.pretrained import Chosen, choose_backbone
from gradmem.ranks import mean_over_ranks
from gradmem.tasks.batch import IGNORE
from gradmem_kernels import Prefix, WriteOutput, resolve_recompute, write
from gradmem_kernels.checks import Checker
from gradmem_kernels.ranges import named_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GradMem", "GradMemOutput"]


@dataclass(frozen=True, eq=False)
class GradMemOutput:
    """What :class:`GradMem` returns.

    Attributes:
        loss: mean READ cross-entropy over the labels (nats), plus the weighted inner loss; ``None`` without labels.
        logits: ``[B, T, V]`` or ``[B, n, T, V]``; ``logits[..., t, :]`` predicts query token ``t``.
        inner_losses: ``[steps, B]``, the WRITE loss before each step.
        grad_norms: ``[steps, B]``, norms of the inner gradients before clipping, detached.
        memory: ``[B, m, D]``, as written; with a projection for each sample, as projected.
    """

    loss: Tensor | None
    logits: Tensor
    inner_losses: Tensor
    grad_norms: Tensor
    memory: Tensor


class GradMem(nn.Module):
    """GradMem around ``backbone``, a :class:`gradmem.CausalLM` or :class:`gradmem.TransformersLM`.

    Args:
        backbone: the language model; READ and WRITE use the same weights.
        config: the memory and how it is written.
    """

    def __init__(self, backbone: Backbone, config: GradMemConfig) -> None:
        super().__init__()
        if config.recompute not in backbone.RECOMPUTE:
            config.fail("recompute", f"one of {', '.join(backbone.RECOMPUTE)} with a model's own forward",
                        config.recompute, "checkpoint its layers with model.gradient_checkpointing_enable()")
        if config.freeze_backbone:
            freeze(backbone)
        if config.write_lora_rank:
            backbone.adapt(config)
        self.backbone = backbone
        self.config = config
        #: how a model of transformers is run, where from_pretrained_backbone decided it
        self.chosen: Chosen | None = None
        #: the processes whose batches are parts of one, where gradmem.parallel has set it
        self.ranks: ProcessGroup | None = None
        table = backbone.embed_tokens.weight
        width, device, dtype = table.shape[1], table.device, table.dtype
        self.memory_init = nn.Parameter(
            torch.randn(config.memory_tokens, width, device=device, dtype=dtype) * config.memory_init_std)
        self.write_prefix = Prefix(width, control_tokens=config.control_tokens, device=device, dtype=dtype,
                                   projection=config.memory_projection != "none",
                                   per_sample=config.memory_projection == "per_sample")
        self.read_prefix = Prefix(width, control_tokens=config.control_tokens, device=device, dtype=dtype)
        if config.memory_projection == "shared":
            self.read_prefix.projection = self.write_prefix.projection
        self.write_head: nn.Parameter | None = None
        if config.write_head:
            self.write_head = nn.Parameter(backbone.head_weight.detach().clone())
        self.inner_lr_scale: nn.Parameter | None = None
        if config.learn_inner_lr != "none":
            # of the shapes that write takes: [steps], [1, m, 1], [steps, 1, m, 1]
            rows = () if config.learn_inner_lr == "step" else (1, config.memory_tokens, 1)
            each = () if config.learn_inner_lr == "token" else (config.steps,)
            self.inner_lr_scale = nn.Parameter(torch.ones(*each, *rows, device=device, dtype=dtype))
        self._fingerprint: tuple[tuple[tuple[int, int], ...], str] | None = None

    @classmethod
    def from_pretrained_backbone(cls, model: Any, config: GradMemConfig, *, forward: str = "auto",
                                 attn_implementation: str = "gradmem") -> GradMem:
        """GradMem around a causal language model of ``transformers``, of any architecture.

        Args:
            model: the model, whose parameters are used in place, or the name or path of one (loaded in float32).
            config: the memory and how it is written.
            forward: ``"auto"``: the fused decoder where it serves the model exactly, in training too; else the model's
                own forward. ``"fused"`` and ``"own"``: that one. The attribute ``chosen`` of what is returned tells
                which it is and why, as does, once, the logger ``gradmem``.
            attn_implementation: for a model's own forward, the attention that its layers run.

        Raises:
            ArgumentError: for a model that cannot be served so, with the field that stands against it.
            HubError, MissingExtraError: if it cannot be loaded.
        """
        backbone, chosen = choose_backbone(model, config, forward, attn_implementation)
        made = cls(backbone, config)
        made.chosen = chosen
        return made

    # a compiled model around it breaks its graph here: Dynamo cannot trace the derivatives within WRITE
    @torch.compiler.disable
    def forward(self, context_input_ids: Tensor, query_input_ids: Tensor, labels: Tensor | None = None,
                context_lengths: Tensor | None = None) -> GradMemOutput:
        """Writes each context and reads its queries, differentiable through both.

        Args:
            context_input_ids: ``[B, S]`` int64, right-padded.
            query_input_ids: ``[B, T]`` int64, or ``[B, n, T]`` for ``n`` queries of each memory; in training each
                query is followed by its answer.
            labels: of the query's shape, int64: the token at each position that counts for the loss, else -100.
            context_lengths: ``[B]`` valid tokens of each context; default: all.

        Returns:
            A :class:`GradMemOutput`.

        Raises:
            ArgumentError: for an argument of another type, shape, dtype or device, ids or labels out of range, an
                empty context or query.
        """
        check = self._check_context("GradMem", "context_input_ids", context_input_ids, context_lengths)
        check_queries(check, "query_input_ids", query_input_ids, self.vocab_size)
        if labels is not None:
            check_labels(check, labels, query_input_ids, self.vocab_size)
        written = self._write(context_input_ids, context_lengths, self.config.steps)
        logits = self._logits(written.memory, query_input_ids[..., :-1])
        loss = None if labels is None else self._loss(logits, labels, written.losses)
        return GradMemOutput(loss, logits, written.losses, written.grad_norms, written.memory)

    def write(self, context_ids: Tensor, *, context_lengths: Tensor | None = None, steps: int | None = None) -> Memory:
        """Writes each context into a memory. Under ``no_grad`` or ``inference_mode`` nothing else is kept.

        The token ids are copied to the host for the memory's provenance.

        Args:
            context_ids: ``[N, S]`` int64, right-padded.
            context_lengths: ``[N]`` valid tokens of each context; default: all.
            steps: inner steps, >= 0; default: those of the configuration. Steps beyond these use the last learned
                learning rate.

        Returns:
            The ``N`` memories.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        return self._written(lambda *args: self._write(*args).memory, context_ids, context_lengths, steps)

    def _written(self, run: Callable[[Tensor, Tensor | None, int], Tensor], context_ids: Tensor,
                 context_lengths: Tensor | None, steps: int | None) -> Memory:
        """What ``run`` writes for arguments that are checked, with its provenance."""
        check = self._check_context("GradMem.write", "context_ids", context_ids, context_lengths)
        steps = self.config.steps if steps is None else steps
        check_count(check, "steps", steps, 0)
        memory = run(context_ids, context_lengths, steps)
        rows = context_ids.tolist()
        lengths = [len(row) for row in rows] if context_lengths is None else context_lengths.tolist()
        rates, model, rule = self.inner_lrs(steps), self.fingerprint(), self.config.rule_name()
        return Memory(memory, tuple(Provenance(model, steps, rates, context_hash(row[:n]), rule)
                                    for row, n in zip(rows, lengths, strict=True)), self)

    def read(self, memory: Memory, query_ids: Tensor, *, next_token: bool = False) -> Tensor:
        """Logits of the query's tokens, ``[N, T, V]`` (or ``[N, n, T, V]``): row ``t`` predicts query token ``t``.

        Args:
            memory: ``N`` memories.
            query_ids: ``[N, T]`` int64, or ``[N, n, T]`` for ``n`` queries of each memory.
            next_token: adds a row ``T``, which predicts the token after the query; then ``T`` may be 0.

        Raises:
            ArgumentError: for an argument of another type, shape, dtype or device, or ids out of range.
        """
        check = self._check_memory("GradMem.read", memory)
        check_queries(check, "query_ids", query_ids, self.vocab_size, empty=next_token)
        return self._logits(_tracked(memory.tensor), query_ids if next_token else query_ids[..., :-1])

    @torch.no_grad()
    def prompt_embeds(self, memory: Memory, query_ids: Tensor) -> Tensor:
        """Input embeddings from which the backbone alone reads: ``[read prefix of the memory; query]``.

        They are what ``transformers`` takes as ``inputs_embeds``, vLLM as ``prompt_embeds`` and SGLang as
        ``input_embeds``, as long as these serve the backbone's weights. Positions count from the first row; position
        embeddings are the server's matter.

        Args:
            memory: ``N`` memories.
            query_ids: ``[N, T]`` int64, or ``[N, n, T]`` for ``n`` queries of each memory; ``T`` may be 0.

        Returns:
            ``[N, P + T, D]`` or ``[N, n, P + T, D]``, of the model's dtype, where ``P`` is ``m`` and the control tokens
            of READ.

        Raises:
            ArgumentError: for an argument of another type, shape, dtype or device, or ids out of range.
        """
        check = self._check_memory("GradMem.prompt_embeds", memory)
        check_queries(check, "query_ids", query_ids, self.vocab_size, empty=True)
        rows, _ = self._rows(memory.tensor, query_ids)
        return rows.view(*query_ids.shape[:-1], *rows.shape[1:])

    @torch.no_grad()
    def generate(self, memory: Memory, query_ids: Tensor, *, max_new_tokens: int, query_lengths: Tensor | None = None,
                 eos_token_id: int | None = None) -> Tensor:
        """Greedy continuations of the queries, ``[N, max_new_tokens]`` (or ``[N, n, max_new_tokens]``) int64.

        The keys and values of each memory's prefix are computed once for all its queries.

        Args:
            memory: ``N`` memories.
            query_ids: ``[N, T]`` int64, or ``[N, n, T]`` for ``n`` queries of each memory, right-padded.
            max_new_tokens: tokens to generate, >= 1.
            query_lengths: ``[N]`` or ``[N, n]`` valid tokens of each query, >= 0; default: all.
            eos_token_id: ends a continuation, which is then filled up with it.

        Raises:
            ArgumentError: for an argument of another type, shape, dtype or device, ids or lengths out of range.
        """
        check = self._check_memory("GradMem.generate", memory)
        check_queries(check, "query_ids", query_ids, self.vocab_size, empty=True)
        check_count(check, "max_new_tokens", max_new_tokens, 1)
        if query_lengths is None:
            query_lengths = torch.full(query_ids.shape[:-1], query_ids.shape[-1], device=query_ids.device)
        check_lengths(check, "query_lengths", query_lengths, ("B", "n")[: query_ids.ndim - 1], query_ids.shape[-1],
                      shortest=0)
        if eos_token_id is not None:
            check_count(check, "eos_token_id", eos_token_id, 0)
        rows = query_ids.unsqueeze(1) if query_ids.ndim == 2 else query_ids
        with named_range("read generate"):
            ids = self.backbone.greedy(self._prefix(memory.tensor), rows, query_lengths.flatten(), max_new_tokens,
                                       eos_token_id)
        return ids.view(*query_ids.shape[:-1], max_new_tokens)

    def resolve_recompute(self, context_ids: Tensor) -> str:
        """What ``recompute="auto"`` stands for with contexts like these and the memory that is free now.

        See :func:`gradmem_kernels.resolve_recompute`. :class:`gradmem.training.Trainer` asks once, for the longest
        contexts, and records the answer; a model that is used by itself asks in every call.

        Args:
            context_ids: ``[B, S]`` int64.
        """
        self._check_context("GradMem.resolve_recompute", "context_ids", context_ids, None)
        memory = self._initial(len(context_ids))
        return resolve_recompute(self._write_loss(_tracked(context_ids), None), *memory, steps=self.config.steps)

    @property
    def vocab_size(self) -> int:
        return self.backbone.embed_tokens.weight.shape[0]

    def inner_lrs(self, steps: int) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
        """The learning rate of each of ``steps`` inner steps, where it is learned for each memory vector those of all.
        """
        lr = self._inner_lr(steps)
        if not isinstance(lr, Tensor):
            return (lr,) * steps
        if lr.ndim == 1:
            return tuple(lr.tolist())
        return tuple(map(tuple, lr.expand(steps, 1, -1, 1).flatten(1).tolist()))

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every parameter that READ uses, dtype included, in hex.

        It is computed again when a parameter has changed in place (by an optimizer, by loading) or was replaced; a
        change that autograd does not count goes unnoticed: through ``.data``, or by PyTorch's fused optimizers, unless
        ``torch.autograd.graph.increment_version`` tells it, as :func:`gradmem.step.meta_step` does.
        """
        weights = list(self._read_weights())
        state = tuple((weight.data_ptr(), weight._version) for _, weight in weights)
        if self._fingerprint is None or self._fingerprint[0] != state:
            digest = hashlib.sha256(json.dumps({
                "backbone": self.backbone.config.to_dict(), "memory_tokens": self.config.memory_tokens}).encode())
            for name, weight in weights:
                digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
                digest.update(weight_bytes(weight))
            self._fingerprint = state, digest.hexdigest()
        return self._fingerprint[1]

    def _read_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.backbone.named_parameters("backbone"):
            if ADAPTER not in name.split("."):
                yield name, weight
        yield from self.read_prefix.named_parameters("read_prefix")

    def _write(self, ids: Tensor, lengths: Tensor | None, steps: int) -> WriteOutput:
        cfg, outer_grad = self.config, torch.is_grad_enabled()
        # inference tensors cannot take part in the inner gradient
        with torch.inference_mode(False), torch.set_grad_enabled(outer_grad):
            with named_range("write prepare"):
                loss_fn = self._write_loss(_tracked(ids), lengths)
                memory = self._initial(len(ids))
            last = None if cfg.second_order_steps is None else min(cfg.second_order_steps, steps)
            out = write(loss_fn, memory, steps=steps, update=cfg.update_rule(self._inner_lr(steps)), order=cfg.order,
                        second_order_steps=last, recompute=cfg.recompute)
            # a projection of each sample's own is used up here: READ gets the same rows
            return out._replace(memory=out.memory[0] if len(memory) == 1 else self.write_prefix.projected(*out.memory))

    def _initial(self, batch: int) -> tuple[Tensor, ...]:
        """What WRITE starts from: the memory, and the projection of each sample, where it has one."""
        memory = self.memory_init.expand(batch, -1, -1)
        return tuple(map(_at_least_float32, (memory, *self.write_prefix.fast_weights(batch))))

    def _write_loss(self, ids: Tensor, lengths: Tensor | None) -> Callable[..., Tensor]:
        labels = ids
        if lengths is not None:
            padding = torch.arange(ids.shape[1], device=ids.device) >= lengths.unsqueeze(1)
            labels = ids.masked_fill(padding, IGNORE)
        second = self.config.order == "second" and torch.is_grad_enabled()
        return self.backbone.write_loss(self.write_prefix, ids, labels, self.write_head, second_order=second)

    def _inner_lr(self, steps: int) -> float | Tensor:
        if self.inner_lr_scale is None:
            return self.config.inner_lr
        lr = self.config.inner_lr * _at_least_float32(self.inner_lr_scale)
        if self.config.learn_inner_lr == "token":
            return lr
        return lr[torch.arange(steps, device=lr.device).clamp(max=self.config.steps - 1)]

    def _prefix(self, memory: Tensor) -> Tensor:
        return self.read_prefix(memory.to(self.memory_init.dtype))

    def _rows(self, memory: Tensor, query_ids: Tensor) -> tuple[Tensor, int]:
        """Input rows of each query behind its memory's prefix, ``[N * n, P + T, D]``, and ``P``."""
        prefix, embeds = self._prefix(memory), self.backbone.embed_tokens(_tracked(query_ids))
        if query_ids.ndim == 3:
            prefix = prefix.repeat_interleave(query_ids.shape[1], 0)
        return torch.cat([prefix, embeds.flatten(0, -3)], 1), prefix.shape[1]

    def _logits(self, memory: Tensor, query_ids: Tensor) -> Tensor:
        """Logits of each query token and of the one after the last: ``[..., T + 1, V]`` for ``query_ids [..., T]``."""
        with named_range("read"):
            rows, first = self._rows(memory, query_ids)
            logits = self.backbone.logits(rows, first - 1)
            return logits.view(*query_ids.shape[:-1], query_ids.shape[-1] + 1, -1)

    def _loss(self, logits: Tensor, labels: Tensor, inner_losses: Tensor) -> Tensor:
        total = F.cross_entropy(_at_least_float32(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORE,
                                reduction="sum")
        loss = mean_over_ranks(total, (labels != IGNORE).sum(), self.ranks)
        if self.config.inner_loss_weight and len(inner_losses):
            inner = mean_over_ranks(inner_losses[-1].sum(), inner_losses.shape[1], self.ranks)
            loss = loss + self.config.inner_loss_weight * inner
        return loss

    def _check_context(self, op: str, name: str, ids: Tensor, lengths: Tensor | None) -> Checker:
        check = self._checker(op)
        check_contexts(check, name, ids, lengths, self.vocab_size)
        return check

    def _check_memory(self, op: str, memory: Memory) -> Checker:
        check = self._checker(op)
        if not isinstance(memory, Memory):
            check.fail("memory", "a gradmem.Memory", type(memory).__name__, "GradMem.write makes one")
        check.tensor("memory", memory.tensor, ("B", "m", "D"), dtypes=(memory.tensor.dtype,))
        return check

    def _checker(self, op: str) -> Checker:
        check = Checker(op)
        check.tensor("the model", self.memory_init, ("m", "D"))  # what follows has its device
        return check


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def weight_bytes(weight: Tensor) -> memoryview:
    """Of a copy: numpy forbids for ever that the storage it looks at is freed, as that of sharded weights is."""
    return weight.detach().to("cpu", copy=True).contiguous().view(torch.uint8).numpy().data


def _tracked(t: Tensor) -> Tensor:
    """``t``, or a copy that autograd can use where ``t`` was made in inference mode."""
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t
