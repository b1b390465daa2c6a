"""What GradMem is compared with: a memory written by a forward pass, and no memory at all."""

from gradmem.baselines.config import WriterConfig
from gradmem.baselines.context import FullContext, HeldContext
from gradmem.baselines.forward import ForwardWriter
from gradmem.config import GradMemConfig
from gradmem.lm import Backbone
from gradmem.model import GradMem

__all__ = ["ForwardWriter", "FullContext", "HeldContext", "Model", "WriterConfig", "make_model"]

#: What can be trained and evaluated.
Model = GradMem | FullContext


def make_model(writer: WriterConfig, backbone: Backbone, memory: GradMemConfig) -> Model:
    """The model whose writer is ``writer`` around ``backbone``."""
    kinds: dict[str, type[GradMem] | type[FullContext]] = {
        "gradient": GradMem, "forward": ForwardWriter, "context": FullContext}
    return kinds[writer.writer](backbone, memory)
