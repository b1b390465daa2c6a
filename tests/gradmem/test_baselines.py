"""What GradMem is compared with: the forward writer's memory, and the plain model that reads the whole context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from gradmem import CausalLM, Checkpoint, CheckpointError, Experiment, GradMem, GradMemConfig, LMConfig, Trainer
from gradmem.baselines import ForwardWriter, FullContext, Model
from gradmem.baselines.rows import join
from gradmem.cli import app
from gradmem.step import meta_step
from gradmem.tasks import KVTask
from gradmem.training import CHECKPOINT
from gradmem_kernels import ArgumentError

VOCAB, WIDTH = 20, 16


def make(kind: Callable[..., Model], **options: Any) -> Any:
    torch.manual_seed(0)
    lm = LMConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_layers=2, num_heads=2, intermediate_size=24)
    model = kind(CausalLM(lm, dtype=torch.float64), GradMemConfig(**{"memory_tokens": 3, "steps": 0, **options}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def plain(model: Any, rows: Tensor) -> Tensor:
    """Logits of the backbone as a language model, ``[B, S, V]``."""
    return F.linear(model.backbone.decoder(model.backbone.embed_tokens(rows)), model.backbone.head_weight)


@pytest.mark.parametrize("control_tokens", [0, 2])
def test_the_forward_memory_is_the_hidden_states_behind_each_context(control_tokens: int) -> None:
    """Of [memory; context; memory] with control tokens as in the paper's code: start and end in front, start behind."""
    model = make(ForwardWriter, control_tokens=control_tokens, memory_projection="shared")
    contexts, lengths = ids(3, 7), torch.tensor([7, 4, 1])
    memory = model.write(contexts, context_lengths=lengths).tensor
    assert memory.shape == (3, 3, WIDTH) == make(GradMem, steps=1).write(contexts).tensor.shape
    before = behind = model.write_prefix.projection(model.memory_init.unsqueeze(0))
    if control_tokens:
        start, end = model.write_prefix.start.unsqueeze(0), model.write_prefix.end.unsqueeze(0)
        before, behind = torch.cat([start, before, end], 1), torch.cat([start, before], 1)
    assert model.written_rows == before.shape[1] + behind.shape[1]
    for i, length in enumerate(lengths.tolist()):
        alone = torch.cat([before, model.backbone.embed_tokens(contexts[i : i + 1, :length]), behind], 1)
        torch.testing.assert_close(memory[i], model.backbone.decoder(alone)[0, -3:])
    torch.testing.assert_close(model.write(contexts).tensor[0], memory[0])


def test_reading_from_a_forward_memory_sees_no_context() -> None:
    model = make(ForwardWriter)
    contexts, queries = ids(2, 6), ids(2, 5, seed=2)
    memory = model.write(contexts)
    before = model.read(memory, queries)
    contexts.copy_(ids(2, 6, seed=3))
    assert torch.equal(model.read(memory, queries), before)
    prefix, embeds = model.read_prefix(memory.tensor), model.backbone.embed_tokens(queries[:, :-1])
    hidden = model.backbone.decoder(torch.cat([prefix, embeds], 1))[:, 2:]
    torch.testing.assert_close(before, F.linear(hidden, model.backbone.head_weight))
    assert not torch.allclose(model.read(model.write(contexts), queries), before)


def test_the_forward_writer_is_trained_end_to_end() -> None:
    """The gradient of READ reaches the learned vectors and the embeddings of tokens that only the context has."""
    model = make(ForwardWriter, control_tokens=1, memory_projection="shared")
    contexts, queries = ids(2, 6) % 10, 10 + ids(2, 4, seed=2) % 10
    model(contexts, queries, queries).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name
    assert model.backbone.embed_tokens.weight.grad[contexts.flatten()].abs().sum(1).min() > 0

    def loss(vectors: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"memory_init": vectors}, (contexts, queries, queries)).loss

    assert torch.autograd.gradcheck(loss, model.memory_init.detach().clone().requires_grad_())


def test_the_full_context_is_a_plain_language_model() -> None:
    model = make(FullContext)
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"backbone"}
    contexts, lengths, queries = ids(3, 7), torch.tensor([7, 4, 1]), ids(3, 2, 5, seed=2)
    labels = queries.masked_fill(torch.arange(5) < 3, -100)
    out = model(contexts, queries, labels, lengths)
    losses = []
    for i, length in enumerate(lengths.tolist()):
        for j in range(2):
            expected = plain(model, torch.cat([contexts[i, :length], queries[i, j]]).unsqueeze(0))[0, length - 1 : -1]
            torch.testing.assert_close(out.logits[i, j], expected)
            losses.append(F.cross_entropy(expected[3:], queries[i, j, 3:]))
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())
    torch.testing.assert_close(model.read(model.write(contexts, context_lengths=lengths), queries), out.logits)
    torch.testing.assert_close(model(contexts, queries[:, 0]).logits,
                               plain(model, torch.cat([contexts, queries[:, 0]], 1))[:, 6:-1])


