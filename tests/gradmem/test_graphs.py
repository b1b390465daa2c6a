"""Graphs of WRITE and of the meta-step, with a tape in place of CUDA: buckets, buffers, results, errors."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeCapture
from torch import Tensor

from gradmem import Experiment, GradMem, GraphedStep, GraphedWrite, GraphError, Trainer, graphs
from gradmem.capture_guard import CaptureGuard
from gradmem.cli import app
from gradmem.graphs import Graphed, Input, bucket_length, graphs_wanted
from gradmem.step import StepOutput, meta_step
from gradmem.tasks.batch import IGNORE, Batch
from gradmem.training import CHECKPOINT
from gradmem_kernels import ArgumentError, checks

VOCAB = 20
MakeModel = Callable[..., GradMem]


@pytest.fixture(autouse=True)
def _values_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: values are not looked at, neither to check them nor to leave out padded rows."""
    monkeypatch.setattr("gradmem_kernels.reference.linear_cross_entropy._may_wait", lambda _: False)
    original = checks.check_values
    for module in list(sys.modules.values()):
        if getattr(module, "check_values", None) is original:
            monkeypatch.setattr(module, "check_values", lambda _: False)


def make_batch(seed: int = 0, *, context: int = 11, query: int = 5, size: int = 3, queries: int = 2) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids, query_ids = (torch.randint(VOCAB, shape, generator=g)
                      for shape in ((size, context), (size, queries, query)))
    mask = torch.zeros_like(query_ids, dtype=torch.bool)
    mask[..., -2:] = True
    lengths = torch.randint(context // 2, context + 1, (size,), generator=g)
    return Batch(ids, lengths, query_ids, query_ids.masked_fill(~mask, IGNORE), mask)


def make_optimizer(model: GradMem, lr: float = 0.02, **options: Any) -> torch.optim.Optimizer:
    # fused: the only one that is capturable on a CPU too
    return torch.optim.AdamW(model.parameters(), lr=torch.tensor(lr), fused=True, capturable=True, **options)


def weights(model: GradMem) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance), name


OPTIONS = [{"order": order, "recompute": recompute, "learn_inner_lr": learned, "inner_clip_norm": clip,
            "inner_clip_value": clip, "inner_loss_weight": 0.3}
           for order, recompute, (learned, clip) in itertools.product(
               ("none", "first", "second"), ("none", "step", "layer"), (("none", None), ("step", 0.05)))]
OPTIONS += [{"steps": 3, "second_order_steps": 1}, {"steps": 0}, {"write_head": True, "control_tokens": 2},
            {"memory_projection": "shared", "tie_embeddings": True},
            {"inner_optimizer": "momentum", "inner_nesterov": True, "learn_inner_lr": "token", "inner_clip_norm": 0.05},
            {"inner_optimizer": "adam", "inner_lr": 0.1, "learn_inner_lr": "step_token", "inner_clip_value": 0.05},
            {"inner_optimizer": "adam", "inner_lr": 0.1, "inner_eps_root": 1e-4, "inner_weight_decay": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_in_a_meta_step_or_a_write_prevents_its_capture(make_model: MakeModel, options: dict[str, Any]) -> None:
    model, batch = make_model(**options), make_batch()
    optimizer = make_optimizer(model)
    with CaptureGuard("test"):
        meta_step(model, optimizer, batch, grad_clip=0.5)
        with torch.no_grad():
            written = model._write(batch.context_ids, batch.context_lengths, model.config.steps)
    assert written.memory.isfinite().all()


@pytest.mark.parametrize(("reason", "run"), [
    ("reads a value on the host", lambda x: x.sum().item()),
    ("reads a value on the host", lambda x: bool((x > 0).all())),
    ("reads a value on the host", lambda x: torch.equal(x, x)),
    ("depends on values", lambda x: x.nonzero()),
    ("depends on values", lambda x: torch.masked_select(x, x > 0)),
    ("depends on values", lambda x: x.unique()),
    ("depends on values", lambda x: x.repeat_interleave(torch.tensor([1, 2, 0]), 0)),
    ("a mask selects", lambda x: x[x > 0]),
    ("a mask selects", lambda x: x.index_put_((x > 0,), torch.zeros(()))),
    ("random numbers", torch.nn.functional.dropout),
    ("random numbers", torch.randn_like),
    ("between devices", lambda x: x.to("meta")),
    ("between devices", lambda x: torch.empty_like(x, device="meta").copy_(x)),
])
def test_the_guard_refuses_what_cannot_be_captured(reason: str, run: Callable[[Tensor], Any]) -> None:
    with CaptureGuard("test"), pytest.raises(GraphError, match=rf"test: aten\..* {reason}"):
        run(torch.ones(3, 3))


def test_the_guard_lets_pass_what_can_be_captured() -> None:
    x = torch.ones(3, 3)
    with CaptureGuard("test"):
        torch.where(x > 0, x, 0)[torch.tensor([0, 1])].to(torch.float64).clone()
        torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])


