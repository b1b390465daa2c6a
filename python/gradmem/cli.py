"""The ``gradmem`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table

from gradmem.checkpoint import Checkpoint
from gradmem.cli_corpus import find_memory, run_write_corpus
from gradmem.cli_options import Commands, config_options, experiment_options, progress
from gradmem.convert import convert_config, load_gradmem_gpt, read_gradmem_gpt
from gradmem.demo import run_demo
from gradmem.doctor import doctor as print_doctor
from gradmem.errors import CheckpointError, DataError
from gradmem.evaluation import evaluate, score_text
from gradmem.experiment import Experiment
from gradmem.metrics import plot as draw_plot
from gradmem.metrics import require_matplotlib
from gradmem.ranks import Ranks, connected
from gradmem.reproduce import METHODS, PRESETS, read_rows, replace_generated
from gradmem.reproduce import table as result_table
from gradmem.reproduce.command import ReproduceConfig, select
from gradmem.reproduce.command import reproduce as run_cells
from gradmem.tasks import TASKS, FileTask, KVTask
from gradmem.tasks.files import SPACED
from gradmem.tasks.kv import END
from gradmem.training import CHECKPOINT, METRICS, Trainer
from gradmem_kernels import ArgumentError

__all__ = ["app"]

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Write contexts into memory vectors by gradient descent, and read them with the context gone.")
train_app = typer.Typer(no_args_is_help=True, help="Train a GradMem.")
app.add_typer(train_app, name="train")
reproduce_app = typer.Typer(no_args_is_help=True, help="Reproduce the paper's results, with baselines beside them.")
app.add_typer(reproduce_app, name="reproduce")

CheckpointArgument = Annotated[Path, typer.Argument(help="checkpoint of a training run")]
DeviceOption = Annotated[str, typer.Option(help="torch device to run on")]


_TRAIN_HELP = {
    "kv": "Train a GradMem with a small built-in decoder to retrieve values by their keys.",
    "babi": "Train a GradMem on the questions of bAbI stories, files in its text format.",
    "squad": "Train a GradMem on questions about paragraphs, files in SQuAD's JSON format.",
    "jsonl": "Train a GradMem on JSON lines with context, query and target.",
    "text": "Train a GradMem to reconstruct chunks of a text from its memory.",
}


def _add_train_command(task: str) -> None:
    @train_app.command(task, help=f"{_TRAIN_HELP[task]}\n\nA resumed run takes its options from the checkpoint; those "
                                  f"given here must agree with it.")
    @experiment_options(task)
    def train(
        options: dict[str, Any],
        out: Annotated[Path, typer.Option(help="directory of the checkpoint, metrics and plot")] = Path("runs") / task,
        resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
        plot: Annotated[bool, typer.Option(help="draw loss and exact match as PNG at the end")] = True,
        device: DeviceOption = "cpu",
    ) -> None:
        if plot:
            require_matplotlib()
        ranks = Ranks.here()
        with connected(_device(device)) as target:
            if resume:
                trainer = Trainer.resume(out, options, target)
            else:
                if (out / CHECKPOINT).exists():
                    raise CheckpointError(f"{out / CHECKPOINT}: exists already; continue it with --resume, or name "
                                          f"another directory with --out")
                trainer = Trainer(Experiment.from_options(options), out, target)
            console = Console(quiet=ranks.rank > 0)
            if trainer.graphs:
                console.print("steps are captured into CUDA graphs; --cuda-graphs off runs them without",
                              highlight=False)
            with progress(console, trainer.config.max_steps, pairs=isinstance(trainer.task, KVTask)) as on_step:
                stopped = trainer.run(on_step)
        if plot and ranks.rank == 0:
            draw_plot(out / METRICS, out / "curves.png")
        console.print(f"step {trainer.state.step}: saved {out / CHECKPOINT}", highlight=False, soft_wrap=True)
        if stopped is not None:
            console.print(f"stopped by {stopped.name}; continue with --resume")
            raise typer.Exit(128 + stopped)


for _task in TASKS:
    _add_train_command(_task)


@app.command("eval")
def evaluate_checkpoint(
    checkpoint: CheckpointArgument,
    steps: Annotated[Optional[list[int]], typer.Option(  # noqa: UP045 - typer reads it at run time
        help="inner steps of WRITE; may be repeated (default: 0, 1 and as trained; 0 for a writer without)")] = None,
    samples: Annotated[int, typer.Option(min=1, help="held-out contexts")] = 1024,
    data: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="file, or hub:NAME:SPLIT, to evaluate on (default: what the checkpoint was trained to be evaluated on); "
             "kv: JSON lines")] = None,
    text: Annotated[bool, typer.Option("--text", help="also generate the answers and score their text, with the "
                                                      "metrics of SQuAD; for tasks of files")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Print the exact match and the token accuracy of a checkpoint on held-out contexts."""
    loaded = Checkpoint.load(checkpoint)
    task = loaded.experiment.make_task(data)
    if text and not (isinstance(task, FileTask) and task.scored):
        raise DataError("--text: expected a task of files whose answers are texts (babi, squad, jsonl), got "
                        f"{loaded.experiment.data.task}; exact match and token accuracy tell all there is")
    model = loaded.trained(_device(device))
    table = Table(title=f"{checkpoint}, step {loaded.state.step}")
    columns = ("text exact match", "SQuAD exact match", "SQuAD F1") if text else ()
    for column in ("inner steps", "exact match", "token accuracy", "loss", "samples", *columns):
        table.add_column(column, justify="right")
    for k in steps or sorted({0, min(1, model.config.steps), model.config.steps}):
        result = evaluate(model, task, samples, steps=k)
        row = [f"{result.exact_match:.4f}", f"{result.token_accuracy:.4f}", f"{result.loss:.4f}", str(result.samples)]
        if text:
            assert isinstance(task, FileTask)
            scores = score_text(model, task, samples, steps=k)
            row += [f"{score:.4f}" for score in (scores.exact_match, scores.squad_exact_match, scores.squad_f1)]
        table.add_row(str(k), *row)
    if isinstance(task, KVTask):
        table.add_row("chance", f"{task.config.chance:.4f}", "", "", "")
    Console().print(table)


