"""What users wait for: optimizer steps of training on key-value retrieval, and answers from written memories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.eager import EagerDecoder, eager_write
from benchmarks.harness import Options, Report, Result
from benchmarks.meta_step_providers import EAGER, Provider
from benchmarks.shapes import BYTE_FORMULA, FLOP_FORMULA, PAPER, QUICK, Shape
from benchmarks.whole_steps import Case, Need, measure, table
from gradmem import CausalLM, GradMem, GradMemConfig, LMConfig
from gradmem.graphs import GraphedStep
from gradmem.step import meta_step
from gradmem.tasks import Batch, KVConfig, KVTask

__all__ = ["DEVICES", "PROVIDERS", "run", "table"]

DEVICES = ("cpu", "cuda")
PROVIDERS = (EAGER, *(Provider("gradmem", mode) for mode in ("none", "step", "layer")))
GRAPH = Provider("gradmem-graph", "step")
READERS = (EAGER, Provider("gradmem", "step"))
FORMULAS = {"flop_formula": FLOP_FORMULA + "; answers: F(query) and F of each further token, weights alone",
            "byte_formula": BYTE_FORMULA + "; answers: W for each token"}
#: Characters of keys and values, so that there are 72 tokens with those of the format, and pairs of a context.
ALPHABET, PAIRS, QUICK_PAIRS = 62, 16, 2
GRAD_CLIP, LR = 1.0, 3e-3


def run(options: Options) -> Iterator[Report]:
    """A report of training by every provider, and one of answers by those that differ in them."""
    who = (*PROVIDERS, GRAPH) if torch.device(options.device).type == "cuda" else PROVIDERS
    base = QUICK if options.quick else PAPER
    task = make_task(base)
    batch, vocabulary = task.batch(0, 1), task.tokenizer.vocab_size
    shape = replace(base, vocabulary=vocabulary, context_tokens=batch.context_ids.shape[1],
                    query_tokens=batch.query_ids.shape[-1])
    for step, providers in (("train", who), ("answer", READERS)):
        cases = [Case(step, provider, shape, torch.float32) for provider in providers]
        yield measure("end-to-end", cases, options, check, prepare, need, FORMULAS)


def make_task(shape: Shape) -> KVTask:
    """The task of a model of this width."""
    pairs = QUICK_PAIRS if shape.width == QUICK.width else PAIRS
    return KVTask(KVConfig(pairs=pairs, alphabet_size=ALPHABET))


def need(case: Case) -> Need:
    """Of an optimizer step, or of an answer for each memory."""
    shape, bytes_of = case.shape, case.shape.weights() * case.dtype.itemsize
    if case.step == "train":
        return Need(1, shape.batch * shape.context_tokens, shape.flops(), shape.weight_bytes(case.dtype))
    new = make_task(shape).config.value_length
    each = 2.0 * shape.batch * (shape.weights() - shape.vocabulary * shape.width)
    return Need(shape.batch, shape.batch * new, shape.forward(shape.query_tokens) + (new - 1) * each,
                float(new * bytes_of))


def make_model(shape: Shape, recompute: str, dtype: torch.dtype, device: str) -> GradMem:
    """The library's model, from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = CausalLM(LMConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, num_layers=shape.layers, num_heads=shape.heads,
            num_kv_heads=shape.kv_heads, intermediate_size=shape.intermediate))
        model = GradMem(lm, GradMemConfig(memory_tokens=shape.memory_tokens, steps=shape.steps, recompute=recompute,
                                          inner_lr=1.0, memory_init_std=1.0))
    return model.to(device=device, dtype=dtype)