def test_the_guard_keeps_what_it_did_not_make() -> None:
    outer = torch.ones(3)
    with CaptureGuard("test") as guard:
        made = outer[:2] * 2
        made.add_(1)
    assert set(guard.kept) == {outer.untyped_storage()._cdata}


def test_bucket_length() -> None:
    lengths = range(1, 5000)
    assert all(n <= bucket_length(n) <= max(1.25 * n, n + 7) for n in lengths)
    assert sorted({bucket_length(n) for n in lengths if n <= 128}) == [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert all(bucket_length(bucket_length(n)) == bucket_length(n) and bucket_length(n) % 8 == 0 for n in lengths)
    assert len({bucket_length(n) for n in lengths}) == 33


@pytest.mark.parametrize("options", [{"learn_inner_lr": "step", "inner_clip_norm": 0.05, "inner_loss_weight": 0.3},
                                     {"recompute": "none"}, {"recompute": "layer", "order": "first"},
                                     {"inner_optimizer": "adam", "inner_lr": 0.1, "inner_eps": 1e-2,
                                      "learn_inner_lr": "step_token"}], ids=str)
def test_graphed_steps_equal_plain_ones(make_model: MakeModel, options: dict[str, Any]) -> None:
    """Several steps in two buckets, a learning rate that changes, padding; against steps without padding."""
    plain, graphed = make_model(**options), make_model(**options)
    plain_optimizer, optimizer = make_optimizer(plain), make_optimizer(graphed)
    capture = TapeCapture()
    step = GraphedStep(graphed, optimizer, grad_clip=0.5, warmup=1, capture=capture)
    for i in range(7):
        batch = make_batch(i, context=(11, 20, 13)[i % 3], query=(5, 9, 7)[i % 3], queries=1 + (i % 3 == 1))
        for group in (*plain_optimizer.param_groups, *optimizer.param_groups):
            group["lr"].fill_(0.02 / (i + 1))
        expected, found = meta_step(plain, plain_optimizer, batch, 0.5), step(batch)
        assert_near(found._asdict(), expected._asdict())
        assert_near(weights(graphed), weights(plain))
    assert (capture.warmups, capture.records, capture.replays) == (2, 2, 5)
    assert not any(p.grad is not None for p in graphed.parameters())


@pytest.mark.parametrize("options", [{}, {"learn_inner_lr": "step"}, {"steps": 0},
                                     {"inner_optimizer": "adam", "inner_lr": 0.1, "learn_inner_lr": "token"}], ids=str)
def test_graphed_writes_equal_plain_ones(make_model: MakeModel, options: dict[str, Any]) -> None:
    model, capture = make_model(**options), TapeCapture()
    write = GraphedWrite(model, capture=capture)
    for i in range(10):
        batch = make_batch(i, context=(9, 20)[i % 2])
        lengths = None if i == 8 else batch.context_lengths
        steps = 3 if i == 9 else None
        with torch.inference_mode(i % 3 == 0):
            found, expected = (run(batch.context_ids, context_lengths=lengths, steps=steps)
                               for run in (write, model.write))
        assert torch.allclose(found.tensor, expected.tensor, rtol=1e-9, atol=1e-9)
        assert found.provenance == expected.provenance
    assert (capture.records, capture.replays) == (2, 5)
    with pytest.raises(ArgumentError, match=r"GradMem\.write: steps: expected an integer >= 0"):
        write(batch.context_ids, steps=-1)


def test_the_first_calls_of_a_bucket_count_and_a_capture_changes_nothing(make_model: MakeModel) -> None:
    model = make_model()
    step = GraphedStep(model, make_optimizer(model), warmup=1, capture=TapeCapture())
    seen = [weights(model)]
    for _ in range(3):
        step(make_batch())
        seen.append(weights(model))
    assert all(not torch.equal(a["memory_init"], b["memory_init"]) for a, b in itertools.pairwise(seen))
    assert {float(s["step"]) for s in step.graphed.optimizer.state.values()} == {3.0}  # type: ignore[union-attr]


def test_results_are_copies(make_model: MakeModel) -> None:
    model = make_model()
    step = GraphedStep(model, make_optimizer(model), warmup=1, capture=TapeCapture())
    outputs: list[StepOutput] = [step(make_batch(i)) for i in range(4)]
    assert len({float(out.loss) for out in outputs}) == 4


def test_a_replay_is_seen_by_whoever_asks_for_versions(make_model: MakeModel) -> None:
    model = make_model()
    step = GraphedStep(model, make_optimizer(model), warmup=1, capture=TapeCapture())
    prints = {model.fingerprint()}
    for i in range(3):
        step(make_batch(i))
        prints.add(model.fingerprint())
    assert len(prints) == 4


def test_a_step_that_is_not_finite_changes_nothing(make_model: MakeModel) -> None:
    model = make_model()
    step = GraphedStep(model, make_optimizer(model), warmup=1, capture=TapeCapture())
    for i in range(2):
        step(make_batch(i))
    with torch.no_grad():
        model.backbone.lm_head.weight[0, 0] = torch.nan
    before = weights(model)
    assert not step(make_batch(3)).grad_norm.isfinite()
    for name, weight in weights(model).items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())


