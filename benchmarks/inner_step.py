"""WRITE alone, as inference does it: inner steps and tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager import token_loss
from benchmarks.harness import Options, Report, Result
from benchmarks.meta_step_providers import EAGER, INNER_LR, Model, Provider, captured, make_model
from benchmarks.shapes import LLAMA_1B, LLAMA_CHECKED, PAPER, QUICK
from benchmarks.whole_steps import Case, Need, measure, table
from gradmem_kernels import Prefix, PrefixLoss, write

__all__ = ["CPU", "CUDA", "DEVICES", "PROVIDERS", "run", "table"]

DEVICES = ("cpu", "cuda")
PROVIDERS = (Provider(EAGER.name, "write"), Provider("gradmem", "write"))
GRAPH = Provider("gradmem-graph", "write")
FORMULAS = {"flop_formula": "K * 2 F(context): a forward pass and the gradients of its rows",
            "byte_formula": "2 K W, W: bytes of all matrices, read once in each pass"}
STEPS = (1, 2, 5)
_LONG = replace(PAPER, batch=1, context_tokens=2048)
CPU = {torch.float32: [*(replace(PAPER, steps=k) for k in STEPS), _LONG]}
CUDA = {torch.float32: CPU[torch.float32], torch.bfloat16: [replace(LLAMA_1B, steps=k) for k in STEPS]}


def run(options: Options) -> Iterator[Report]:
    """A report of every provider for each shape of the device."""
    cuda = torch.device(options.device).type == "cuda"
    shapes = {torch.float32: [replace(QUICK, steps=k) for k in STEPS[:2]]} if options.quick else CUDA if cuda else CPU
    who = (*PROVIDERS, GRAPH) if cuda else PROVIDERS
    for dtype, at in shapes.items():
        for shape in at:
            cases = [Case("write", provider, shape, dtype, LLAMA_CHECKED if shape.tied else None) for provider in who]
            yield measure("inner-step", cases, options, check, prepare, need, FORMULAS)


def need(case: Case) -> Need:
    """Of a WRITE of K steps."""
    shape = case.shape
    passes = 2 * shape.steps
    # of the table and the head, only the head is read by a pass
    weights = (shape.weights() - (0 if shape.tied else shape.vocabulary * shape.width)) * case.dtype.itemsize
    return Need(steps=shape.steps, tokens=shape.steps * shape.batch * shape.context_tokens,
                flops=passes * shape.forward(shape.context_tokens), moved=float(passes * weights))


def prepare(case: Case, device: str) -> Callable[[], Tensor]:
    """``() -> [B, m, D]``, what WRITE has added to the memory."""
    plain = case.provider.name == EAGER.name
    model = make_model(EAGER if plain else Provider("gradmem", "step"), case.shape, case.computed, device=device,
                       rounded=case.dtype)
    for weight in model.weights.values():
        weight.requires_grad_(False)
    written = _eager_write if plain else _library_write

    def work() -> Tensor:
        memory = model.weights["memory"].expand(case.shape.batch, -1, -1)
        return written(model, memory, case.shape.steps) - memory

    return captured(work, device) if case.provider == GRAPH else work


def check(case: Case, device: str) -> Result:
    """The update of the memory, and its size."""
    update = prepare(case, device)()
    return update.norm(), {"memory": update}


def _eager_write(model: Model, memory: Tensor, steps: int) -> Tensor:
    """Without ``create_graph``: nobody differentiates through it."""
    tokens = F.embedding(model.context, model.weights["embedding"])
    for _ in range(steps):
        memory = memory.detach().requires_grad_()
        loss = token_loss(model.decoder, memory, tokens, model.context, model.head).sum()
        memory = memory - INNER_LR * torch.autograd.grad(loss, memory)[0]
    return memory.detach()


def _library_write(model: Model, memory: Tensor, steps: int) -> Tensor:
    with torch.no_grad():
        tokens = F.embedding(model.context, model.weights["embedding"])
        loss = PrefixLoss(model.decoder, Prefix(memory.shape[-1]), tokens, model.context, model.head)
        return write(loss, memory, steps=steps, lr=INNER_LR).memory
