"""Who writes the memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gradmem.config import Config, GradMemConfig, option

__all__ = ["WRITERS", "WriterConfig"]

GRADIENT, FORWARD, CONTEXT = WRITERS = ("gradient", "forward", "context")
# Options of gradient steps, and of a memory: a writer that has none reads none of them. The size of the memory and its
# initial values are not among them, so that one option tells a model without a memory from what it is compared with.
_OF_STEPS = ("order", "second_order_steps", "learn_inner_lr")
_OF_STEPS_BEGIN = ("inner_", "write_")
_OF_MEMORY = ("control_tokens", "memory_projection", "freeze_backbone")


@dataclass(frozen=True)
class WriterConfig(Config):
    """GradMem, or a baseline in its place."""

    writer: str = option(GRADIENT, "how a context gets into the memory: by gradient steps, by a forward pass over it "
                                   "(as RMT), or not at all: context and query are read together", choices=WRITERS)

    @property
    def default_steps(self) -> dict[str, int]:
        """The number of inner steps where none is asked for, if it is not the usual one."""
        return {} if self.writer == GRADIENT else {"steps": 0}

    def check(self, memory: GradMemConfig) -> None:
        """
        Raises:
            ArgumentError: for an option of the memory that this writer would not read.
        """
        if self.writer == GRADIENT:
            return
        if memory.steps:
            memory.fail("steps", f"0 where the writer is {self.writer!r}, which takes none", memory.steps)
        for field in dataclasses.fields(memory):
            unread = (field.name in _OF_STEPS or field.name.startswith(_OF_STEPS_BEGIN)
                      or (self.writer == CONTEXT and field.name in _OF_MEMORY))
            value = getattr(memory, field.name)
            if (unread and value != field.default) or value == "per_sample":  # which the inner steps would write
                memory.fail(field.name, f"{field.default!r} where the writer is {self.writer!r}, which reads no other",
                            value)
