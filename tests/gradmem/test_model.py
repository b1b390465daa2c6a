"""GradMem: what it computes, against plain PyTorch; what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem import Experiment, GradMem, GradMemConfig, LMConfig
from gradmem_kernels import ArgumentError

VOCAB = 20
MakeModel = Callable[..., GradMem]


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def plain_loss(model: GradMem, context: Tensor, query: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss and memory from the definition, differentiated by torch alone; one query per memory."""
    cfg, lm = model.config, model.backbone
    head = lm.head_weight if model.write_head is None else model.write_head
    memory = model.memory_init.expand(len(context), -1, -1)

    def predict(prefix: torch.nn.Module, memory: Tensor, tokens: Tensor, head: Tensor) -> Tensor:
        rows = prefix(memory)
        hidden = lm.decoder(torch.cat([rows, lm.embed_tokens(tokens)], 1))[:, rows.shape[1] - 1 : -1]
        return F.linear(hidden, head).transpose(1, 2)

    inner, grads = torch.zeros(()), []
    for k in range(cfg.steps):
        per_sample = F.cross_entropy(predict(model.write_prefix, memory, context, head), context,
                                     reduction="none").mean(1)
        inner = per_sample.mean()
        (grad,) = torch.autograd.grad(per_sample.sum(), memory, create_graph=True)
        if cfg.order == "first" or (cfg.second_order_steps is not None and k < cfg.steps - cfg.second_order_steps):
            grad = grad.detach()
        if cfg.inner_clip_norm is not None:
            norm = grad.flatten(1).norm(dim=1)[:, None, None]
            grad = torch.where(norm > cfg.inner_clip_norm, grad * (cfg.inner_clip_norm / (norm + 1e-6)), grad)
        grads.append(grad)
        memory = memory - cfg.inner_lr * plain_scale(model, k) * plain_direction(cfg, grads, memory)
    logits = predict(model.read_prefix, memory, query, lm.head_weight)
    return F.cross_entropy(logits, labels) + cfg.inner_loss_weight * inner, memory


def plain_scale(model: GradMem, k: int) -> Tensor | float:
    scale = model.inner_lr_scale
    if model.config.learn_inner_lr == "none":
        return 1.0
    assert scale is not None
    return {"step": lambda: scale[k], "token": lambda: scale.view(-1, 1),
            "step_token": lambda: scale[k].view(-1, 1)}[model.config.learn_inner_lr]()


def plain_direction(cfg: GradMemConfig, grads: list[Tensor], memory: Tensor) -> Tensor:
    """With the moments written out as sums over the gradients until now."""
    def moment(terms: list[Any], decay: float) -> Any:
        return sum(decay ** (len(terms) - 1 - j) * term for j, term in enumerate(terms))

    if cfg.inner_optimizer == "sgd":
        return grads[-1]
    if cfg.inner_optimizer == "momentum":
        decay = 0.9 if cfg.inner_momentum is None else cfg.inner_momentum
        return moment(grads, decay) * (decay if cfg.inner_nesterov else 1) + grads[-1] * cfg.inner_nesterov
    one, (b1, b2) = [1.0] * len(grads), (cfg.inner_beta1 or 0.9, cfg.inner_beta2 or 0.999)
    first = moment(grads, b1) / moment(one, b1)
    second = moment([g.square() for g in grads], b2) / moment(one, b2)
    root = (second + (cfg.inner_eps_root or 0.0)).sqrt()
    return first / (root + (cfg.inner_eps or 1e-8)) + (cfg.inner_weight_decay or 0.0) * memory


