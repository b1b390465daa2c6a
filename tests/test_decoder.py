"""The decoder, the prefix and their loss against plain PyTorch, plain and dual, and through the KV cache."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from gradmem_kernels import Decoder, DecoderConfig, Prefix, PrefixLoss, write
from gradmem_kernels import backend as backends
from gradmem_kernels.checks import ArgumentError
from gradmem_kernels.decoder import RopeScaling

F64 = torch.float64
SHAPES = [
    DecoderConfig(8, 2, 2, 12),
    DecoderConfig(12, 1, 3, 5, num_kv_heads=1, head_dim=6, rotary_dim=4, rope_theta=100.0, norm_eps=1e-3),
    DecoderConfig(8, 2, 4, 7, num_kv_heads=2),
]


def make(config: DecoderConfig) -> Decoder:
    decoder = Decoder(config, dtype=F64)
    for p in decoder.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return decoder


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_forward_equals_plain(config: DecoderConfig) -> None:
    decoder = make(config)
    x = torch.randn(2, 7, config.hidden_size, dtype=F64, requires_grad=True)
    inputs = (x, *decoder.parameters())
    ours, theirs = decoder(x, start=3), plain.decode(decoder, x)[:, 3:]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours.sin().sum(), inputs), torch.autograd.grad(theirs.sin().sum(), inputs),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_dual_equals_jvp_and_its_gradient(config: DecoderConfig, checkpoint_layers: bool) -> None:
    decoder = make(config)
    x, x_t = (torch.randn(2, 5, config.hidden_size, dtype=F64, requires_grad=True) for _ in range(2))
    hidden, hidden_t = decoder.dual(x, x_t, start=1, checkpoint_layers=checkpoint_layers)
    # the tangent as a derivative of a derivative: <c, J x_t> differentiated by c
    c = torch.zeros(2, 4, config.hidden_size, dtype=F64, requires_grad=True)
    y = plain.decode(decoder, x)[:, 1:]
    pulled, = torch.autograd.grad(y, x, c, create_graph=True)
    y_t, = torch.autograd.grad(pulled, c, x_t, create_graph=True)
    torch.testing.assert_close(hidden, y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hidden_t, y_t, rtol=1e-9, atol=1e-11)
    inputs = (x, x_t, *decoder.parameters())
    ours = torch.autograd.grad(hidden.sin().sum() + hidden_t.square().sum(), inputs)
    theirs = torch.autograd.grad(y.sin().sum() + y_t.square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_checkpointed_layers_run_again_as_often_as_they_are_asked() -> None:
    """Each time in the context that the caller has set."""
    decoder, entered = make(SHAPES[0]), []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        entered.append(True)
        yield

    x, x_t = (torch.randn(2, 5, 8, dtype=F64, requires_grad=True) for _ in range(2))
    plain_dual = sum(t.sin().sum() for t in decoder.dual(x, x_t))
    decoder.recompute_context = context
    checkpointed = sum(t.sin().sum() for t in decoder.dual(x, x_t, checkpoint_layers=True))
    expected = torch.autograd.grad(plain_dual, (x, x_t))
    for _ in range(2):
        before = len(entered)
        for a, b in zip(torch.autograd.grad(checkpointed, (x, x_t), retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert len(entered) == before + decoder.config.num_layers


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_cache_equals_full_forward(config: DecoderConfig) -> None:
    decoder = make(config)
    prefix = torch.randn(2, 3, config.hidden_size, dtype=F64)
    queries = torch.randn(4, 6, config.hidden_size, dtype=F64)  # two for each prefix
    cache = decoder.new_cache(2, 3)
    decoder.prefill(prefix, cache)
    cache = cache.repeat(2, 9)
    first = decoder.prefill(queries[:, :4], cache)
    rest = [decoder.step(queries[:, t : t + 1], cache) for t in (4, 5)]
    full = decoder(torch.cat([prefix.repeat_interleave(2, 0), queries], 1), start=3)
    torch.testing.assert_close(torch.cat([first, *rest], 1), full, rtol=1e-10, atol=1e-12)


def test_ragged_cache_equals_each_row_alone() -> None:
    decoder = make(SHAPES[2])
    x, extra = torch.randn(3, 5, 8, dtype=F64), torch.randn(3, 2, 8, dtype=F64)
    lengths = torch.tensor([5, 2, 0])
    cache = decoder.new_cache(3, 7)
    decoder.prefill(x, cache)
    cache.truncate(lengths)
    steps = torch.cat([decoder.step(extra[:, t : t + 1], cache) for t in range(2)], 1)
    for row, length in enumerate(lengths.tolist()):
        alone = decoder(torch.cat([x[row, :length], extra[row]])[None], start=length)
        torch.testing.assert_close(steps[row : row + 1], alone, rtol=1e-10, atol=1e-12)
    with pytest.raises(ArgumentError, match="rows of one length"):
        decoder.prefill(extra, cache)
    with pytest.raises(ArgumentError, match="room for 8 positions"):
        decoder.step(extra[:, :1], cache)


def test_tables_made_under_inference_mode_serve_training() -> None:
    decoder = make(SHAPES[0])
    x = torch.randn(1, 70, 8, dtype=F64, requires_grad=True)
    with torch.inference_mode():
        decoder(x[:, :4])
    decoder(x).sum().backward()
    assert x.grad is not None


def test_write_does_no_weight_gradient_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmem_kernels.reference import linear_cross_entropy, rms_norm

    monkeypatch.setattr(backends, "BACKENDS", ("reference",))
    decoder, prefix = make(SHAPES[0]), Prefix(8, dtype=F64)
    table = torch.randn(5, 8, dtype=F64, requires_grad=True)
    tokens = torch.randint(5, (2, 4))
    asked: list[tuple[bool, ...]] = []
    for module in (rms_norm, linear_cross_entropy):
        def spy(*args: Any, backward: Any = module.backward, **options: Any) -> Any:
            asked.append(args[5])
            return backward(*args, **options)

        monkeypatch.setattr(module, "backward", spy)
    loss = PrefixLoss(decoder, prefix, table[tokens], tokens, table)
    memory = torch.randn(2, 3, 8, dtype=F64, requires_grad=True)
    write(loss, memory, steps=1, lr=0.1)
    assert len(asked) == 2 * 2 + 1 + 1
    assert all(needs[0] and not any(needs[1:]) for needs in asked)


@pytest.mark.parametrize("recompute", ["step", "layer"])
def test_outer_backward_does_no_work_for_gradients_that_are_not_asked_for(recompute: str,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmem_kernels.reference import linear_cross_entropy, rms_norm

    monkeypatch.setattr(backends, "BACKENDS", ("reference",))
    decoder, prefix = make(SHAPES[0]), Prefix(8, dtype=F64)
    table = torch.randn(5, 8, dtype=F64, requires_grad=True)
    memory, tokens = torch.randn(2, 3, 8, dtype=F64, requires_grad=True), torch.randint(5, (2, 4))
    out = write(PrefixLoss(decoder, prefix, table[tokens], tokens, table), memory, steps=2, lr=0.1, recompute=recompute)
    weights = (table, *decoder.parameters())
    expected, *_ = torch.autograd.grad(out.memory.square().sum(), (memory, *weights), retain_graph=True)
    asked: list[tuple[bool, ...]] = []
    for module in (rms_norm, linear_cross_entropy):
        def spy(*args: Any, dual_backward: Any = module.dual_backward, **options: Any) -> Any:
            asked.append(args[8])
            return dual_backward(*args, **options)

        monkeypatch.setattr(module, "dual_backward", spy)

    def head(*args: Any, dual_forward: Any = linear_cross_entropy.dual_forward, **options: Any) -> Any:
        asked.append(options["early"][:3])
        return dual_forward(*args, **options)

    monkeypatch.setattr(linear_cross_entropy, "dual_forward", head)
    found, = torch.autograd.grad(out.memory.square().sum(), memory)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert len(asked) == 2 * (2 * 2 + 1 + 2)
    assert all(needs[0] and not any(needs[1:]) for needs in asked)
    assert all(p.requires_grad for p in weights)


@pytest.mark.parametrize("control_tokens", [0, 2])
@pytest.mark.parametrize("projection", [False, True])
def test_prefix(control_tokens: int, projection: bool) -> None:
    prefix = Prefix(4, control_tokens=control_tokens, projection=projection, dtype=F64)
    for p in prefix.parameters():
        torch.nn.init.normal_(p)
    memory, memory_t = (torch.randn(2, 3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    rows = prefix(memory)
    assert rows.shape[1] == prefix.length(3) == 3 + 2 * control_tokens
    torch.testing.assert_close(rows, plain.prefix_rows(prefix, memory))
    both, tangent = prefix.dual(memory, memory_t), torch.func.jvp(lambda m: plain.prefix_rows(prefix, m),
                                                                  (memory,), (memory_t,))[1]
    torch.testing.assert_close(both, torch.stack([rows, tangent]))


@pytest.mark.parametrize("per_sample", [False, True])
def test_fast_weights_are_those_of_the_prefix(per_sample: bool) -> None:
    prefix, memory = Prefix(8, projection=True, per_sample=per_sample), torch.randn(2, 3, 8)
    given, expected = ((), "weight and bias of each sample") if per_sample else (
        (torch.randn(2, 8, 8), torch.randn(2, 8)), "nothing, as the prefix is not per sample")
    for run, tensors in ((prefix, (memory, *given)), (prefix.dual, (memory, *given, memory, *given))):
        with pytest.raises(ArgumentError, match=rf"Prefix: fast: expected {expected}, got {len(given)} tensor"):
            run(*tensors)


@pytest.mark.parametrize(("options", "message"), [
    ({"hidden_size": 0}, "hidden_size: expected an integer >= 1, got 0"),
    ({"control_tokens": -1}, "control_tokens: expected an integer >= 0, got -1"),
    ({"projection": "none"}, "projection: expected True or False, got none"),
    ({"per_sample": 1, "projection": True}, "per_sample: expected True or False, got 1"),
    ({"per_sample": True}, "per_sample: expected False without projection, got True"),
])
def test_bad_prefix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"Prefix: {message}"):
        Prefix(**{"hidden_size": 8, **options})


def test_new_projection_is_the_identity() -> None:
    memory = torch.randn(2, 3, 4)
    torch.testing.assert_close(Prefix(4, projection=True)(memory), memory)


def test_half_precision_decoder_keeps_the_memory_in_float32() -> None:
    decoder, prefix = Decoder(SHAPES[0], dtype=torch.bfloat16), Prefix(8, dtype=torch.bfloat16)
    table = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.randint(5, (2, 4))
    memory = torch.randn(2, 3, 8, requires_grad=True)
    out = write(PrefixLoss(decoder, prefix, table[tokens], tokens, table), memory, steps=2, lr=0.1)
    out.memory.sum().backward()
    assert out.memory.dtype == memory.grad.dtype == torch.float32
    assert table.grad.dtype == torch.bfloat16


def test_a_tangent_of_the_loss_may_be_a_known_zero() -> None:
    loss = PrefixLoss(**loss_arguments(prefix=Prefix(8, projection=True, per_sample=True, dtype=F64),
                                       context_embeds=torch.randn(2, 4, 8, dtype=F64),
                                       head_weight=torch.randn(5, 8, dtype=F64)))
    memory = torch.randn(2, 3, 8, dtype=F64), *(torch.randn(2, *shape, dtype=F64) for shape in ((8, 8), (8,)))
    weight_t = torch.randn(2, 8, 8, dtype=F64)
    found = loss.dual(*memory, None, weight_t, None)
    zeros = [torch.zeros_like(t) for t in memory]
    assert all(map(torch.equal, found, loss.dual(*memory, zeros[0], weight_t, zeros[2])))
    assert found[1].all()


def loss_arguments(**changed: Any) -> dict[str, Any]:
    return {"decoder": make(SHAPES[0]), "prefix": Prefix(8, dtype=F64),
            "context_embeds": torch.zeros(2, 4, 8, dtype=F64), "labels": torch.zeros(2, 4, dtype=torch.int64),
            "head_weight": torch.zeros(5, 8, dtype=F64)} | changed


@pytest.mark.parametrize(("changed", "message"), [
    ({"context_embeds": torch.zeros(2, 4, 7, dtype=F64)}, r"context_embeds: expected shape \[B, S, D=8\]"),
    ({"context_embeds": torch.zeros(2, 0, 8, dtype=F64), "labels": torch.zeros(2, 0, dtype=torch.int64)},
     "context_embeds: expected at least one context token, got an empty context"),
    ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, r"labels: expected shape \[B=2, S=4\], got \[2, 3\]"),
    ({"labels": torch.zeros(2, 4)}, "labels: expected dtype int64, got float32"),
    ({"head_weight": torch.zeros(5, 8)}, "head_weight: expected the dtype of the decoder's weight, float64, got"),
    ({"labels": torch.full((2, 4), 5)}, r"labels: expected values in 0\.\.4 .*, or -100, got 5\.\.5"),
    ({"labels": torch.full((2, 4), -1)}, r"labels: expected values in 0\.\.4 .*, or -100, got -1\.\.-1"),
    ({"head_bias": torch.zeros(6, dtype=F64)}, r"head_bias: expected shape \[V=5\], got \[6\]"),
])
def test_bad_loss_input(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"PrefixLoss: {message}"):
        PrefixLoss(**loss_arguments(**changed))


@pytest.mark.parametrize("shape", [(2, 8), (3, 1, 8), (2, 1, 7)])
def test_memory_that_does_not_fit_the_loss(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"PrefixLoss: memory: expected shape \[B=2, m, D=8\]"):
        write(PrefixLoss(**loss_arguments()), torch.zeros(shape, dtype=F64), steps=1, lr=0.1)


def test_tensors_that_do_not_fit_the_loss() -> None:
    loss, memory = PrefixLoss(**loss_arguments()), torch.zeros(2, 3, 8, dtype=F64)
    for call, message in ((lambda: loss(memory.to("meta")), "PrefixLoss: memory: expected the device of "),
                          (lambda: loss(memory, memory), r"PrefixLoss: memory: expected 1 tensor\(s\): memory, got 2"),
                          (lambda: loss.dual(memory, memory, memory), "dual: tangents: expected 1, .*, got 2"),
                          (lambda: loss.dual(memory, memory.float()), "dual: memory_t: expected a tangent of")):
        with pytest.raises(ArgumentError, match=message):
            call()


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank term beside it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.a, self.b = base, torch.nn.Parameter(torch.randn(8, 1)), torch.nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


def test_adapters_take_part_in_the_dual_form() -> None:
    loss = PrefixLoss(**loss_arguments(prefix=Prefix(8, projection=True, dtype=F64),
                                       context_embeds=torch.randn(2, 4, 8, dtype=F64),
                                       head_weight=torch.randn(5, 8, dtype=F64)))
    attn = loss.decoder.layers[0].self_attn
    loss.prefix.projection = Adapted(torch.nn.Linear(8, 8)).double()
    attn.q_proj = Adapted(attn.q_proj).double()
    memory = torch.randn(2, 3, 8, dtype=F64, requires_grad=True)
    inputs = (memory, attn.q_proj.a, loss.prefix.projection.a, loss.prefix.projection.base.bias)
    by_graph, by_duals = (torch.autograd.grad(write(loss, memory, steps=2, lr=0.3, recompute=r).memory.sin().sum(),
                                              inputs) for r in ("none", "step"))
    torch.testing.assert_close(by_duals, by_graph, rtol=1e-9, atol=1e-11)


def test_tables_made_inside_a_transform_do_not_outlive_it() -> None:
    decoder = make(SHAPES[0])
    torch.func.grad(lambda x: decoder(x).sum())(torch.randn(1, 4, 8, dtype=F64))
    copy.deepcopy(decoder)


@pytest.mark.parametrize(("changed", "message"), [
    ({"num_heads": 3}, "num_heads: expected a divisor of hidden_size, 8, got 3"),
    ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads, 2, got 3"),
    ({"rotary_dim": 3}, r"rotary_dim: expected an even number in 2\.\.4"),
    ({"num_layers": 0}, "num_layers: expected an integer >= 1, got 0"),
    ({"norm": "batch"}, "norm: expected one of rms, layer, got 'batch'"),
    ({"norm_bias": True}, "norm_bias: expected False with norm='rms', got True"),
    ({"activation": "relu"}, "activation: expected one of swiglu, gelu, gelu_tanh, got 'relu'"),
    ({"qk_norm": 1}, "qk_norm: expected True or False, got 1"),
    ({"sliding_window": 0}, "sliding_window: expected an integer >= 1, got 0"),
    ({"sliding_window": (4, None)}, r"sliding_window: expected a window for each of the 1 layers, got \(4, None\)"),
    ({"attention_scale": 0.0}, "attention_scale: expected a finite number > 0, got 0"),
    ({"learned_positions": 0}, "learned_positions: expected an integer >= 1, got 0"),
    ({"learned_positions": 4, "rotary_dim": 2}, "rotary_dim: expected None with learned_positions, got 2"),
    ({"learned_positions": 4, "rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling: expected None with learned"),
])
def test_bad_config(changed: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 4}
    with pytest.raises(ArgumentError, match=f"DecoderConfig: {message}"):
        DecoderConfig(**sizes | changed)


@pytest.mark.parametrize(("arguments", "message"), [
    (("yarn", 2.0), "rope_type: expected one of linear, llama3, got 'yarn'"),
    (("linear", 0.5), "factor: expected a finite number >= 1, got 0.5"),
    (("llama3", 2.0, 4.0, 4.0), "high_freq_factor: expected a finite number > 4, got 4.0"),
    (("llama3", 2.0, 1.0, 4.0, 0), "original_max_position_embeddings: expected an integer >= 1, got 0"),
])
def test_bad_rope_scaling(arguments: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"RopeScaling: {message}"):
        RopeScaling(*arguments)


def test_config_as_json() -> None:
    config = DecoderConfig(8, 2, 2, 4, rope_scaling=RopeScaling("linear", 2.0), sliding_window=(None, 3))
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields["rope_scaling"]["factor"] == 2.0
    assert fields["sliding_window"] == [None, 3]
    scaling, windows = RopeScaling(**fields.pop("rope_scaling")), tuple(fields.pop("sliding_window"))
    assert DecoderConfig(**fields, rope_scaling=scaling, sliding_window=windows) == config


@pytest.mark.parametrize(("x", "message"), [
    (torch.zeros(2, 8, dtype=F64), r"inputs_embeds: expected shape \[B, S, D=8\], got \[2, 8\]"),
    (torch.zeros(2, 3, 8, dtype=torch.int64), "inputs_embeds: expected a dtype of"),
    (torch.zeros(2, 3, 8), "inputs_embeds: expected the dtype of the decoder's weight, float64, got float32"),
])
def test_bad_decoder_input(x: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"Decoder: {message}"):
        make(SHAPES[0])(x)