@app.command()
def write(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="memory file to write; with --input, a folder")],
    context: Annotated[Optional[Path], typer.Option(  # noqa: UP045 - typer reads it at run time
        help="text file with the context; a final newline does not count; - for the standard input")] = None,
    corpus: Annotated[Optional[Path], typer.Option(  # noqa: UP045
        "--input", help="JSON lines, each with context (a text) or context_ids, and an id: all are written")] = None,
    steps: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="inner steps (default: as trained)")] = None,
    batch_size: Annotated[Optional[int], typer.Option(  # noqa: UP045
        min=1, help="of --input: contexts written at once (default: 16)")] = None,
    max_tokens: Annotated[Optional[int], typer.Option(  # noqa: UP045
        min=1, help="of --input: longer contexts fail (default: what the model can read)")] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="of --input: stop at the first record that "
                                                                "fails")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="of --input: try records again that an earlier "
                                                                      "run could not write")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Write a context into a memory file, or a corpus into a folder of memories.

    A corpus may be written by several processes, started with torchrun. After an interruption the same command goes
    on. Records that cannot be written are listed in failures.jsonl, and the exit status is 1 then; --retry-failed tries
    them again.
    """
    if (context is None) == (corpus is None):
        raise DataError(f"expected one of --context and --input, got {'neither' if context is None else 'both'}")
    of_input = {"--batch-size": batch_size, "--max-tokens": max_tokens, "--fail-fast": fail_fast or None,
                "--retry-failed": retry_failed or None}
    for name, value in of_input.items():
        if corpus is None and value is not None:
            raise DataError(f"{name}: expected none with --context, got {value}; it is an option of --input")
    loaded = Checkpoint.load(checkpoint)
    model = loaded.model(_device(device))
    tokenizer = loaded.experiment.make_tokenizer()
    if corpus is not None:
        status = run_write_corpus(model, corpus, output, tokenizer, batch_size=16 if batch_size is None else batch_size,
                                  max_tokens=max_tokens, steps=steps, fail_fast=fail_fast, retry_failed=retry_failed)
        raise typer.Exit(status)
    assert context is not None
    if not output.parent.is_dir():
        raise DataError(f"{output}: its directory does not exist")
    try:
        text = sys.stdin.read() if str(context) == "-" else context.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as reason:
        raise DataError(f"{context}: not a text file: {reason}") from reason
    ids = tokenizer.encode(text.removesuffix("\n"))
    with torch.inference_mode():
        memory = model.write(torch.tensor([ids], dtype=torch.int64, device=model.memory_init.device), steps=steps)
    memory.save(output)
    typer.echo(f"{output}: {memory.tensor.shape[1]} memory vectors for {len(ids)} tokens")


@app.command()
def read(
    checkpoint: CheckpointArgument,
    memory: Annotated[Path, typer.Argument(help="memory file, or folder of a corpus")],
    query: Annotated[list[str], typer.Option(help="what to ask, such as '?!ab:'; may be repeated, or empty")],
    max_new_tokens: Annotated[Optional[int], typer.Option(  # noqa: UP045
        min=1, help="longest answer in tokens (default: that of the task; needed after training on files, but for "
                    "text)")] = None,
    record: Annotated[Optional[str], typer.Option(  # noqa: UP045
        "--id", help="of a folder: the record whose memory is read")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Answer queries from a memory: for each a line (or more, as its answer has) of query, tab and answer."""
    loaded = Checkpoint.load(checkpoint)
    data = loaded.experiment.data
    if max_new_tokens is None:
        if data.task == "text":
            max_new_tokens = data.chunk_tokens + 1
        elif data.data is not None:
            raise DataError("--max-new-tokens: expected the length of the longest answer, got none: the model was "
                            "trained on files")
        else:
            max_new_tokens = loaded.experiment.task.value_length + len(END)
    tokenizer, model = loaded.experiment.make_tokenizer(), loaded.model(_device(device))
    written = find_memory(memory, record, model)
    rows = [tokenizer.encode(text) for text in query]
    ids = torch.full((1, len(rows), max(map(len, rows))), tokenizer.pad_id)
    for i, row in enumerate(rows):
        ids[0, i, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([[len(row) for row in rows]])
    answers = model.generate(
        written, ids.to(model.memory_init.device), query_lengths=lengths.to(model.memory_init.device),
        max_new_tokens=max_new_tokens, eos_token_id=tokenizer.end_id)
    for text, answer in zip(query, answers[0].tolist(), strict=True):
        answer_text = tokenizer.answer(answer)
        typer.echo(f"{text}\t{answer_text.removeprefix(' ') if data.task in SPACED else answer_text}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="folder of a GradMemGPT of the paper's public code")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for gradmem.hf.GradMemForCausalLM to load")],
    backbone: Annotated[Optional[str], typer.Option(  # noqa: UP045 - typer reads it at run time
        help="name or directory of its language model (default: as its configuration says)")] = None,
) -> None:
    """Convert a checkpoint of the paper's public code; what has no counterpart is refused by its name."""
    tensors, config, base = read_gradmem_gpt(source, backbone)
    from gradmem.hf import GradMemForCausalLM  # needs transformers

    model = GradMemForCausalLM.from_backbone(base, convert_config(config, tensors))
    load_gradmem_gpt(model.gradmem, tensors)
    model.save_pretrained(output)
    typer.echo(f"{output}: {len(tensors)} tensors")


@app.command()
def doctor() -> None:
    """Print versions, devices, and which backend serves each op and why."""
    print_doctor(Console())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="directory for everything the demo makes; replaced")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="of the initial weights and the data")] = 0,
) -> None:
    """Train a small GradMem, write a context into a memory, and answer from that memory in a new process."""
    require_matplotlib()
    if not run_demo(Console(), out, seed):
        raise typer.Exit(1)