@pytest.mark.parametrize("options", [
    {},
    {"recompute": "none", "inner_loss_weight": 0.7},
    {"recompute": "layer", "inner_loss_weight": 0.7, "learn_inner_lr": "step"},
    {"write_head": True, "control_tokens": 2, "memory_projection": "shared", "learn_inner_lr": "step"},
    {"memory_projection": "shared", "inner_clip_norm": 0.05},
    {"tie_embeddings": True, "steps": 3, "second_order_steps": 1},
    {"order": "first", "write_head": True},
    {"steps": 0, "control_tokens": 1},
    {"inner_optimizer": "momentum", "learn_inner_lr": "token", "steps": 3},
    {"inner_optimizer": "momentum", "inner_momentum": 0.5, "inner_nesterov": True, "recompute": "none"},
    {"inner_optimizer": "adam", "inner_lr": 0.1, "learn_inner_lr": "step_token", "recompute": "layer"},
    {"inner_optimizer": "adam", "inner_lr": 0.1, "inner_beta1": 0.7, "inner_beta2": 0.8, "inner_eps": 1e-3,
     "inner_eps_root": 1e-4, "inner_weight_decay": 0.3, "inner_clip_norm": 0.05, "learn_inner_lr": "step"},
    {"inner_optimizer": "adam", "inner_lr": 0.1, "order": "first", "steps": 3},
], ids=str)
def test_loss_memory_and_gradients_match_plain_pytorch(make_model: MakeModel, options: dict) -> None:
    model = make_model(**options)
    context, query = ids(3, 7), ids(3, 5, seed=1)
    labels = query.masked_fill(torch.arange(5) < 2, -100)
    out = model(context, query, labels)
    loss, memory = plain_loss(model, context, query, labels)
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.memory, memory, rtol=1e-10, atol=1e-12)

    out.loss.backward()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for (name, weight), expected in zip(model.named_parameters(), gradients, strict=True):
        expected = torch.zeros_like(weight) if expected is None else expected
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert (found - expected).norm() <= 1e-9 * expected.norm() + 1e-15, name


def test_logits_align_with_the_query(make_model: MakeModel) -> None:
    model = make_model()
    context, query = ids(2, 6), ids(2, 4)
    other = query.clone()
    other[:, 1] = (other[:, 1] + 1) % VOCAB
    before, after = model(context, query).logits, model(context, other).logits
    torch.testing.assert_close(before[:, :2], after[:, :2], rtol=0, atol=0)  # tokens 0 and 1, predicted without token 1
    assert not torch.isclose(before[:, 2], after[:, 2]).all()


def test_loss_is_the_mean_over_all_labels(make_model: MakeModel) -> None:
    model = make_model(inner_loss_weight=0.5)
    context, query = ids(3, 6), ids(3, 2, 4)
    labels = query.clone()
    labels[0], labels[1, 1, :3] = -100, -100
    out = model(context, query, labels)
    expected = F.cross_entropy(out.logits.flatten(0, 2), labels.flatten()) + 0.5 * out.inner_losses[-1].mean()
    torch.testing.assert_close(out.loss, expected)
    assert out.inner_losses.shape == out.grad_norms.shape == (2, 3)
    assert model(context, query, torch.full_like(query, -100)).loss == 0.5 * out.inner_losses[-1].mean()
    assert model(context, query).loss is None


def test_write_and_read_are_the_two_halves_of_forward(make_model: MakeModel) -> None:
    model = make_model(control_tokens=1, learn_inner_lr="step")
    context, query = ids(2, 6), ids(2, 3, 4)
    out, memory = model(context, query), model.write(context)
    torch.testing.assert_close(memory.tensor, out.memory)
    torch.testing.assert_close(model.read(memory, query), out.logits)
    longer = model.read(memory, query, next_token=True)
    torch.testing.assert_close(longer[:, :, :-1], out.logits)
    for i in range(3):  # several queries of a memory do not see each other
        torch.testing.assert_close(model.read(memory, query[:, i], next_token=True), longer[:, i])


def test_write_without_grad_and_in_inference_mode(make_model: MakeModel) -> None:
    model = make_model()
    context, query = ids(2, 6), ids(2, 4)
    expected = model.write(context)
    assert expected.tensor.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            memory = model.write(context.clone(), context_lengths=torch.tensor([6, 6]))
            inside = model.read(memory, query.clone())
        torch.testing.assert_close(memory.tensor, expected.tensor.detach())
        assert not memory.tensor.requires_grad
        torch.testing.assert_close(model.read(memory, query).detach(), inside)