def test_tables_outlive_their_replacement(make_model: MakeModel) -> None:
    """A longer context makes the decoder's rotary tables anew; graphs of shorter ones still read the old."""
    model, plain = make_model(), make_model()
    step = GraphedStep(model, make_optimizer(model), warmup=1, capture=TapeCapture())
    optimizer = make_optimizer(plain)
    for i, context in enumerate((9, 9, 150, 150, 9)):
        batch = make_batch(i, context=context)
        assert_near(step(batch)._asdict(), meta_step(plain, optimizer, batch)._asdict(), 1e-7)
        bucket = next(iter(step.graphed._buckets.values()))
    assert len(bucket.kept) >= len(list(model.parameters()))


def test_buckets_are_bounded_and_freed(make_model: MakeModel) -> None:
    model, capture = make_model(), TapeCapture()
    write = GraphedWrite(model, warmup=1, max_graphs=2, capture=capture)

    def run(context: int) -> None:
        for _ in range(2):
            write(make_batch(context=context).context_ids)

    for context in (8, 16, 8, 24):
        run(context)
    assert (len(write.graphed), capture.records) == (2, 3)
    run(8)  # used more recently than 16
    assert capture.records == 3
    with pytest.warns(UserWarning, match="GraphedWrite: captures shapes again .*max_graphs=2"):
        run(16)
    write.clear()
    assert len(write.graphed) == 0
    run(16)
    assert capture.records == 5


def test_what_chooses_kernels_has_graphs_of_its_own(make_model: MakeModel) -> None:
    model, capture = make_model(), TapeCapture()
    write = GraphedWrite(model, warmup=1, capture=capture)
    ids = make_batch().context_ids
    for _ in range(2):
        write(ids)
        write(ids.expand(4, -1, -1).flatten(0, 1))
        write(ids, steps=1)
        with torch.autocast("cpu", torch.bfloat16):
            write(ids)
    assert (len(write.graphed), capture.records, capture.replays) == (4, 4, 4)


def changed_data(model: GradMem, _: Any) -> None:
    model.memory_init.data = model.memory_init.data.clone()


def replaced(model: GradMem, _: Any) -> None:
    model.backbone.lm_head.weight = torch.nn.Parameter(model.backbone.lm_head.weight.detach().clone())


def frozen(model: GradMem, _: Any) -> None:
    model.memory_init.requires_grad_(False)