def test_the_full_context_generates_what_is_most_likely() -> None:
    model = make(FullContext)
    contexts, lengths = ids(2, 6), torch.tensor([6, 3])
    queries, query_lengths = ids(2, 2, 4, seed=2), torch.tensor([[4, 2], [0, 3]])
    got = model.generate(model.write(contexts, context_lengths=lengths), queries, max_new_tokens=3,
                         query_lengths=query_lengths)
    for i in range(2):
        for j in range(2):
            row = torch.cat([contexts[i, : lengths[i]], queries[i, j, : query_lengths[i, j]]])
            for _ in range(3):
                row = torch.cat([row, plain(model, row.unsqueeze(0))[0, -1].argmax().unsqueeze(0)])
            assert torch.equal(got[i, j], row[-3:])
    assert model.read(model.write(contexts), queries[..., :0], next_token=True).shape == (2, 2, 1, VOCAB)


def test_rows_behind_padded_contexts() -> None:
    context, rows = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[7, 8], [9, 10]])
    joined, at = join(context, torch.tensor([3, 1]), rows)
    assert joined.tolist() == [[1, 2, 3, 7, 8], [4, 9, 10, 0, 0]]
    assert at.tolist() == [[3, 4], [1, 2]]
    assert join(context, None, rows)[0].tolist() == [[1, 2, 3, 7, 8], [4, 0, 0, 9, 10]]


@pytest.mark.parametrize("kind", [ForwardWriter, FullContext])
def test_baselines_refuse_inner_steps(kind: Callable[..., Model]) -> None:
    with pytest.raises(ArgumentError, match="GradMemConfig: steps: expected 0 for a writer without"):
        make(kind, steps=1)
    with pytest.raises(ArgumentError, match="write: steps: expected 0: it takes no gradient steps, got 2"):
        make(kind).write(ids(1, 3), steps=2)


def test_the_full_context_refuses_what_it_cannot_use() -> None:
    model = make(FullContext)
    for call, message in ((lambda: model.read(ids(1, 3), ids(1, 3)), "memory: expected a HeldContext"),
                          (lambda: model.write(ids(1, 3) + VOCAB), "context_ids: expected token ids"),
                          (lambda: model.write(ids(1, 0)), "context_ids: expected at least one token"),
                          (lambda: model(ids(2, 3), ids(1, 3)), "query_input_ids: expected shape")):
        with pytest.raises(ArgumentError, match=message):
            call()


@pytest.mark.parametrize("writer", ["forward", "context"])
def test_training_with_another_writer(options: dict[str, Any], tmp_path: Path, writer: str) -> None:
    """By one option; the rest is as for GradMem: resumption, evaluation, graphs' step."""
    del options["steps"], options["inner_lr"]
    experiment = Experiment.from_options({**options, "writer": writer, "recompute": "auto"})
    assert experiment.gradmem.steps == 0
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment
    trainer = Trainer(experiment, tmp_path)
    kinds: dict[str, Any] = {"forward": ForwardWriter, "context": FullContext}
    assert isinstance(trainer.model, kinds[writer])
    assert trainer.model.config.recompute == "none"
    trainer.run()
    resumed = Trainer.resume(tmp_path, {})
    for (name, a), b in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    result = CliRunner().invoke(app, ["eval", str(tmp_path / CHECKPOINT), "--samples", "8"])
    assert result.exit_code == 0, result.output
    steps = [line.split("│")[1].strip() for line in result.output.splitlines() if "│" in line]
    assert steps == ["0", "chance"]
    loaded = Checkpoint.load(tmp_path / CHECKPOINT)
    if writer == "forward":
        assert isinstance(loaded.model(), ForwardWriter)
    else:
        with pytest.raises(CheckpointError, match="a model that writes memories, got one trained with writer="):
            loaded.model()


@pytest.mark.parametrize("writer", ["forward", "context"])
def test_padding_to_a_bucket_changes_nothing(options: dict[str, Any], writer: str) -> None:
    """As steps that are captured into graphs pad contexts."""
    del options["steps"], options["inner_lr"]
    experiment = Experiment.from_options({**options, "writer": writer})
    batch = KVTask(experiment.task).batch(0, 4)
    padded = type(batch)(F.pad(batch.context_ids, (0, 5)), batch.context_lengths, batch.query_ids, batch.labels,
                         batch.value_mask)
    losses = []
    for one in (batch, padded):
        model = experiment.make_model()
        losses.append(meta_step(model, torch.optim.SGD(model.parameters(), lr=0.1), one).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("writer", "values"), [
    ("forward", {"steps": 1}), ("forward", {"write_head": True}), ("context", {"inner_loss_weight": 0.5}),
    ("context", {"control_tokens": 1}), ("context", {"memory_projection": "shared"}), ("forward", {"inner_lr": 0.1}),
    ("context", {"inner_clip_norm": 1.0}), ("forward", {"order": "first"}), ("context", {"freeze_backbone": True}),
    ("forward", {"write_lora_rank": 2}), ("forward", {"memory_projection": "per_sample"})])
def test_options_that_a_writer_does_not_read_are_refused(options: dict[str, Any], writer: str,
                                                         values: dict[str, Any]) -> None:
    (name, value), = values.items()
    del options["steps"], options["inner_lr"]
    with pytest.raises(ArgumentError, match=rf"GradMemConfig: {name}: expected .* where the writer is '{writer}'"):
        Experiment.from_options({**options, "writer": writer, name: value})
