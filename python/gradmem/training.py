"""The outer loop: AdamW, a schedule, a curriculum over pairs, metrics, checkpoints, and a clean stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from gradmem.checkpoint import Checkpoint, TrainState
from gradmem.errors import CheckpointError, NonFiniteError
from gradmem.evaluation import evaluate
from gradmem.experiment import Experiment, TrainConfig
from gradmem.files import remove_leftovers
from gradmem.graphs import GraphedStep, graphs_wanted
from gradmem.metrics import MetricsLog
from gradmem.ranks import Ranks
from gradmem.step import StepOutput, meta_step
from gradmem.tasks import Batch, FileTask
from gradmem_kernels.ranges import named_range

__all__ = ["CHECKPOINT", "METRICS", "Trainer", "learning_rate"]

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"

OnStep = Callable[[TrainState, dict[str, Any]], None]
_T = TypeVar("_T")

_SAVING = 19  # times as long as saving takes, the run goes on before the next checkpoint, if nothing else is asked for


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step number ``step``, from 0."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.lr * warmup
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.max_steps))
    return config.lr * warmup * (config.final_lr + (1 - config.final_lr) * cosine)


class Trainer:
    """Trains in ``directory``, which gets a checkpoint and a metrics file.

    Args:
        experiment: the configurations.
        directory: made if missing.
        device: to train on.
        checkpoint: to continue from; the result is the same, bit for bit, as without the interruption.

    Where there is a process group, all processes train one model together, each on its part of every batch, and the
    first one writes the files (docs/parallel.md).
    """

    def __init__(self, experiment: Experiment, directory: str | Path, device: torch.device | str = "cpu",
                 checkpoint: Checkpoint | None = None) -> None:
        self.experiment, self.config = experiment, experiment.train
        self.directory, self.device = Path(directory), torch.device(device)
        self.ranks = Ranks.connected()
        if self.config.batch_size < self.ranks.world:
            self.config.fail("batch_size", f"at least the number of processes, {self.ranks.world}",
                             self.config.batch_size)
        self.task = experiment.make_task()
        self.model = experiment.make_model().to(self.device)
        digest = self.task.digest if isinstance(self.task, FileTask) else ""
        self.state = TrainState(level=self.config.start_pairs or self.task.levels, data=digest)
        if checkpoint is None and self.model.config.recompute == "auto":
            self._resolve_recompute()
        called = self._spread()
        matrices = [weight for weight in self.model.parameters() if weight.ndim == 2]
        others = [weight for weight in self.model.parameters() if weight.ndim != 2]
        # a rate in a tensor can change between replays of a graph
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=torch.tensor(self.config.lr, device=self.device), betas=(0.9, self.config.beta2), fused=True,
            capturable=self.device.type == "cuda")
        if checkpoint is not None:
            if checkpoint.state.data != digest:
                raise CheckpointError(f"{checkpoint.path}: the data files have changed since it was made")
            self.state = checkpoint.state
            checkpoint.restore(self.model, self.optimizer)
        #: whether steps are captured into CUDA graphs
        self.graphs = graphs_wanted(self.config.cuda_graphs, self.model, self.device, self.ranks.world)
        self._take_step: Callable[[Batch], StepOutput] = (
            GraphedStep(self.model, self.optimizer, grad_clip=self.config.grad_clip) if self.graphs
            else functools.partial(meta_step, called, self.optimizer, grad_clip=self.config.grad_clip))
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.ranks.rank == 0:
            for name in (CHECKPOINT, METRICS):
                remove_leftovers(self.directory / name)
        self.metrics = MetricsLog(self.directory / METRICS, self.state.step) if self.ranks.rank == 0 else None
        #: seconds of the steps so far, those before an interruption included as far as metrics were logged
        self.elapsed: float = 0.0
        self._evaluated = 0  # the newest step with an evaluation
        if self.metrics is not None:
            self.elapsed = self.metrics.last("elapsed").get("elapsed", 0.0)
            self._evaluated = self.metrics.last("held_out_loss").get("step", 0)
        self._evaluated = self._of_first(self._evaluated)
        self._saved = self._saving = 0.0  # when the last checkpoint was saved, and how long that took

    @classmethod
    def resume(cls, directory: str | Path, options: Mapping[str, Any], device: torch.device | str = "cpu") -> Trainer:
        """Continues the run in ``directory``; ``options`` may only name what does not change its computation.

        Raises:
            CheckpointError: if there is no valid checkpoint, or it was made with other options.
        """
        checkpoint = Checkpoint.load(Path(directory) / CHECKPOINT)
        return cls(checkpoint.check_options(options), directory, device, checkpoint)

    def run(self, on_step: OnStep | None = None) -> signal.Signals | None:
        """Trains to the end. ``on_step(state, entry)`` hears of every step and its metrics.

        After SIGINT or SIGTERM the step is finished and a checkpoint saved; a second one interrupts at once. (Signals
        are only caught in the main thread.) There is a checkpoint from the beginning, so that a run that is killed goes
        on from its last one.

        Returns:
            The signal that stopped the run, or ``None``.

        Raises:
            NonFiniteError: if a loss or its gradient is not finite; weights and last checkpoint stay.
        """
        state, config = self.state, self.config
        stopped = None
        with _signals() as caught:
            if state.step == 0:
                self.save()
            while state.step < config.max_steps and not self._good_enough() and not (stopped := self._agreed(caught)):
                with named_range("train step", state.step):
                    entry = self._step()
                if state.step % config.log_every == 0:
                    self._log(entry)
                if state.step % config.eval_every == 0:
                    self._evaluate()
                if self._save_is_due():
                    self.save()
                if on_step is not None:
                    on_step(state, entry)
            stopped = stopped or self._agreed(caught)
            if stopped is None and self._evaluated != state.step:
                self._evaluate()
                stopped = self._agreed(caught)
            self.save()
            return stopped

    def save(self) -> None:
        """Replaces the checkpoint in ``directory``; of several processes, all call it."""
        started = time.perf_counter()
        Checkpoint.save(self.directory / CHECKPOINT, self.experiment, self.state, self.model, self.optimizer)
        self._saved = time.perf_counter()
        self._saving = self._saved - started

    def _save_is_due(self) -> bool:
        if self.config.save_every is not None:
            return self.state.step % self.config.save_every == 0
        # the first process has the file to write, and takes longer than the others
        return not self._largest(time.perf_counter() - self._saved < _SAVING * self._saving)

    def _resolve_recompute(self) -> None:
        """Puts what ``recompute="auto"`` stands for here into the configuration, which checkpoints hold."""
        size = -(-self.config.batch_size // self.ranks.world)
        contexts = torch.zeros(size, self.task.longest_context, dtype=torch.int64, device=self.device)
        answer = self._of_first(self.model.resolve_recompute(contexts))  # machines may have unlike memory
        resolved = dataclasses.replace(self.experiment.gradmem, recompute=answer)
        self.experiment = dataclasses.replace(self.experiment, gradmem=resolved)
        self.model.config = resolved

    def _spread(self) -> nn.Module:
        """Prepares the model for several processes; returns what is called in its place."""
        if self.ranks.world == 1:
            return self.model
        from gradmem import parallel

        if self.config.parallel == "ddp":
            return parallel.replicate(self.model)
        parallel.shard(self.model)
        return self.model

    def _agreed(self, caught: Sequence[signal.Signals]) -> signal.Signals | None:
        """The signal that stops the run: one that any process caught stops all, before the same step."""
        number = self._largest(caught[0].value if caught else 0)
        return signal.Signals(number) if number else None

    def _largest(self, number: int) -> int:
        """The largest ``number`` of all processes."""
        if self.ranks.world == 1:
            return number
        found = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def _of_first(self, value: _T) -> _T:
        """The ``value`` that the first process has."""
        if self.ranks.world == 1:
            return value
        answer = [value]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def _good_enough(self) -> bool:
        return (self.config.stop_at is not None and self.state.level == self.task.levels
                and self.state.average >= self.config.stop_at)

    def _step(self) -> dict[str, Any]:
        state, config, started = self.state, self.config, time.perf_counter()
        level = state.level
        with named_range("data"):
            batch = self.task.batch(state.step, config.batch_size, queries=config.queries, level=level)
            batch = batch.part(self.ranks.rank, self.ranks.world).to(self.device)
        lr = learning_rate(config, state.step)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)
        loss, norm, match, inner = self._of_all(self._take_step(batch), batch).numbers()
        _check_finite("loss", loss, state.step)
        _check_finite("norm of the gradient", norm, state.step)
        self._advance(match)
        read = loss if inner is None else loss - self.experiment.gradmem.inner_loss_weight * inner
        seconds = time.perf_counter() - started
        self.elapsed += seconds
        return {"step": state.step, "loss": loss, "read_loss": read, "inner_loss": inner, "exact_match": match,
                "average": state.average, "level": level, "lr": lr, "grad_norm": norm,
                "seconds": seconds, "elapsed": self.elapsed}

    def _of_all(self, out: StepOutput, part: Batch) -> StepOutput:
        """The output of the whole batch, of which this process had ``part``."""
        if self.ranks.world == 1:
            return out
        contexts, queries = len(part.context_ids), part.labels[..., 0].numel()
        inner = out.exact_match if out.inner_loss is None else out.inner_loss
        # the matches as the integer they are: their fraction is that of one process, bit for bit
        sums = torch.stack([(out.exact_match.double() * queries).round(), inner.double() * contexts])
        dist.all_reduce(sums)
        size = self.config.batch_size
        return out._replace(exact_match=(sums[0] / (size * (queries // contexts))).to(out.exact_match.dtype),
                            inner_loss=None if out.inner_loss is None else sums[1] / size)

    def _log(self, entry: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.append(entry)

    def _advance(self, match: float) -> None:
        """Counts a step; the next level begins when the moving average of exact match is high enough."""
        state, config = self.state, self.config
        state.step += 1
        state.average = config.ema * state.average + (1 - config.ema) * match
        if state.level < self.task.levels and state.average >= config.advance_at:
            state.level, state.average = state.level + 1, 0.0

    def _evaluate(self) -> None:
        with named_range("evaluate"), self._gathered():
            result = evaluate(self.model, self.task, self.config.eval_samples)
        self._log({"step": self.state.step, "held_out_loss": result.loss,
                   "held_out_exact_match": result.exact_match,
                   "held_out_token_accuracy": result.token_accuracy})
        self._evaluated = self.state.step

    def _gathered(self) -> contextlib.AbstractContextManager[None]:
        if self.ranks.world == 1:
            return contextlib.nullcontext()
        from gradmem import parallel

        return parallel.gathered(self.model)


def _check_finite(what: str, number: float, step: int) -> None:
    if not math.isfinite(number):
        raise NonFiniteError(f"step {step + 1}: the {what} is {number}; a smaller lr, inner_lr or grad_clip, or inner "
                             f"clipping may help. The last checkpoint is kept")


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM, one each, in place of their usual effect."""
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def catch(number: int, _: Any) -> None:
        caught.append(signal.Signals(number))
        restore()

    for number in previous:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()
