"""Who writes the memory."""

from __future__ import annotations

from dataclasses import dataclass

from gradmem.config import Config, GradMemConfig, option

__all__ = ["WRITERS", "WriterConfig"]

GRADIENT, FORWARD, CONTEXT = WRITERS = ("gradient", "forward", "context")
# Options of the memory that a writer does not have, with the value that they must then have.
_NO_STEPS = {"steps": 0, "inner_optimizer": "sgd", "write_head": False, "inner_loss_weight": 0.0}
_NO_MEMORY = {"control_tokens": 0, "memory_projection": "none"}


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
        for name, value in (_NO_STEPS | (_NO_MEMORY if self.writer == CONTEXT else {})).items():
            if getattr(memory, name) != value:
                memory.fail(name, f"{value!r} where the writer is {self.writer!r}, which has none",
                            getattr(memory, name))