def reloaded(_: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def other_rate(_: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.1


def other_moments(_: Any, optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["exp_avg"] = state["exp_avg"].clone()


def other_decay(_: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5


@pytest.mark.parametrize(("change", "name"), [
    (changed_data, "memory_init"), (replaced, "backbone.lm_head.weight"), (frozen, "memory_init"),
    (reloaded, "lr of the optimizer's group 0"), (other_rate, "lr of the optimizer's group 0"),
    (other_moments, "exp_avg of parameter 0 in the optimizer's group 0"),
    (other_decay, "weight_decay of the optimizer's group 0"),
])
def test_what_a_graph_holds_must_stay(make_model: MakeModel, change: Callable[..., None], name: str) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    step = GraphedStep(model, optimizer, warmup=1, capture=TapeCapture())
    for i in range(2):
        step(make_batch(i))
    change(model, optimizer)
    with pytest.raises(GraphError, match=rf"GraphedStep: {name} was replaced or changed after the capture"):
        step(make_batch())


def test_what_chooses_kernels_has_a_bucket_of_its_own(make_model: MakeModel) -> None:
    model = make_model()
    step = GraphedStep(model, make_optimizer(model), warmup=1, capture=TapeCapture())
    step(make_batch())
    before = torch.get_float32_matmul_precision()
    try:
        torch.use_deterministic_algorithms(True)
        step(make_batch())
        assert len(step.graphed) == 2
        torch.set_float32_matmul_precision("high" if before != "high" else "highest")
        step(make_batch())
        assert len(step.graphed) == 3
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(before)


def test_a_model_on_the_cpu_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ArgumentError, match=r"GraphedStep: model: expected a model on a CUDA device, got one on cpu"):
        GraphedStep(model, make_optimizer(model))
    with pytest.raises(ArgumentError, match=r"GraphedWrite: model: expected a model on a CUDA device, got one on cpu"):
        GraphedWrite(model)
    with pytest.raises(ArgumentError, match=r"model: expected parameters on one device, got no parameters"):
        Graphed("x", lambda: None, torch.nn.Identity())


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True), "capturable=True, got capturable=False"),
    (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True, capturable=True), "a tensor on cpu for lr.* the number 0.1"),
    (lambda p: torch.optim.SGD(p, lr=0.1), "a tensor on cpu for lr"),
])
def test_an_optimizer_that_cannot_be_captured_is_refused(make_model: MakeModel, make: Callable[..., Any],
                                                         message: str) -> None:
    model = make_model()
    with pytest.raises(ArgumentError, match=rf"GraphedStep: optimizer group 0: expected {message}"):
        GraphedStep(model, make(model.parameters()), capture=TapeCapture())


def test_recompute_has_to_be_settled(make_model: MakeModel) -> None:
    model = make_model(recompute="auto")
    with pytest.raises(ArgumentError, match=r"GraphedStep: model: expected a recompute that is settled, got 'auto'"):
        GraphedStep(model, make_optimizer(model), capture=TapeCapture())


HOOKS: list[tuple[str, Callable[[GradMem, torch.optim.Optimizer], Any]]] = [
    ("module 'backbone.decoder': expected no hooks, got forward hooks",
     lambda m, _: m.backbone.decoder.register_forward_hook(lambda *_: None)),
    ("module '': expected no hooks, got forward pre hooks", lambda m, _: m.register_forward_pre_hook(lambda *_: None)),
    ("module 'backbone': expected no hooks, got backward hooks",
     lambda m, _: m.backbone.register_full_backward_hook(lambda *_: None)),
    ("parameter 'memory_init': expected no hooks, got backward hooks",
     lambda m, _: m.memory_init.register_hook(lambda g: g)),
    ("parameter 'memory_init': expected no hooks, got post accumulate grad hooks",
     lambda m, _: m.memory_init.register_post_accumulate_grad_hook(lambda _: None)),
    ("the optimizer: expected no hooks, got optimizer step pre hooks",
     lambda _, o: o.register_step_pre_hook(lambda *_: None)),
]


@pytest.mark.parametrize(("message", "add"), HOOKS, ids=[message for message, _ in HOOKS])
def test_hooks_are_refused_before_and_after(make_model: MakeModel, message: str, add: Callable[..., Any]) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    step = GraphedStep(model, optimizer, warmup=1, capture=TapeCapture())
    step(make_batch())
    add(model, optimizer)
    with pytest.raises(ArgumentError, match=message):
        step(make_batch())
    with pytest.raises(ArgumentError, match=message):
        GraphedStep(model, optimizer, capture=TapeCapture())


