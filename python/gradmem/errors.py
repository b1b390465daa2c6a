"""Errors of this package. Arguments that are not what a function takes raise ``gradmem_kernels.ArgumentError``."""

__all__ = ["CheckpointError", "DataError", "GradMemError", "GraphError", "HubError", "MemoryFileError",
           "MissingExtraError", "NonFiniteError"]


class GradMemError(Exception):
    """Base of the errors below; the command line shows them as one line."""


class MemoryFileError(GradMemError):
    """A memory file cannot be read, or is not for this model."""


class CheckpointError(GradMemError):
    """A checkpoint cannot be read, or was made with another configuration."""


class DataError(GradMemError):
    """A data file is not what the task reads."""


class HubError(GradMemError):
    """A model, tokenizer or data set cannot be loaded by its name."""


class NonFiniteError(GradMemError):
    """A training loss became infinite or NaN."""


class MissingExtraError(GradMemError):
    """An optional dependency is not installed."""


class GraphError(GradMemError):
    """Something cannot be captured into a CUDA graph, or a captured graph no longer fits its model."""