@reproduce_app.command("kv")
@config_options(ReproduceConfig)
def reproduce_kv(
    config: ReproduceConfig,
    method: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045 - typer reads it at run time
        metavar="|".join(METHODS), help="who writes; may be repeated, as the next three (default: all)")] = None,
    inner_steps: Annotated[Optional[list[int]], typer.Option(help="K")] = None,  # noqa: UP045
    pairs: Annotated[Optional[list[int]], typer.Option(help="pairs in a context")] = None,  # noqa: UP045
    seed: Annotated[Optional[list[int]], typer.Option(help="of weights and data")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="directory of the checkpoints")] = Path("runs/reproduce-kv"),
    results: Annotated[Optional[Path], typer.Option(  # noqa: UP045
        help="JSON lines, a row for each cell that has ended (default: rows.jsonl in --out)")] = None,
    page: Annotated[Optional[Path], typer.Option(  # noqa: UP045
        "--markdown", help="page whose table is made anew from the rows")] = None,
    run: Annotated[bool, typer.Option(help="run the cells, or only make the table")] = True,
) -> None:
    """Key-value retrieval: train every cell to its target or its budget, and print the table.

    Cells that have a row are not run again. After an interruption the same command goes on: a cell from its last
    checkpoint. A larger --max-steps continues cells that had ended at a smaller one.
    """
    preset, console = PRESETS[config.preset], Console()
    cells = select(preset, method or [], inner_steps or [], pairs or [], seed or [])
    file, stopped = results or out / "rows.jsonl", None
    if page is not None:  # before days of training
        replace_generated(page, preset, read_rows(file))
    if run:
        stopped = run_cells(config, cells, _device(config.device), out, file, console)
    rows = read_rows(file)
    if page is not None:
        replace_generated(page, preset, rows)
    console.width = max(console.width, 130)  # a file or a pipe says 80
    console.print(result_table(preset, rows))
    if stopped is not None:
        console.print(f"stopped by {stopped.name}; the same command continues")
        raise typer.Exit(128 + stopped)


def _device(name: str) -> torch.device:
    try:
        return torch.zeros(0, device=Ranks.here().device(name)).device
    except (RuntimeError, AssertionError) as reason:
        raise ArgumentError(f"device: expected one that torch can use here, got {name!r}: "
                            f"{str(reason).splitlines()[0]}") from reason
