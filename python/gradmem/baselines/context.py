"""The upper bound: a transformer that reads the query with the whole context before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmem import generation
from gradmem.baselines.rows import join
from gradmem.config import GradMemConfig
from gradmem.inputs import check_contexts, check_count, check_labels, check_lengths, check_queries
from gradmem.lm import Backbone
from gradmem.model import GradMemOutput
from gradmem.ranks import mean_over_ranks
from gradmem.tasks.batch import IGNORE
from gradmem_kernels.checks import Checker
from gradmem_kernels.ranges import named_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FullContext", "HeldContext"]


@dataclass(frozen=True, eq=False)
class HeldContext:
    """What stands in the place of a memory: the contexts themselves, ``ids [N, S]``, ``lengths [N]``."""

    ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.ids)


class FullContext(nn.Module):
    """A plain language model behind the interface of :class:`gradmem.GradMem`: "WRITE" keeps the context, READ
    predicts from ``[context; query]`` in one pass.

    Args:
        backbone: the language model; its parameters are all there are.
        config: ``steps`` must be 0; nothing else of it is read.

    Raises:
        ArgumentError: for another number of steps, here and in ``write``.
    """

    def __init__(self, backbone: Backbone, config: GradMemConfig) -> None:
        super().__init__()
        if config.steps:
            config.fail("steps", "0 for a writer without gradient steps", config.steps)
        self.backbone, self.config = backbone, config
        #: as in GradMem
        self.ranks: ProcessGroup | None = None

    def forward(self, context_input_ids: Tensor, query_input_ids: Tensor, labels: Tensor | None = None,
                context_lengths: Tensor | None = None) -> GradMemOutput:
        """Reads the queries with their contexts.

        Args, errors and result are those of :meth:`gradmem.GradMem.forward`; the memory is ``[B, 0, D]``.
        """
        check = self._checker("FullContext")
        check_contexts(check, "context_input_ids", context_input_ids, context_lengths, self.vocab_size)
        check_queries(check, "query_input_ids", query_input_ids, self.vocab_size)
        if labels is not None:
            check_labels(check, labels, query_input_ids, self.vocab_size)
        logits = self._logits(context_input_ids, context_lengths, query_input_ids[..., :-1])
        loss = None
        if labels is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
            loss = mean_over_ranks(total, (labels != IGNORE).sum(), self.ranks)
        table, size = self.backbone.embed_tokens.weight, len(context_input_ids)
        nothing = table.new_zeros(0, size)
        return GradMemOutput(loss, logits, nothing, nothing, table.new_zeros(size, 0, table.shape[1]))

    def write(self, context_ids: Tensor, *, context_lengths: Tensor | None = None,
              steps: int | None = None) -> HeldContext:
        """Keeps the contexts, ``[N, S]`` int64, right-padded to ``context_lengths [N]``."""
        check = self._checker("FullContext.write")
        check_contexts(check, "context_ids", context_ids, context_lengths, self.vocab_size)
        if steps:
            check.fail("steps", "0: it takes no gradient steps", steps)
        if context_lengths is None:
            context_lengths = torch.full((len(context_ids),), context_ids.shape[1], device=context_ids.device)
        return HeldContext(context_ids, context_lengths)

    def read(self, memory: HeldContext, query_ids: Tensor, *, next_token: bool = False) -> Tensor:
        """As :meth:`gradmem.GradMem.read`."""
        check = self._check_held("FullContext.read", memory)
        check_queries(check, "query_ids", query_ids, self.vocab_size, empty=next_token)
        return self._logits(memory.ids, memory.lengths, query_ids if next_token else query_ids[..., :-1])

    @torch.no_grad()
    def generate(self, memory: HeldContext, query_ids: Tensor, *, max_new_tokens: int,
                 query_lengths: Tensor | None = None, eos_token_id: int | None = None) -> Tensor:
        """As :meth:`gradmem.GradMem.generate`."""
        check = self._check_held("FullContext.generate", memory)
        check_queries(check, "query_ids", query_ids, self.vocab_size, empty=True)
        check_count(check, "max_new_tokens", max_new_tokens, 1)
        rows = query_ids.unsqueeze(1) if query_ids.ndim == 2 else query_ids
        if query_lengths is None:
            query_lengths = torch.full(query_ids.shape[:-1], query_ids.shape[-1], device=query_ids.device)
        check_lengths(check, "query_lengths", query_lengths, ("B", "n")[: query_ids.ndim - 1], query_ids.shape[-1],
                      shortest=0)
        ids, lengths = self._repeated(memory.ids, memory.lengths, rows.shape[1])
        assert lengths is not None
        joined, _ = join(ids, lengths, rows.flatten(0, 1))
        # contexts differ in length, prefixes may not: the first token is the prefix, the rest is asked behind it
        with named_range("read generate"):
            out = generation.greedy(self.backbone, self.backbone.embed_tokens(joined[:, :1]), joined[:, None, 1:],
                                    lengths - 1 + query_lengths.flatten(), max_new_tokens, eos_token_id)
        return out.view(*query_ids.shape[:-1], max_new_tokens)

    def resolve_recompute(self, context_ids: Tensor) -> str:
        """There is no inner loop: autograd keeps what the forward pass made."""
        return "none"

    @property
    def vocab_size(self) -> int:
        return self.backbone.embed_tokens.weight.shape[0]

    def _logits(self, ids: Tensor, lengths: Tensor | None, query_ids: Tensor) -> Tensor:
        """Logits of each query token and of the one after the last: ``[..., T + 1, V]`` for ``query_ids [..., T]``."""
        rows = query_ids.unsqueeze(1) if query_ids.ndim == 2 else query_ids
        with named_range("read"):
            ids, lengths = self._repeated(ids, lengths, rows.shape[1])
            joined, behind = join(ids, lengths, rows.flatten(0, 1))
            first = behind[:, :1] - 1 if behind.shape[1] else self._last(ids, lengths)
            hidden = self.backbone.decoder(self.backbone.embed_tokens(joined))
            at = torch.cat([first, behind], 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            logits = F.linear(hidden.gather(1, at), self.backbone.head_weight)
        return logits.view(*query_ids.shape[:-1], query_ids.shape[-1] + 1, -1)

    @staticmethod
    def _last(ids: Tensor, lengths: Tensor | None) -> Tensor:
        """``[B, 1]``, the position of each context's last token."""
        return ids.new_full((len(ids), 1), ids.shape[1] - 1) if lengths is None else lengths.unsqueeze(1).long() - 1

    @staticmethod
    def _repeated(ids: Tensor, lengths: Tensor | None, queries: int) -> tuple[Tensor, Tensor | None]:
        return ids.repeat_interleave(queries, 0), None if lengths is None else lengths.repeat_interleave(queries, 0)

    def _check_held(self, op: str, memory: HeldContext) -> Checker:
        check = self._checker(op)
        if not isinstance(memory, HeldContext):
            check.fail("memory", "a HeldContext", type(memory).__name__, "FullContext.write makes one")
        check.tensor("memory", memory.ids, ("B", "S"), dtypes=(torch.int64,))
        return check

    def _checker(self, op: str) -> Checker:
        check = Checker(op)
        check.tensor("the model", self.backbone.embed_tokens.weight, ("V", "D"))  # what follows has its device
        return check
