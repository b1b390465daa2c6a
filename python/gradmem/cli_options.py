"""Command-line options made from the configurations, and what commands share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Optional, get_args, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from gradmem.baselines import WriterConfig
from gradmem.checkpoint import TrainState
from gradmem.config import Config, GradMemConfig, LMConfig
from gradmem.errors import GradMemError
from gradmem.experiment import BackboneConfig, TrainConfig
from gradmem.tasks import DataConfig, KVConfig
from gradmem.tasks.files import OPTION_OF
from gradmem.training import OnStep
from gradmem_kernels import ArgumentError, BackendError

__all__ = ["Commands", "config_options", "experiment_options", "progress", "progress_bar"]

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

_PANELS: dict[str, type[Config]] = {"Task": KVConfig, "Data": DataConfig, "Writer": WriterConfig,
                                    "Memory": GradMemConfig, "Model": LMConfig, "Backbone": BackboneConfig,
                                    "Training": TrainConfig}
_SET_BY_TASK = ("vocab_size", "task")
_OF_PAIRS = ("queries", "start_pairs", "advance_at")  # options of training that a context of one query does not have


class Commands(TyperGroup):
    """Shows errors that the user can do something about as one line, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (GradMemError, ArgumentError, BackendError, OSError) as error:
            typer.echo(f"gradmem: error: {error}", err=True)
            raise typer.Exit(2) from error


def experiment_options(task: str) -> Decorator:
    """Gives a command an option for every field of the configurations that ``task`` has; the command gets those that
    were used, and the task, as ``options``, by name."""
    added = [_parameter(config, field, panel) for panel, config in _PANELS.items()
             for field in dataclasses.fields(config) if _has(task, config, field.name)]
    return _adding(added, "options", lambda given: {"task": task, **given})


def config_options(config: type[Config]) -> Decorator:
    """Gives a command an option for every field of ``config``; the command gets the configuration as ``config``."""
    return _adding([_parameter(config, field, None) for field in dataclasses.fields(config)], "config",
                   config.from_dict)


def _adding(added: list[inspect.Parameter], argument: str, make: Callable[[dict[str, Any]], Any]) -> Decorator:
    """Gives a command the parameters ``added``; it gets what ``make`` makes of those that were used as ``argument``."""
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            given = {parameter.name: values.pop(parameter.name) for parameter in added}
            command(**values, **{argument: make({name: value for name, value in given.items() if value is not None})})

        signature = inspect.signature(command, eval_str=True)
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()
               if p.name != argument]
        with_options.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
        return with_options

    return decorate


def _has(task: str, config: type[Config], name: str) -> bool:
    if name in _SET_BY_TASK or OPTION_OF.get(name, task) != task:
        return False
    return config is not BackboneConfig if task == "kv" else config is not KVConfig and name not in _OF_PAIRS


def _parameter(config: type[Config], field: dataclasses.Field[Any], panel: str | None) -> inspect.Parameter:
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None,
                             annotation=_option(field, get_type_hints(config)[field.name], panel))


def _option(field: dataclasses.Field[Any], hint: Any, panel: str | None) -> Any:
    kind = (get_args(hint) or (hint,))[0]
    choices, default = field.metadata["choices"], field.default
    shown = "" if default is None else f" (default: {str(default).lower()})"
    return Annotated[Optional[kind], typer.Option(  # noqa: UP045 - typer reads it at run time
        help=field.metadata["help"] + shown, rich_help_panel=panel, metavar="|".join(choices) or None)]


def progress_bar(console: Console) -> Progress:
    """What all bars look like."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    TimeRemainingColumn(), console=console)


@contextlib.contextmanager
def progress(console: Console, max_steps: int, *, pairs: bool = True) -> Iterator[OnStep]:
    """A progress bar on a terminal, a line now and then elsewhere, with the number of pairs where there are some."""
    text = "loss {loss:.3f}  exact match {average:.2f}" + ("  pairs {level}" if pairs else "")
    if not console.is_terminal:
        every = max(1, max_steps // 50)

        def print_line(state: TrainState, entry: dict[str, Any]) -> None:
            if state.step % every == 0:
                console.print(f"step {state.step} of {max_steps}  {text.format(**entry)}", highlight=False)

        yield print_line
        return

    with progress_bar(console) as bar:
        task = bar.add_task("training", total=max_steps)

        def advance(state: TrainState, entry: dict[str, Any]) -> None:
            bar.update(task, completed=state.step, description=text.format(**entry))

        yield advance
