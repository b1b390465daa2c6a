"""WRITE and the whole meta-training step as CUDA graphs, one for each bucket of shapes (docs/cuda_graphs.md)."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from gradmem.baselines import Model
from gradmem.capture_guard import CaptureGuard
from gradmem.errors import GraphError
from gradmem.memory import Memory
from gradmem.model import GradMem
from gradmem.step import StepOutput, meta_step
from gradmem.tasks.batch import IGNORE, Batch
from gradmem_kernels import backend as backends
from gradmem_kernels.checks import Checker

__all__ = ["SMALL_MODEL", "Capture", "CudaCapture", "Graphed", "GraphedStep", "GraphedWrite", "Input", "bucket_length",
           "graphs_wanted"]

#: Parameters up to which ``cuda_graphs="auto"`` captures. An estimate, see docs/cuda_graphs.md; not measured yet.
SMALL_MODEL = 100_000_000

_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def bucket_length(length: int) -> int:
    """``length`` rounded up to one of four sizes per power of two, and to a multiple of 8.

    Beyond 32 that adds less than a quarter, and lengths up to n need about ``4 log2(n)`` buckets.
    """
    unit = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return math.ceil(length / unit) * unit


def graphs_wanted(mode: str, model: nn.Module, device: torch.device, processes: int = 1) -> bool:
    """Whether to train with graphs: ``"on"``, ``"off"``, or ``"auto"`` for small models on CUDA devices.

    Raises:
        ArgumentError: for ``"on"`` on another device, or with several ``processes``, whose hooks a replay does not run.
    """
    if processes > 1:
        if mode == "on":
            Checker("TrainConfig").fail("cuda_graphs", "'auto' or 'off' with several processes", "'on'")
        return False
    if mode == "on" and device.type != "cuda":
        Checker("TrainConfig").fail("cuda_graphs", f"'auto' or 'off' on device {str(device)!r}", "'on'",
                                    "train on a CUDA device")
    small = sum(p.numel() for p in model.parameters()) <= SMALL_MODEL
    return mode == "on" or (mode == "auto" and device.type == "cuda" and small)


class Capture(Protocol):
    """How a function of fixed tensors becomes something that can be replayed."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Runs it as it is, in the surroundings of a capture."""

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Records it, without any effect; what comes back replays it and returns its, always same, output tensors."""


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool, on a stream of their own.

    Graphs of one pool may use the same memory, so they must not run at the same time, and what they return must be
    copied before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = run()
        current.wait_stream(self.stream)
        # the copies belong to the current stream; the originals' memory is used again on ours, after it
        return tree_map_only(Tensor, Tensor.clone, out)

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            outputs = run()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


def _capture(name: str, device: torch.device) -> Capture:
    if device.type != "cuda":
        Checker(name).fail("model", "a model on a CUDA device", f"one on {device}",
                           "move it with .to('cuda'), or go without graphs")
    return CudaCapture(device)


class Input(NamedTuple):
    """A tensor, and the shape that it is padded to, at the end of each dimension, with ``fill``."""

    value: Tensor
    shape: tuple[int, ...]
    fill: int = 0


@dataclass(eq=False)
class _Bucket:
    """Calls of the same shapes and settings: their input buffers and, after the warm-up, their graph."""

    buffers: tuple[Tensor, ...]
    warm: int = 0
    replay: Callable[[], Any] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    kept: dict[int, torch.UntypedStorage] = field(default_factory=dict)


class Graphed:
    """``function(*tensors, **options)`` as graphs.

    The first ``warmup`` calls of a bucket run the function as it is, and count: what they change is changed. The next
    one captures it, and it and all later ones replay the graph. Results are copies.

    Args:
        name: for the errors.
        function: reads its tensors, ``module`` and ``optimizer``, and returns tensors in tuples, lists or dicts.
        module: whose parameters it reads. They must stay where they are once a graph is captured.
        optimizer: which it steps, if any: capturable where it has that option, and with tensors for learning rates,
            which may be changed in place between calls.
        warmup: calls ahead of the capture, >= 1: they make what is made once (optimizer state, compiled kernels).
        max_graphs: buckets kept, >= 1; the one not used for longest is dropped for a new one.
        capture: how; by default into CUDA graphs.

    Raises:
        ArgumentError: for a module that is not on one CUDA device or has hooks, or an optimizer that is not capturable.
        GraphError: from a call: for an operation that cannot be captured, or for parameters, optimizer state or
            options that are no longer those of the capture.
    """

    def __init__(self, name: str, function: Callable[..., Any], module: nn.Module, *,
                 optimizer: torch.optim.Optimizer | None = None, warmup: int = 2, max_graphs: int = 16,
                 capture: Capture | None = None) -> None:
        check = Checker(name)
        check.integer("warmup", warmup, minimum=1)
        check.integer("max_graphs", max_graphs, minimum=1)
        self.name, self.function, self.module, self.optimizer = name, function, module, optimizer
        self.warmup, self.max_graphs = warmup, max_graphs
        self.device = _check_module(check, module)
        if optimizer is not None:
            _check_optimizer(check, optimizer, self.device)
        _check_hooks(check, module, optimizer)
        self.capture = _capture(name, self.device) if capture is None else capture
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()
        self._dropped: set[Hashable] = set()

    def __len__(self) -> int:
        """The number of buckets held."""
        return len(self._buckets)

    def clear(self) -> None:
        """Frees all graphs and buffers; later calls begin anew."""
        self._buckets.clear()
        self._dropped.clear()

    def __call__(self, *inputs: Input, **options: Hashable) -> Any:
        with torch.inference_mode(False):
            bucket = self._bucket(inputs, options)
            with torch.no_grad():
                for buffer, (value, _, fill) in zip(bucket.buffers, inputs, strict=True):
                    buffer.fill_(fill)
                    buffer[tuple(map(slice, value.shape))].copy_(value)
            if bucket.replay is None and bucket.warm < self.warmup:
                bucket.warm += 1
                return self.capture.warm_up(lambda: self._run(bucket, options))
            if bucket.replay is None:
                _check_hooks(Checker(self.name), self.module, self.optimizer)
                bucket.replay = self.capture.record(lambda: self._run(bucket, options))
                bucket.state = self._state()
            self._check_state(bucket)
            out = tree_map_only(Tensor, Tensor.clone, bucket.replay())
            if self.optimizer is not None:
                # a replay changes parameters unseen by autograd, and by whoever asks for their version
                increment_version([p for group in self.optimizer.param_groups for p in group["params"]])
            return out

    def _run(self, bucket: _Bucket, options: dict[str, Any]) -> Any:
        with CaptureGuard(self.name) as guard:
            out = self.function(*bucket.buffers, **options)
        bucket.kept = guard.kept
        return out

    def _bucket(self, inputs: Sequence[Input], options: dict[str, Hashable]) -> _Bucket:
        key = (tuple(sorted(options.items())), _settings(self.device),
               tuple((shape, value.dtype) for value, shape, _ in inputs))
        if key not in self._buckets:
            if key in self._dropped:
                warnings.warn(f"{self.name}: captures shapes again that it dropped, having room for max_graphs="
                              f"{self.max_graphs}; a larger one avoids that", stacklevel=4)
            self._buckets[key] = _Bucket(tuple(
                torch.empty(shape, dtype=value.dtype, device=self.device) for value, shape, _ in inputs))
            if len(self._buckets) > self.max_graphs:
                self._dropped.add(self._buckets.popitem(last=False)[0])
        self._buckets.move_to_end(key)
        return self._buckets[key]

    def _state(self) -> dict[str, Any]:
        """All that the graph holds by address or by value and that must not change."""
        return dict(_named_state(self.module, self.optimizer))

    def _check_state(self, bucket: _Bucket) -> None:
        now = self._state()
        if now != bucket.state:
            changed = next(n for n in {**bucket.state, **now} if bucket.state.get(n) != now.get(n))
            raise GraphError(f"{self.name}: {changed} was replaced or changed after the capture, and the graph holds "
                             f"what was there then; change tensors in place, or call clear()")


def _named_state(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Any]]:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        yield name, (tensor.data_ptr(), tensor.requires_grad)
    yield "the model's config", repr(getattr(module, "config", None))
    yield "train() or eval()", tuple(m.training for m in module.modules())
    for i, group in enumerate(() if optimizer is None else optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "initial_lr"):
                yield f"{key} of the optimizer's group {i}", value.data_ptr() if isinstance(value, Tensor) else value
        for j, p in enumerate(group["params"]):
            for key, value in optimizer.state.get(p, {}).items():  # type: ignore[union-attr]
                if isinstance(value, Tensor):
                    yield f"{key} of parameter {j} in the optimizer's group {i}", value.data_ptr()


def _settings(device: torch.device) -> tuple[Hashable, ...]:
    """What chooses kernels, beside shapes."""
    kind = device.type
    return (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), backends.requested(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())


def _check_module(check: Checker, module: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in [*module.parameters(), *module.buffers()]}
    if len(devices) != 1:
        check.fail("model", "parameters on one device", ", ".join(sorted(map(str, devices))) or "no parameters")
    return devices.pop()


def _check_optimizer(check: Checker, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for i, group in enumerate(optimizer.param_groups):
        where = f"optimizer group {i}"
        if not group.get("capturable", True):
            check.fail(where, "capturable=True", "capturable=False", "make the optimizer with capturable=True")
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != device:
            check.fail(where, f"a tensor on {device} for lr, so that it can change between replays",
                       f"one on {lr.device}" if isinstance(lr, Tensor) else f"the number {lr}",
                       f"make the optimizer with lr=torch.tensor(..., device='{device}')")


def _check_hooks(check: Checker, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    owners = [*((f"module {name!r}", m, _MODULE_HOOKS) for name, m in module.named_modules()),
              *((f"parameter {name!r}", p, _TENSOR_HOOKS) for name, p in module.named_parameters()),
              ("the optimizer", optimizer, _OPTIMIZER_HOOKS)]
    for where, owner, names in owners:
        for name in names:
            if getattr(owner, name, None):
                check.fail(where, "no hooks", name.strip("_").replace("_", " "),
                           "a replay runs no Python: remove them, or go without graphs")


class GraphedStep:
    """:func:`gradmem.step.meta_step` as CUDA graphs.

    Contexts and queries are padded to :func:`bucket_length`, which changes nothing beyond rounding: their lengths and
    labels are tensors. Batch sizes and numbers of queries are not padded.

    Args:
        model: on a CUDA device.
        optimizer: of its parameters; see :class:`Graphed`.
        grad_clip: largest norm of the outer gradient.
        warmup, max_graphs, capture: see :class:`Graphed`.

    Raises:
        ArgumentError, GraphError: see :class:`Graphed`.
    """

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, *, grad_clip: float = math.inf,
                 warmup: int = 2, max_graphs: int = 16, capture: Capture | None = None) -> None:
        if model.config.recompute == "auto":
            Checker("GraphedStep").fail(
                "model", "a recompute that is settled", "'auto', which looks at the memory that is free at each step",
                "GradMem.resolve_recompute(context_ids) tells what to put into its config")

        def step(*tensors: Tensor) -> StepOutput:
            with torch.enable_grad():
                return meta_step(model, optimizer, Batch(*tensors), grad_clip)

        self.graphed = Graphed("GraphedStep", step, model, optimizer=optimizer, warmup=warmup, max_graphs=max_graphs,
                               capture=capture)

    def __call__(self, batch: Batch) -> StepOutput:
        """Takes a step; ``batch`` may be on the host."""
        return self.graphed(_padded(batch.context_ids), _as_it_is(batch.context_lengths), _padded(batch.query_ids),
                            _padded(batch.labels, IGNORE), _padded(batch.value_mask))

    def clear(self) -> None:
        """Frees all graphs and buffers."""
        self.graphed.clear()


class GraphedWrite:
    """:meth:`GradMem.write` as CUDA graphs, for inference.

    Contexts are padded to :func:`bucket_length`. Arguments and errors are those of :class:`Graphed` and
    :meth:`GradMem.write`.
    """

    def __init__(self, model: GradMem, *, warmup: int = 2, max_graphs: int = 16,
                 capture: Capture | None = None) -> None:
        def write(ids: Tensor, lengths: Tensor, steps: int) -> Tensor:
            with torch.no_grad():
                return model._write(ids, lengths, steps).memory

        self.model = model
        self.graphed = Graphed("GraphedWrite", write, model, warmup=warmup, max_graphs=max_graphs, capture=capture)

    def __call__(self, context_ids: Tensor, *, context_lengths: Tensor | None = None,
                 steps: int | None = None) -> Memory:
        return self.model._written(self._write, context_ids, context_lengths, steps)

    def _write(self, ids: Tensor, lengths: Tensor | None, steps: int) -> Tensor:
        if lengths is None:
            lengths = torch.full((len(ids),), ids.shape[1])
        return self.graphed(_padded(ids), _as_it_is(lengths), steps=steps)

    def clear(self) -> None:
        """Frees all graphs and buffers."""
        self.graphed.clear()


def _as_it_is(value: Tensor) -> Input:
    return Input(value, tuple(value.shape))


def _padded(value: Tensor, fill: int = 0) -> Input:
    return Input(value, (*value.shape[:-1], bucket_length(value.shape[-1])), fill)
