"""From memory vectors to the prefix a decoder reads, and the WRITE loss of a context behind that prefix."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gradmem_kernels.checks import FLOAT_DTYPES, Checker, check_values
from gradmem_kernels.decoder import ContextRows, Decoder, drops, footprint, linear_dual
from gradmem_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_dual
from gradmem_kernels.recompute import RECOMPUTE

__all__ = ["Prefix", "PrefixLoss"]

#: Of the tensors of a memory; the last two are the fast weights of a prefix that is per sample.
NAMES = ("memory", "weight", "bias")


class Prefix(nn.Module):
    """``[start; projection(memory); end]``: learned control tokens around the, optionally projected, memory.

    Args:
        hidden_size: width ``D`` of a memory vector and of an input embedding.
        control_tokens: number of learned vectors on each side, drawn from N(0, 0.02).
        projection: whether a linear map with bias, the identity at first, is applied to each memory vector.
        per_sample: with ``projection``, whether each sample has weights of its own, which are part of the memory:
            ``projection`` then is what they are at first.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: for an argument of another type or value, or ``per_sample`` without ``projection``.
    """

    def __init__(self, hidden_size: int, *, control_tokens: int = 0, projection: bool = False, per_sample: bool = False,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check = Checker("Prefix")
        check.integer("hidden_size", hidden_size, minimum=1)
        check.integer("control_tokens", control_tokens, minimum=0)
        for name, value in (("projection", projection), ("per_sample", per_sample)):
            check.boolean(name, value)
        if per_sample and not projection:
            check.fail("per_sample", "False without projection", True)
        self.per_sample = per_sample
        self.start: nn.Parameter | None = None
        self.end: nn.Parameter | None = None
        self.projection: nn.Linear | None = None
        if control_tokens:
            self.start, self.end = (
                nn.Parameter(torch.randn(control_tokens, hidden_size, device=device, dtype=dtype) * 0.02)
                for _ in range(2))
        if projection:
            self.projection = nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)
            nn.init.eye_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def length(self, memory_tokens: int) -> int:
        """The number of prefix rows that ``memory_tokens`` memory vectors become."""
        return memory_tokens + (0 if self.start is None else 2 * self.start.shape[0])

    def fast_weights(self, batch: int) -> tuple[Tensor, ...]:
        """What belongs to a memory besides its vectors, at first: ``weight [B, D, D], bias [B, D]`` or nothing."""
        if not self.per_sample or self.projection is None:
            return ()
        weight, bias = self.projection.weight, self.projection.bias
        return weight.expand(batch, -1, -1), bias.expand(batch, -1)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Those that all samples read: not a projection of which each has its own."""
        return (p for name, p in self.named_parameters() if not self.per_sample or not name.startswith("projection."))

    def projected(self, memory: Tensor, *fast: Tensor) -> Tensor:
        """``[B, m, D] -> [B, m, D]``, by the ``fast`` weights of each sample where the prefix is per sample."""
        self._check_fast(len(fast))
        if fast:
            weight, bias = fast
            return torch.baddbmm(bias.unsqueeze(1), memory, weight.mT)
        return memory if self.projection is None else self.projection(memory)

    def forward(self, memory: Tensor, *fast: Tensor) -> Tensor:
        """``[B, m, D] -> [B, P, D]``; ``fast``: ``weight [B, D, D], bias [B, D]`` where the prefix is per sample."""
        rows = self.projected(memory, *fast)
        if self.start is None or self.end is None:
            return rows
        return torch.cat([self.start.expand(len(rows), -1, -1), rows, self.end.expand(len(rows), -1, -1)], 1)

    def dual(self, *tensors: Tensor) -> Tensor:
        """The prefix and its tangent, stacked: ``[2, B, P, D]``; the arguments of :meth:`forward`, then tangents."""
        half = len(tensors) // 2
        self._check_fast(half - 1)
        memory, memory_t = tensors[0], tensors[half]
        if half > 1:
            (weight, _), (weight_t, bias_t) = tensors[1:half], tensors[half + 1 :]
            # rows = M W' + b,  rows_t = M_t W' + M W_t' + b_t
            rows_t = torch.baddbmm(torch.baddbmm(bias_t.unsqueeze(1), memory, weight_t.mT), memory_t, weight.mT)
            rows = torch.stack([self.projected(*tensors[:half]), rows_t])
        else:
            rows = torch.stack([memory, memory_t])
            if self.projection is not None:
                rows = linear_dual(self.projection, rows)
        if self.start is None or self.end is None:
            return rows
        start, end = (torch.stack([t, torch.zeros_like(t)]).unsqueeze(1).expand(-1, rows.shape[1], -1, -1)
                      for t in (self.start, self.end))
        return torch.cat([start, rows, end], 2)

    def _check_fast(self, count: int) -> None:
        if count != 2 * self.per_sample:
            Checker("Prefix").fail("fast", "weight and bias of each sample" if self.per_sample
                                   else "nothing, as the prefix is not per sample", f"{count} tensor(s)")