def test_steps_of_a_write(make_model: MakeModel) -> None:
    model = make_model(learn_inner_lr="step")
    context = ids(2, 6)
    assert torch.equal(model.write(context, steps=0).tensor, model.memory_init.expand(2, -1, -1))
    for steps in (1, 3):
        memory = model.write(context, steps=steps)
        scale = model.inner_lr_scale.tolist()
        rates = memory.provenance[0].inner_lr
        assert rates == pytest.approx([2.0 * s for s in (scale + scale[-1:])[:steps]])
        assert memory.provenance[0].steps == steps
    with torch.no_grad():
        model.inner_lr_scale.fill_(-1.0)  # a learned rate may be negative
    assert model.write(context).tensor.isfinite().all()


@pytest.mark.parametrize("rule", [{}, {"inner_optimizer": "momentum"}, {"inner_optimizer": "adam", "inner_lr": 0.1}],
                         ids=str)
def test_memory_depends_on_its_own_context_alone(make_model: MakeModel, rule: dict) -> None:
    model = make_model(control_tokens=1, inner_clip_norm=0.3, **rule)
    contexts, lengths = ids(3, 9), torch.tensor([9, 4, 1])
    together = model.write(contexts, context_lengths=lengths)
    other_padding = contexts.clone()
    other_padding[1, 4:], other_padding[2, 1:] = 0, 5
    torch.testing.assert_close(model.write(other_padding, context_lengths=lengths).tensor, together.tensor,
                               rtol=1e-12, atol=1e-13)
    for i, n in enumerate(lengths.tolist()):
        alone = model.write(contexts[i : i + 1, :n])
        torch.testing.assert_close(alone.tensor, together[i].tensor, rtol=1e-12, atol=1e-13)
        assert alone.provenance == together[i].provenance


def test_padding_does_not_change_gradients(make_model: MakeModel) -> None:
    model = make_model(inner_loss_weight=0.3)
    context, query = ids(2, 5), ids(2, 4)
    padded = F.pad(context, (0, 3), value=7)
    plain = torch.autograd.grad(model(context, query, query).loss, list(model.parameters()))
    loss = model(padded, query, query, torch.tensor([5, 5], dtype=torch.int32)).loss
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_generate_ragged_queries_equals_reading_one_by_one(make_model: MakeModel) -> None:
    model = make_model(control_tokens=1)
    memory = model.write(ids(2, 6))
    queries, lengths = ids(2, 3, 5, seed=3), torch.tensor([[5, 1, 3], [2, 0, 4]])
    out = model.generate(memory, queries, query_lengths=lengths, max_new_tokens=6)
    for i in range(2):
        for j in range(3):
            text = queries[i : i + 1, j, : lengths[i, j]]
            for _ in range(6):
                text = torch.cat([text, model.read(memory[i], text, next_token=True)[:, -1:].argmax(-1)], 1)
            assert out[i, j].tolist() == text[0, lengths[i, j] :].tolist()
    assert torch.equal(model.generate(memory, queries[:, 0, :2], max_new_tokens=3),
                       model.generate(memory, queries[:, :1, :2], max_new_tokens=3)[:, 0])
    assert torch.equal(model.generate(memory, queries[..., :0], max_new_tokens=6)[1, 2], out[1, 1])  # no query at all


def test_generate_stops_at_the_end_token(make_model: MakeModel) -> None:
    model = make_model()
    memory, queries = model.write(ids(2, 6)), ids(2, 3, 4)
    free = model.generate(memory, queries, max_new_tokens=8)
    end = free[0, 0, 2].item()
    stopped = model.generate(memory, queries, max_new_tokens=8, eos_token_id=end)
    for a, b in zip(free.flatten(0, 1).tolist(), stopped.flatten(0, 1).tolist(), strict=True):
        n = a.index(end) + 1 if end in a else 8
        assert b == a[:n] + [end] * (8 - n)
    one = model.generate(memory[0], queries[:1, :1], max_new_tokens=8, eos_token_id=end)  # all end early
    assert torch.equal(one, stopped[:1, :1])


