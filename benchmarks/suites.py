"""The suites by name, in the order of `python -m benchmarks all`; processes that run one case alone begin here."""

from __future__ import annotations

from types import ModuleType

from benchmarks import attention, cross_entropy, end_to_end, footprint, inner_step, memory, meta_step, ops

__all__ = ["SUITES"]

#: A suite has ``run(options) -> Iterator[Report]``, a report as soon as it is there, and ``table(rows)``; ``DEVICES``,
#: ``PARTS`` and ``PEERS`` where it has them.
SUITES: dict[str, ModuleType] = {
    "meta-step": meta_step, "memory": memory, "inner-step": inner_step, "end-to-end": end_to_end,
    "attention": attention, "cross-entropy": cross_entropy, "ops": ops, "footprint": footprint}