class PrefixLoss:
    """The WRITE loss: mean cross-entropy of a context read from ``[prefix(memory); context]``, sample by sample.

    The first context token is predicted from the last prefix row. It is a ``loss_fn`` with a dual form for
    :func:`gradmem_kernels.write`.

    Args:
        decoder: reads the embeddings.
        prefix: makes the prefix rows of the memory.
        context_embeds: ``[B, S, D]``, S >= 1; may be a non-leaf that requires grad (a trained embedding table).
        labels: ``[B, S]`` int64, the context's own tokens; -100 where padded (a right-padded row changes nothing).
        head_weight: ``[V, D]``, the output head.
        head_bias: ``[V]``.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit, an empty context, labels out of range.
    """

    def __init__(self, decoder: Decoder, prefix: Prefix, context_embeds: Tensor, labels: Tensor, head_weight: Tensor,
                 *, head_bias: Tensor | None = None) -> None:
        check = Checker("PrefixLoss")
        check.tensor("the decoder's weight", decoder.norm.weight, ("D",))
        check.tensor("context_embeds", context_embeds, ("B", "S", "D"))
        check.tensor("labels", labels, ("B", "S"), dtypes=(torch.int64,))
        if labels.shape[1] == 0:
            check.fail("context_embeds", "at least one context token", "an empty context")
        check.tensor("head_weight", head_weight, ("V", "D"))
        if head_bias is not None:
            check.tensor("head_bias", head_bias, ("V",))
        if check_values(labels) and labels.numel():
            low, high = int(labels.masked_fill(labels == -100, 0).min()), int(labels.max())
            if low < 0 or high >= check.sizes["V"]:
                check.fail("labels", f"values in 0..{check.sizes['V'] - 1} (the rows of head_weight), or -100",
                           f"{low}..{high}")
        self.decoder, self.prefix, self.labels = decoder, prefix, _usable(labels)
        self.context_embeds, self.head_weight = _usable(context_embeds), _usable(head_weight)
        self.head_bias = None if head_bias is None else _usable(head_bias)
        self._context: ContextRows | None = None

    @property
    def params(self) -> tuple[Tensor, ...]:
        """Every tensor that requires grad and that the loss reads."""
        context = (self.context_embeds,) if self._context is None else self._context.tensors
        tensors = (*context, self.head_weight, self.head_bias, *self.prefix.shared_parameters(),
                   *self.decoder.parameters())
        return tuple({id(t): t for t in tensors if t is not None and t.requires_grad}.values())

    @property
    def random(self) -> bool:
        """Whether evaluations draw random numbers: an adapter's dropout in training, which the dual form refuses."""
        return drops(self.decoder) > 0

    def footprint(self, *memory: Tensor, steps: int, recompute: str) -> int:
        """Bytes that ``steps`` steps of WRITE from ``memory`` and their outer backward take, about, beyond the ``M_k``.

        Args:
            memory: ``[B, m, D]``, and the fast weights of a prefix that is per sample.
            steps: number of steps K.
            recompute: ``"none"``, ``"step"`` or ``"layer"``, as in :func:`gradmem_kernels.write`.

        Source: docs/write.md.
        """
        check = self._check("PrefixLoss.footprint", *memory)
        check.integer("steps", steps, minimum=0)
        if recompute not in RECOMPUTE:
            check.fail("recompute", f"one of {', '.join(RECOMPUTE)}", repr(recompute))
        batch, tokens, _ = self.context_embeds.shape
        activations = footprint(
            self.decoder.config, recompute, batch=batch, prefix_rows=self.prefix.length(memory[0].shape[1]),
            context_rows=tokens - 1, steps=steps, element_size=self.context_embeds.element_size(),
            trained=any(p.requires_grad for p in self.decoder.parameters()))
        # of one step, and their sum over the later ones
        gradients = sum(p.numel() * p.element_size() for p in self.params if p.is_leaf) * min(steps, 2)
        return activations + gradients

    def prepared(self, *memory: Tensor) -> PrefixLoss:
        """The same loss of memories like this one, for several evaluations while parameters stay what they are.

        What the first layer makes of the context, which no memory changes, is computed here, once.
        """
        self._check("PrefixLoss", *memory)
        twin, rows = copy.copy(self), self.context_embeds[:, :-1]
        if rows.shape[1]:
            twin._context = self.decoder.project_context(rows, first=self.prefix.length(memory[0].shape[1]))
        return twin

    def detached(self) -> PrefixLoss:
        """The same loss with leaves in the place of its own non-leaf tensors; its ``params`` keep their order."""
        twin = copy.copy(self)
        for name in ("context_embeds", "head_weight", "head_bias"):
            t = getattr(self, name)
            if t is not None:
                setattr(twin, name, _leaf(t))
        if self._context is not None:
            residual, q, k, v = map(_leaf, self._context.tensors)
            twin._context = ContextRows(residual, q, k, v, self._context.first)
        return twin

    def __call__(self, *memory: Tensor) -> Tensor:
        """``[B, m, D] -> [B]``, in nats a token; a prefix that is per sample has ``[B, D, D], [B, D]`` besides."""
        self._check("PrefixLoss", *memory)
        prefix = self._cast(self.prefix(*map(self._cast, memory)))
        rows = prefix if self._context is not None else torch.cat([prefix, self.context_embeds[:, :-1]], 1)
        hidden = self.decoder(rows, start=prefix.shape[1] - 1, context=self._context)
        return linear_cross_entropy(hidden, self.head_weight, self.labels, bias=self.head_bias)

    def dual(self, *tensors: Tensor, checkpoint_layers: bool = False,
             cotangents: tuple[Tensor | None, Tensor | None] = (None, None)) -> tuple[Tensor, Tensor]:
        """The loss and its tangent, each ``[B]``, of the memory's tensors and, behind them, as many tangents.

        A tangent that is ``None`` is a known zero.
        ``cotangents``: those of the two, each ``[B]``, if they are known beforehand; ``None`` beside a given one is a
        zero. The head's products are then done in one sweep over the logits.
        """
        memory, tangents = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        check = self._check("PrefixLoss.dual", *memory)
        if len(tangents) != len(memory):
            check.fail("tangents", f"{len(memory)}, one of each tensor of the memory", len(tangents))
        for name, t, t_t in zip(NAMES, memory, tangents, strict=False):
            check.tangent(f"{name}_t", t_t, t)
        zeros = (torch.zeros_like(t) if t_t is None else t_t for t, t_t in zip(memory, tangents, strict=True))
        prefix = self._cast(self.prefix.dual(*map(self._cast, (*memory, *zeros))))
        rows, rows_t = prefix.unbind()
        if self._context is None:
            tail = self.context_embeds[:, :-1]
            rows, rows_t = torch.cat([rows, tail], 1), torch.cat([rows_t, torch.zeros_like(tail)], 1)
        hidden, hidden_t = self.decoder.dual(rows, rows_t, start=prefix.shape[2] - 1, context=self._context,
                                             checkpoint_layers=checkpoint_layers)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss_bar, loss_t_bar = (None if g is None else g.to(dtype) for g in cotangents)
        return linear_cross_entropy_dual(hidden, self.head_weight, self.labels, hidden_t, bias=self.head_bias,
                                         loss_bar=loss_bar, loss_t_bar=loss_t_bar)

    def _check(self, op: str, *memory: Tensor) -> Checker:
        check = Checker(op)
        check.tensor("context_embeds", self.context_embeds, ("B", "S", "D"))  # the memory has its device
        count = 3 if self.prefix.per_sample else 1
        if len(memory) != count:
            check.fail("memory", f"{count} tensor(s): {', '.join(NAMES[:count])}", len(memory))
        for name, dims, t in zip(NAMES, (("B", "m", "D"), ("B", "D", "D"), ("B", "D")), memory, strict=False):
            check.tensor(name, t, dims, dtypes=FLOAT_DTYPES)
        return check

    def _cast(self, t: Tensor) -> Tensor:
        """The memory keeps its own dtype, autocast's products have another; the decoder reads that of the embeddings.
        """
        return t.to(self.context_embeds.dtype)


def _leaf(t: Tensor) -> Tensor:
    return t if t.is_leaf else t.detach().requires_grad_(t.requires_grad)


def _usable(t: Tensor) -> Tensor:
    """``t``, or a copy that the inner gradient can use where ``t`` was made in inference mode."""
    if not t.is_inference():
        return t
    with torch.inference_mode(False):
        return t.clone()
