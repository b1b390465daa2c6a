"""Checkpoints: one safetensors file with the weights, the optimizer, the configurations and where training is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmem.baselines import Model
from gradmem.errors import CheckpointError
from gradmem.experiment import Experiment
from gradmem.files import load_tensors, save_tensors
from gradmem.model import GradMem
from gradmem.ranks import Ranks, like, whole
from gradmem_kernels.checks import ArgumentError

__all__ = ["Checkpoint", "TrainState"]

#: An option and the value that a run replaced, when it began, by what it stood for.
RESOLVED = ("recompute", "auto")
#: Options that say where files are; the trainer compares what these hold.
_PLACES = ("data", "eval_data")
_KIND, _VERSION = "checkpoint", 1
_MODEL, _OPTIMIZER = "model.", "optimizer."


@dataclass
class TrainState:
    """Where training is. Batches are functions of seed and step, so there is no state of random numbers.

    Attributes:
        step: steps done.
        level: of the curriculum, the number of pairs.
        average: moving average of the exact match on training batches, since the level began.
        data: SHA-256 of the data files' examples, empty for generated data.
    """

    step: int = 0
    level: int = 1
    average: float = 0.0
    data: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    path: Path
    experiment: Experiment
    state: TrainState
    tensors: dict[str, Tensor]

    @staticmethod
    def save(path: Path, experiment: Experiment, state: TrainState, model: nn.Module,
             optimizer: torch.optim.Optimizer) -> None:
        """Replaces ``path`` in one step: an interrupted write leaves the old checkpoint.

        Where the model is sharded, every process calls it and the first one writes.
        """
        tensors = {}
        for name, weight in model.named_parameters():
            tensors[_MODEL + name] = whole(weight.detach())
            for key, value in optimizer.state[weight].items():
                tensors[f"{_OPTIMIZER}{name}.{key}"] = whole(value)
        if Ranks.connected().rank == 0:
            save_tensors(path, _KIND, _VERSION, tensors,
                         {"experiment": experiment.to_dict(), "state": dataclasses.asdict(state)})

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """
        Raises:
            CheckpointError: if the file is missing, truncated, not safetensors or not a checkpoint.
        """
        path = Path(path)
        tensors, about = load_tensors(path, _KIND, _VERSION, CheckpointError)
        try:
            return cls(path, Experiment.from_dict(about["experiment"]), TrainState(**about["state"]), tensors)
        except (ArgumentError, KeyError, TypeError) as reason:
            raise CheckpointError(f"{path}: not a valid checkpoint: {reason}") from reason

    def model(self, device: torch.device | str = "cpu") -> GradMem:
        """The trained model, where it is one that writes memories.

        Raises:
            CheckpointError: for one that reads whole contexts.
        """
        model = self.trained(device)
        if not isinstance(model, GradMem):
            raise CheckpointError(f"{self.path}: expected a model that writes memories, got one trained with writer="
                                  f"{self.experiment.writer.writer!r}, which can only be evaluated")
        return model

    def trained(self, device: torch.device | str = "cpu") -> Model:
        """The trained model, baselines without a memory included."""
        model = self.experiment.make_model()
        self.restore(model)
        return model.to(device)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Copies the weights, and the optimizer's state, into place.

        Raises:
            CheckpointError: if the file's tensors are not those of this model.
        """
        weights = dict(model.named_parameters())
        saved = {n.removeprefix(_MODEL): list(t.shape) for n, t in self.tensors.items() if n.startswith(_MODEL)}
        expected = {name: list(weight.shape) for name, weight in weights.items()}
        if saved != expected:
            name = next(n for n in {**expected, **saved} if saved.get(n) != expected.get(n))
            raise CheckpointError(f"{self.path}: {name}: expected shape {expected.get(name, 'none')}, got "
                                  f"{saved.get(name, 'none')}")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(like(self.tensors[_MODEL + name], weight))
                prefix = f"{_OPTIMIZER}{name}."
                if optimizer is not None:
                    optimizer.state[weight] = {key.removeprefix(prefix): like(value, weight)
                                               for key, value in self.tensors.items() if key.startswith(prefix)}

    def check_options(self, options: Mapping[str, Any]) -> Experiment:
        """The experiment to resume, with those of ``options`` that may change.

        Raises:
            CheckpointError: listing the options with which this checkpoint would not continue the same run.
        """
        mine = self.experiment.options()
        wrong = [f"{name}: checkpoint {mine[name]!r}, now {value!r}" for name, value in options.items()
                 if value != mine[name] and (name, value) != RESOLVED and not self.experiment.train.may_change(name)
                 and not (name in _PLACES and isinstance(mine[name], str) and isinstance(value, str))]
        if wrong:
            raise CheckpointError(f"{self.path}: made with another configuration: {'; '.join(wrong)}")
        kept = {name: mine[name] for name, value in options.items() if (name, value) == RESOLVED}
        return Experiment.from_options({**mine, **options, **kept})