def test_half_precision_model_keeps_its_memory_in_float32(make_model: MakeModel) -> None:
    model = make_model(learn_inner_lr="step", control_tokens=1).bfloat16()
    context, query = ids(2, 6), ids(2, 4)
    out = model(context, query, query)
    out.loss.backward()
    assert out.memory.dtype == torch.float32
    assert model.write(context).tensor.dtype == torch.float32
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.generate(model.write(context), query, max_new_tokens=2).shape == (2, 2)


def test_fingerprint_covers_what_read_uses(make_model: MakeModel) -> None:
    model = make_model(write_head=True, control_tokens=1, memory_projection="shared")
    first = model.fingerprint()
    assert make_model(write_head=True, control_tokens=1, memory_projection="shared").fingerprint() == first
    for unused in (model.write_head, model.memory_init, model.write_prefix.start):
        with torch.no_grad():
            unused.add_(1.0)
        assert model.fingerprint() == first
    seen = {first}
    for used in (model.backbone.lm_head.weight, model.read_prefix.start, model.write_prefix.projection.bias):
        with torch.no_grad():
            used.view(-1)[0] += 1e-3
        assert model.fingerprint() not in seen
        seen.add(model.fingerprint())
    assert model.float().fingerprint() not in seen


BAD_CALLS = [
    ("context_input_ids", lambda m: m(ids(6), ids(2, 4))),
    ("context_input_ids", lambda m: m(ids(2, 6).int(), ids(2, 4))),
    ("context_input_ids", lambda m: m(ids(2, 6).tolist(), ids(2, 4))),
    ("context_input_ids", lambda m: m(ids(2, 0), ids(2, 4))),
    ("context_input_ids", lambda m: m(ids(2, 6) + VOCAB, ids(2, 4))),
    ("context_input_ids", lambda m: m(ids(2, 6) - VOCAB, ids(2, 4))),
    ("context_input_ids", lambda m: m(ids(2, 6).to("meta"), ids(2, 4))),
    ("query_input_ids", lambda m: m(ids(2, 6), ids(3, 4))),
    ("query_input_ids", lambda m: m(ids(2, 6), ids(2, 4).float())),
    ("query_input_ids", lambda m: m(ids(2, 6), ids(2, 1, 1, 4))),
    ("query_input_ids", lambda m: m(ids(2, 6), ids(2, 3, 0))),
    ("labels", lambda m: m(ids(2, 6), ids(2, 4), ids(2, 5))),
    ("labels", lambda m: m(ids(2, 6), ids(2, 4), ids(2, 4) + VOCAB)),
    ("labels", lambda m: m(ids(2, 6), ids(2, 4), torch.full((2, 4), -1))),
    ("labels", lambda m: m(ids(2, 6), ids(2, 4), ids(2, 4).float())),
    ("context_lengths", lambda m: m(ids(2, 6), ids(2, 4), context_lengths=torch.tensor([6, 0]))),
    ("context_lengths", lambda m: m(ids(2, 6), ids(2, 4), context_lengths=torch.tensor([6, 7]))),
    ("context_lengths", lambda m: m(ids(2, 6), ids(2, 4), context_lengths=torch.tensor([6]))),
    (": context_ids", lambda m: m.write(ids(2, 0))),
    ("steps", lambda m: m.write(ids(2, 6), steps=-1)),
    ("steps", lambda m: m.write(ids(2, 6), steps=1.5)),
    ("memory", lambda m: m.read(m.write(ids(2, 6)).tensor, ids(2, 4))),
    ("memory", lambda m: m.read(_narrow(m.write(ids(2, 6))), ids(2, 4))),
    (": query_ids", lambda m: m.read(m.write(ids(2, 6)), ids(3, 4))),
    (": query_ids", lambda m: m.generate(m.write(ids(2, 6)), ids(3, 4), max_new_tokens=1)),
    ("max_new_tokens", lambda m: m.generate(m.write(ids(2, 6)), ids(2, 4), max_new_tokens=0)),
    ("query_lengths", lambda m: m.generate(m.write(ids(2, 6)), ids(2, 4), max_new_tokens=1,
                                           query_lengths=torch.tensor([1, 5]))),
    ("query_lengths", lambda m: m.generate(m.write(ids(2, 6)), ids(2, 4), max_new_tokens=1,
                                           query_lengths=torch.tensor([1.0, 2.0]))),
    ("eos_token_id", lambda m: m.generate(m.write(ids(2, 6)), ids(2, 4), max_new_tokens=1, eos_token_id="|")),
]


