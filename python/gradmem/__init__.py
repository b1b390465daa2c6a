"""GradMem: contexts written into memory vectors by gradient descent at test time, and read with the context gone."""

from gradmem.checkpoint import Checkpoint
from gradmem.config import GradMemConfig, LMConfig
from gradmem.corpus import MemoryCorpus
from gradmem.corpus_writer import write_corpus
from gradmem.errors import (
    CheckpointError,
    DataError,
    GradMemError,
    GraphError,
    HubError,
    MemoryFileError,
    MissingExtraError,
    NonFiniteError,
)
from gradmem.evaluation import Evaluation, TextScores, evaluate, score_text
from gradmem.experiment import BackboneConfig, DataConfig, Experiment, TrainConfig
from gradmem.graphs import GraphedStep, GraphedWrite
from gradmem.lm import Backbone, CausalLM, TransformersLM
from gradmem.memory import Memory, Provenance
from gradmem.model import GradMem, GradMemOutput
from gradmem.own_forward import OwnForwardLM
from gradmem.step import StepOutput, meta_step
from gradmem.training import Trainer

__all__ = ["Backbone", "BackboneConfig", "CausalLM", "Checkpoint", "CheckpointError", "DataConfig", "DataError",
           "Evaluation", "Experiment", "GradMem", "GradMemConfig", "GradMemError", "GradMemOutput", "GraphError",
           "GraphedStep", "GraphedWrite", "HubError", "LMConfig", "Memory", "MemoryCorpus", "MemoryFileError",
           "MissingExtraError", "NonFiniteError", "OwnForwardLM", "Provenance", "StepOutput", "TextScores",
           "TrainConfig", "Trainer", "TransformersLM", "evaluate", "meta_step", "score_text", "write_corpus"]
