"""Everything that decides what a training run computes, in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from gradmem.baselines import Model, WriterConfig, make_model
from gradmem.config import Config, GradMemConfig, LMConfig, option
from gradmem.hub import load_model, load_tokenizer
from gradmem.lm import Backbone, CausalLM, TransformersLM
from gradmem.tasks import (
    ByteTokenizer,
    DataConfig,
    FileTask,
    KVConfig,
    KVTask,
    PretrainedTokenizer,
    Tokenizer,
    read_rows,
)
from gradmem_kernels.checks import ArgumentError

__all__ = ["BackboneConfig", "DataConfig", "Experiment", "TrainConfig"]


@dataclass(frozen=True)
class BackboneConfig(Config):
    """A pre-trained model in place of the built-in decoder, and the tokenizer of tasks from files."""

    backbone: str | None = option(None, "name or directory of a causal model of transformers, to train in place of the "
                                        "built-in decoder")
    tokenizer: str | None = option(None, "bytes, or name or directory of a tokenizer of transformers (default: the "
                                         "backbone's, else bytes)")


@dataclass(frozen=True)
class TrainConfig(Config):
    """How the outer loop trains."""

    seed: int = option(0, "of the initial weights and the data", minimum=0)
    max_steps: int = option(5000, "training steps", minimum=1)
    batch_size: int = option(64, "contexts in a step", minimum=1)
    queries: int = option(1, "different keys asked of each context in training", minimum=1)
    lr: float = option(3e-3, "peak learning rate of AdamW", above=0)
    schedule: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup_steps: int = option(100, "steps of linear warm-up", minimum=0)
    final_lr: float = option(0.02, "fraction of the peak where the cosine ends", minimum=0, maximum=1)
    beta2: float = option(0.98, "decay of AdamW's second moment", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "of AdamW, on matrices", minimum=0)
    grad_clip: float = option(1.0, "largest norm of the outer gradient", above=0)
    start_pairs: int | None = option(None, "pairs that the curriculum starts with (default: no curriculum)", minimum=1)
    advance_at: float = option(0.9, "exact match on the training batches at which a pair is added", above=0, maximum=1)
    ema: float = option(0.95, "decay of the moving average of that exact match", minimum=0, maximum=0.9999)
    stop_at: float | None = option(None, "exact match on the training batches at which training ends early", above=0,
                                   maximum=1)
    log_every: int = option(20, "steps between lines of metrics", minimum=1)
    eval_every: int = option(500, "steps between evaluations on held-out contexts", minimum=1)
    eval_samples: int = option(512, "held-out contexts", minimum=1)
    save_every: int | None = option(None, "steps between checkpoints (default: after each step, or less often so that "
                                          "saving takes a twentieth of the time)", minimum=1)
    cuda_graphs: str = option("auto", "capture steps into CUDA graphs; auto: on CUDA, up to 100 M parameters",
                              choices=("auto", "on", "off"))
    parallel: str = option("ddp", "of several processes, started with torchrun: each has all of the model, or a part",
                           choices=("ddp", "fsdp"))

    def may_change(self, name: str) -> bool:
        """Whether a resumed run may have another value of this option: its computation would be the same."""
        return name in ("log_every", "eval_every", "eval_samples", "save_every", "cuda_graphs",
                        "parallel") or (
            name == "max_steps" and self.schedule == "constant")


@dataclass(frozen=True)
class Experiment:
    """The configurations of a run."""

    model: LMConfig
    gradmem: GradMemConfig
    task: KVConfig
    data: DataConfig
    train: TrainConfig
    backbone: BackboneConfig = BackboneConfig()
    writer: WriterConfig = dataclasses.field(default_factory=WriterConfig)

    def __post_init__(self) -> None:
        self.writer.check(self.gradmem)
        if self.data.task == "kv":
            for name, value in self.backbone.to_dict().items():
                if value is not None:
                    self.backbone.fail(name, "None where the task is kv, whose tokens are its own characters", value)
        train, generated = self.train, self.data.data is None
        keys = self.task.pairs if generated else 1
        if train.queries > keys:
            train.fail("queries", f"at most the {keys} of a context", train.queries)
        if train.start_pairs is not None and not (generated and train.start_pairs <= keys):
            train.fail("start_pairs", f"at most pairs={keys}" if generated else "None with data from a file",
                       train.start_pairs)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Experiment:
        """From option names, which differ between the configurations; the vocabulary follows from the task, and the
        number of inner steps is 0 by default where the writer takes none.

        Raises:
            ArgumentError: for a value its option does not take.
        """
        known = {f.name for config in _CONFIGS.values() for f in dataclasses.fields(config)}
        for name in options:
            if name not in known:
                raise ArgumentError(f"Experiment: {name}: expected one of {', '.join(sorted(known))}")
        writer = WriterConfig.from_dict({name: options[name] for name in ("writer",) if name in options})
        options = {**writer.default_steps, **options}
        parts = {part.name: _CONFIGS[part.name].from_dict(
            {f.name: options[f.name] for f in dataclasses.fields(_CONFIGS[part.name]) if f.name in options})
            for part in dataclasses.fields(cls)}
        experiment = cls(**cast(dict[str, Any], parts))
        model = dataclasses.replace(experiment.model, vocab_size=experiment.make_tokenizer().vocab_size)
        return dataclasses.replace(experiment, model=model)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Experiment:
        # files from before there were other backbones and writers have no such entries
        return cls(**{name: cast(Any, config.from_dict(
            values.get(name, {}) if name in ("backbone", "writer") else values[name]))
                      for name, config in _CONFIGS.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    def options(self) -> dict[str, Any]:
        """All options by name."""
        return {name: value for part in self.to_dict().values() for name, value in part.items()}

    def make_tokenizer(self) -> Tokenizer:
        """
        Raises:
            HubError, MissingExtraError: if a tokenizer of transformers cannot be loaded.
        """
        if self.data.task == "kv":
            return KVTask(self.task).tokenizer
        name = self.backbone.tokenizer or self.backbone.backbone or "bytes"
        return ByteTokenizer() if name == "bytes" else PretrainedTokenizer(load_tokenizer(name))

    def make_task(self, eval_data: str | None = None) -> KVTask | FileTask:
        """The task; with ``eval_data`` it only serves to evaluate on that file.

        Raises:
            DataError: if a data file cannot be read.
            HubError, MissingExtraError: if a data set or a tokenizer cannot be loaded.
        """
        if self.data.data is None and eval_data is None:
            return KVTask(self.task, self.train.seed)
        tokenizer = self.make_tokenizer()
        held_out = read_rows(eval_data or cast(str, self.data.eval_data), tokenizer, self.data)
        rows = held_out if eval_data else read_rows(cast(str, self.data.data), tokenizer, self.data)
        return FileTask(rows, tokenizer, held_out, self.train.seed)

    def make_model(self) -> Model:
        """A model with initial weights that depend on the seed alone, and on the backbone's where one is named.

        Raises:
            HubError, MissingExtraError: if the backbone cannot be loaded.
            ArgumentError: if it has no embeddings for some of the tokenizer's tokens.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            return make_model(self.writer, self._make_backbone(), self.gradmem)

    def _make_backbone(self) -> Backbone:
        name, tokens = self.backbone.backbone, self.model.vocab_size
        if name is None:
            return CausalLM(self.model)
        backbone = TransformersLM(load_model(name))
        rows = backbone.embed_tokens.weight.shape[0]
        if rows < tokens:
            self.backbone.fail("tokenizer", f"one of at most the backbone's {rows} tokens", f"{tokens} tokens")
        return backbone


_CONFIGS: dict[str, type[Config]] = {"model": LMConfig, "gradmem": GradMemConfig, "task": KVConfig,
                                     "data": DataConfig, "train": TrainConfig, "backbone": BackboneConfig,
                                     "writer": WriterConfig}
