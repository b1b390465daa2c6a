"""The demo: GradMem learns key-value retrieval, then answers from a memory file in a new process."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gradmem.cli_options import progress
from gradmem.evaluation import evaluate
from gradmem.experiment import Experiment
from gradmem.metrics import plot
from gradmem.model import GradMem
from gradmem.tasks import KVTask
from gradmem.training import CHECKPOINT, METRICS, Trainer

__all__ = ["Recipe", "run_demo"]

REQUIRED = 0.90  # exact match of the trained number of inner steps
SAMPLES = 1024


@dataclass(frozen=True)
class Recipe:
    """Every choice of the demo; names are those of the training options."""

    alphabet_size: int = 16
    key_length: int = 1
    value_length: int = 1
    pairs: int = 4
    memory_tokens: int = 8
    memory_init_std: float = 1.0
    steps: int = 2
    inner_lr: float = 50.0
    learn_inner_lr: str = "step"
    write_head: bool = True
    inner_loss_weight: float = 0.1
    recompute: str = "none"
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 128
    batch_size: int = 32
    queries: int = 4
    max_steps: int = 1500
    lr: float = 3e-3
    warmup_steps: int = 100
    start_pairs: int = 2
    advance_at: float = 0.8
    stop_at: float = 0.95
    log_every: int = 5


def run_demo(console: Console, out: Path, seed: int, recipe: Recipe | None = None) -> bool:
    """Trains, compares, writes a memory file and answers from it in a new process, all under ``out``.

    Returns:
        Whether exact match with the trained number of inner steps is at least 0.90.
    """
    recipe = recipe or Recipe()
    experiment = Experiment.from_options({**asdict(recipe), "seed": seed, "eval_every": recipe.max_steps,
                                          "save_every": recipe.max_steps})
    console.rule("1. train")
    console.print(f"contexts of {recipe.pairs} pairs, read into {recipe.memory_tokens} memory vectors by "
                  f"{recipe.steps} gradient steps; seed {seed}")
    started = time.perf_counter()
    trainer = Trainer(experiment, out)
    model = trainer.model
    assert isinstance(model, GradMem)  # the recipe's writer
    with progress(console, recipe.max_steps) as on_step:
        stopped = trainer.run(on_step)
    if stopped is not None:
        console.print(f"stopped by {stopped.name} after step {trainer.state.step}")
        return False
    plot(out / METRICS, out / "curves.png")
    console.print(f"{trainer.state.step} steps in {time.perf_counter() - started:.0f} s; plot: {out / 'curves.png'}",
                  soft_wrap=True)

    console.rule("2. compare, on held-out contexts")
    task = KVTask(experiment.task, seed)
    reached = _compare(console, model, task)

    console.rule("3. write one context, forget it, answer in a new process")
    _answer_elsewhere(console, model, task, out)
    if reached < REQUIRED:
        console.print(f"exact match {reached:.3f} is below {REQUIRED:.2f}", style="bold red")
    return reached >= REQUIRED


def _compare(console: Console, model: GradMem, task: KVTask) -> float:
    """Prints the table of exact match; returns that of the trained number of inner steps."""
    trained = model.config.steps
    table = Table("memory", "exact match", title=f"value recalled for a key, {SAMPLES} contexts of "
                                                 f"{task.config.pairs} pairs")
    names = {0: "no write, K=0"} | {k: f"written, K={k}" for k in (1, trained)}
    results = {k: evaluate(model, task, SAMPLES, steps=k).exact_match for k in names}
    for k, name in names.items():
        table.add_row(name, f"{results[k]:.3f}", style="bold" if k == trained else None)
    table.add_row("chance", f"{task.config.chance:.3f}")
    console.print(table)
    return results[trained]


def _answer_elsewhere(console: Console, model: GradMem, task: KVTask, out: Path) -> None:
    context, pairs = task.text(0)
    ids = torch.tensor([task.tokenizer.encode(context)])
    file = out / "doc.memory.safetensors"
    with torch.inference_mode():
        model.write(ids).save(file)
    console.print(f"context: {context}\nmemory:  {file} ({file.stat().st_size} bytes)", highlight=False, markup=False,
                  soft_wrap=True)
    command = ["gradmem", "read", str(out / CHECKPOINT), str(file)]
    for key, _ in pairs:
        command += ["--query", f"?!{key}:"]
    console.print(f"$ {' '.join(repr(part) if part[0] == '?' else part for part in command)}", highlight=False,
                  markup=False, soft_wrap=True)
    answers = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=True).stdout
    table = Table("query", "answer", "in the context")
    for line, (_, value) in zip(answers.splitlines(), pairs, strict=True):
        query, answer = line.split("\t")
        table.add_row(query, answer, value, style="green" if answer == value else "red")
    console.print(table)