def test_code_that_cannot_be_captured_is_refused_before_it_is_captured(make_model: MakeModel) -> None:
    model, capture = make_model(), TapeCapture()
    graphed = Graphed("mine", lambda x: x * float(x.sum()), model, capture=capture)
    with pytest.raises(GraphError, match=r"mine: aten\._local_scalar_dense\.default cannot be captured"):
        graphed(Input(torch.ones(2), (4,)))
    assert capture.records == 0


def test_a_grad_scaler_in_a_function_of_ones_own() -> None:
    """With a fused optimizer its scale and its verdict stay on the device; with others it asks the host."""
    def train(graph: bool, **options: Any) -> Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=torch.tensor(0.1), **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = layer(x).square().mean()
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss.detach()

        graphed = Graphed("mine", step, layer, optimizer=optimizer, capture=TapeCapture())
        for i in range(5):
            x = torch.full((2, 4), float("inf")) if i == 3 else torch.full((2, 4), 1.0 + i)
            if graph:
                graphed(Input(x, (2, 4)))
            else:
                step(x)
        assert scaler.get_scale() == 4.0
        return layer.weight.detach()

    assert torch.allclose(train(True, fused=True), train(False, fused=True))
    with pytest.raises(GraphError, match="reads a value on the host"):
        train(True, foreach=False)


def test_when_graphs_are_wanted(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cpu, cuda = make_model(), torch.device("cpu"), torch.device("cuda")
    assert [graphs_wanted(mode, model, cuda) for mode in ("auto", "on", "off")] == [True, True, False]
    assert [graphs_wanted(mode, model, cpu) for mode in ("auto", "off")] == [False, False]
    monkeypatch.setattr(graphs, "SMALL_MODEL", 100)
    assert [graphs_wanted(mode, model, cuda) for mode in ("auto", "on", "off")] == [False, True, False]
    with pytest.raises(ArgumentError, match="TrainConfig: cuda_graphs: expected 'auto' or 'off' on device 'cpu'"):
        graphs_wanted("on", model, cpu)


def test_the_command_line_says_that_a_cpu_has_no_graphs(options: dict[str, Any], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["train", "kv", "--out", str(tmp_path / "run"), "--cuda-graphs", "on"])
    assert result.exit_code == 2
    assert "gradmem: error: TrainConfig: cuda_graphs: expected 'auto' or 'off' on device 'cpu'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_graphed_run_resumes_and_learns_the_same(options: dict[str, Any], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    options |= {"max_steps": 9, "start_pairs": 1, "advance_at": 0.9, "ema": 0.5, "learn_inner_lr": "step"}
    monkeypatch.setattr("gradmem.step.exact_match", lambda _, batch: torch.ones_like(batch.labels[..., 0]))
    plain = Trainer(Experiment.from_options({**options, "cuda_graphs": "off"}), tmp_path / "plain")
    plain.run()

    captures = []

    def capture(*_: Any) -> TapeCapture:
        captures.append(TapeCapture())
        return captures[-1]

    def capturable(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        return adamw(*args, **{**kwargs, "capturable": True})

    adamw = torch.optim.AdamW
    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr("gradmem.training.graphs_wanted", lambda mode, *_: mode == "on")
    monkeypatch.setattr(torch.optim, "AdamW", capturable)
    experiment = Experiment.from_options({**options, "cuda_graphs": "on"})
    whole = Trainer(experiment, tmp_path / "whole")
    whole.run()
    assert captures[0].replays > 0
    assert captures[0].records == 2  # one for each level
    parts = Trainer(experiment, tmp_path / "parts")
    parts.run(lambda state, _: os.kill(os.getpid(), signal.SIGINT) if state.step == 5 else None)
    parts = Trainer.resume(tmp_path / "parts", {})
    assert parts.graphs
    assert parts.config.cuda_graphs == "on"
    parts.run()
    assert (tmp_path / "parts" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()
    assert_near(weights(whole.model), weights(plain.model), 1e-4)  # float32, other shapes
    assert not Trainer.resume(tmp_path / "whole", {"cuda_graphs": "off"}).graphs