def _narrow(memory):
    return type(memory)(memory.tensor[:, :-1], memory.provenance)


def test_options_without_a_meaning_are_refused() -> None:
    with pytest.raises(ArgumentError, match="Experiment: memory_token: expected one of"):
        Experiment.from_options({"memory_token": 3})
    with pytest.raises(ArgumentError, match="key_length: expected at most 63 bits"):
        Experiment.from_options({"key_length": 11})


def test_everything_may_be_made_in_inference_mode(make_model: MakeModel) -> None:
    model = make_model(memory_projection="shared")
    with torch.inference_mode():
        memory, query = model.write(ids(2, 6)), ids(2, 4).clone()
    expected = model.write(ids(2, 6))
    assert torch.equal(model.read(memory, query), model.read(expected, ids(2, 4)))
    assert torch.equal(model.generate(memory, query, max_new_tokens=2),
                       model.generate(expected, ids(2, 4), max_new_tokens=2))


@pytest.mark.parametrize(("argument", "call"), BAD_CALLS)
def test_bad_inputs_are_refused_by_name(make_model: MakeModel, argument: str, call: Callable) -> None:
    with pytest.raises(ArgumentError, match=rf"{argument}: expected .*, got "):
        call(make_model())


@pytest.mark.parametrize(("config", "values"), [
    (GradMemConfig, {"steps": -1}), (GradMemConfig, {"steps": 1.0}), (GradMemConfig, {"steps": True}),
    (GradMemConfig, {"inner_lr": float("nan")}), (GradMemConfig, {"inner_lr": -0.1}),
    (GradMemConfig, {"order": "third"}), (GradMemConfig, {"recompute": "all"}), (GradMemConfig, {"memory_tokens": 0}),
    (GradMemConfig, {"inner_clip_norm": 0.0}), (GradMemConfig, {"write_head": 1}),
    (GradMemConfig, {"second_order_steps": 3}), (GradMemConfig, {"second_order_steps": 1, "order": "first"}),
    (GradMemConfig, {"learn_inner_lr": "step", "steps": 0}), (GradMemConfig, {"learn_inner_lr": "layer"}),
    (GradMemConfig, {"memory_projection": "rows"}),
    (LMConfig, {"hidden_size": 30}), (LMConfig, {"num_kv_heads": 3}), (LMConfig, {"norm_eps": float("inf")}),
    (LMConfig, {"wings": 2}),
], ids=str)
def test_bad_configurations_are_refused_by_name(config: type, values: dict) -> None:
    name = next(iter(values))
    with pytest.raises(ArgumentError, match=rf"{config.__name__}: {name}: expected "):
        config.from_dict(values)


def test_configurations_survive_json() -> None:
    config = GradMemConfig(steps=3, inner_lr=1, inner_clip_norm=0.5, second_order_steps=2, inner_optimizer="adam",
                           inner_eps=1, learn_inner_lr="token")
    assert GradMemConfig.from_dict(config.to_dict()) == config
    assert isinstance(config.inner_lr, float)