class EagerGradMem(nn.Module):
    """The same in plain PyTorch, with the same weights under the same names."""

    def __init__(self, model: GradMem, shape: Shape) -> None:
        super().__init__()
        self.config, self.memory_init = model.config, model.memory_init
        self.embedding, self.head = model.backbone.embed_tokens.weight, model.backbone.head_weight
        self.decoder = EagerDecoder(width=shape.width, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads,
                                    intermediate=shape.intermediate).to(self.head)
        self.decoder.load_state_dict(model.backbone.decoder.state_dict())

    def write(self, context: Tensor) -> Tensor:
        memory = self.memory_init.expand(len(context), -1, -1)
        return eager_write(self.decoder, memory, F.embedding(context, self.embedding), context, self.head,
                           steps=self.config.steps, lr=self.config.inner_lr)

    def logits(self, memory: Tensor, query: Tensor) -> Tensor:
        """Of the tokens of the query and the one after it: ``[B, T + 1, V]`` for ``query [B, T]``."""
        rows = torch.cat([memory, F.embedding(query, self.embedding)], 1)
        return F.linear(self.decoder(rows, memory.shape[1] - 1), self.head)

    def forward(self, batch: Batch) -> Tensor:
        logits = self.logits(self.write(batch.context_ids), batch.query_ids[:, 0, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())

    @torch.no_grad()
    def generate(self, memory: Tensor, query: Tensor, new: int) -> Tensor:
        for _ in range(new):
            query = torch.cat([query, self.logits(memory, query)[:, -1].argmax(-1, keepdim=True)], 1)
        return query[:, -new:]

    def train_step(self, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        self.zero_grad()
        self(batch).backward()
        nn.utils.clip_grad_norm_(self.parameters(), GRAD_CLIP)
        optimizer.step()


def prepare(case: Case, device: str) -> Callable[[], Any]:
    """One optimizer step on a batch, or answers from memories that are written before."""
    model, batch = _model_and_batch(case, device)
    if case.step == "answer":
        return _answers(model, batch, make_task(case.shape).config.value_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(LR, device=device), fused=True,
                                  capturable=torch.device(device).type == "cuda")
    if isinstance(model, EagerGradMem):
        return partial(model.train_step, optimizer, batch)
    if case.provider == GRAPH:
        step = GraphedStep(model, optimizer, grad_clip=GRAD_CLIP)
        for _ in range(3):  # the third one captures
            step(batch)
        return partial(step, batch)
    return partial(meta_step, model, optimizer, batch, GRAD_CLIP)


def _answers(model: GradMem | EagerGradMem, batch: Batch, new: int) -> Callable[[], Any]:
    asked = batch.query_ids[:, 0, : -new - 2]  # the answer ends with two tokens of the format
    if isinstance(model, EagerGradMem):
        return partial(model.generate, model.write(batch.context_ids).detach(), asked, new)
    with torch.no_grad():
        memory = model.write(batch.context_ids)
    return partial(model.generate, memory, asked, max_new_tokens=new)


def check(case: Case, device: str) -> Result:
    """The training loss and its gradients, from which the optimizer steps; of answers, their tokens and the query's
    logits."""
    model, batch = _model_and_batch(case, device)
    plain = isinstance(model, EagerGradMem)
    if case.step == "answer":
        query = batch.query_ids[:, 0]
        memory = model.write(batch.context_ids)
        logits = (model.logits(memory, query) if plain else model.read(memory, query, next_token=True)).detach()
        tokens = _answers(model, batch, make_task(case.shape).config.value_length)()
        return logits.norm(), {"logits": logits, "tokens": tokens.double()}
    loss = model(batch) if plain else model(batch.context_ids, batch.query_ids, batch.labels).loss
    loss.backward()
    names = model.decoder if plain else model.backbone.decoder
    gradients = {name: weight.grad for name, weight in names.named_parameters()} | {"memory": model.memory_init.grad}
    embedding, head = ((model.embedding, model.head) if plain
                       else (model.backbone.embed_tokens.weight, model.backbone.head_weight))
    return loss.detach(), gradients | {"embedding": embedding.grad, "head": head.grad}


def _model_and_batch(case: Case, device: str) -> tuple[GradMem | EagerGradMem, Batch]:
    plain = case.provider == EAGER
    # of one seed in the row's dtype, whatever computes
    model = make_model(case.shape, "step" if plain else case.provider.mode, case.dtype, device).to(case.computed)
    batch = make_task(case.shape).batch(0, case.shape.batch).to(device)
    return EagerGradMem(model, case.shape) if plain else model, batch
