"""A memory written by a forward pass, as the Recurrent Memory Transformer does for one segment.

Bulatov et al., arXiv 2207.06881: learned memory vectors stand in front of the segment, and again behind it, where they
see all of it; the hidden states of the latter in the last layer are the memory that is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem.baselines.rows import join
from gradmem.config import GradMemConfig
from gradmem.lm import Backbone
from gradmem.model import GradMem
from gradmem_kernels import WriteOutput
from gradmem_kernels.checks import Checker
from gradmem_kernels.ranges import named_range

__all__ = ["ForwardWriter"]


class ForwardWriter(GradMem):
    """A :class:`gradmem.GradMem` whose WRITE is one forward pass, trained end to end.

    The backbone reads ``[start; projection(memory_init); end; context; start; projection(memory_init)]``, with the
    control tokens of WRITE as ``start`` and ``end``; its hidden states in the last ``m`` rows, after the final norm,
    are the memory, of GradMem's own size ``[B, m, D]``. READ, memory files and generation are GradMem's. So as many
    rows stand before a context as before a query.

    Args:
        backbone: the language model; READ and WRITE use the same weights.
        config: the memory; ``steps`` must be 0.

    Raises:
        ArgumentError: for another number of steps, here and in ``write``.
    """

    def __init__(self, backbone: Backbone, config: GradMemConfig) -> None:
        if config.steps:
            config.fail("steps", "0 for a writer without gradient steps", config.steps)
        super().__init__(backbone, config)

    @property
    def written_rows(self) -> int:
        """Rows that WRITE reads beside those of the context."""
        control = 0 if self.write_prefix.start is None else len(self.write_prefix.start)
        return 2 * len(self.memory_init) + 3 * control

    def resolve_recompute(self, context_ids: Tensor) -> str:
        """There is no inner loop: autograd keeps what the forward pass made."""
        return "none"

    def _write(self, ids: Tensor, lengths: Tensor | None, steps: int) -> WriteOutput:
        if steps:
            Checker("ForwardWriter.write").fail("steps", "0: it takes no gradient steps", steps)
        if ids.is_inference() and not torch.is_inference_mode_enabled():
            ids = ids.clone()
        with named_range("write forward"):
            before = self.write_prefix(self.memory_init.unsqueeze(0)).expand(len(ids), -1, -1)
            behind = before[:, : self.written_rows - before.shape[1]]
            context = torch.cat([before, self.backbone.embed_tokens(ids)], 1)
            rows, at = join(context, None if lengths is None else lengths + before.shape[1], behind)
            hidden = self.backbone.decoder(rows)
            at = at[:, -len(self.memory_init):].unsqueeze(-1)
            memory = hidden.gather(1, at.expand(-1, -1, hidden.shape[-1]))
        memory = memory.to(torch.promote_types(memory.dtype, torch.float32))
        nothing = memory.new_zeros(0, len(ids))
        return WriteOutput(memory, nothing, nothing)
