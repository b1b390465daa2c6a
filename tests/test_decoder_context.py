"""The first layer's work on the context, done once: nothing changes but the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmem_kernels import Decoder, DecoderConfig, Prefix, PrefixLoss, write
from gradmem_kernels.attention import OP
from gradmem_kernels.checks import ArgumentError
from gradmem_kernels.decoder import ContextRows

F64 = torch.float64
LLAMA = DecoderConfig(8, 2, 4, 7, num_kv_heads=2)
CONFIGS = {
    "llama": LLAMA,
    "qwen3_window": DecoderConfig(8, 2, 2, 7, qk_norm=True, qkv_bias=True, sliding_window=3),
    "neox": DecoderConfig(8, 2, 2, 7, norm="layer", norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True,
                          activation="gelu", parallel_residual=True, rotary_dim=2),
    "gpt2": DecoderConfig(8, 2, 2, 7, norm="layer", norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True,
                          activation="gelu_tanh", learned_positions=16)}
PREFIX, CONTEXT = 3, 5


def make(config: DecoderConfig) -> Decoder:
    decoder = Decoder(config, dtype=F64)
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.5)
    return decoder


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_and_gradients_are_those_of_all_rows_together(config: DecoderConfig) -> None:
    decoder, prefix, context = make(config), randn(2, PREFIX, 8), randn(2, CONTEXT, 8)
    inputs = (prefix, context, *decoder.parameters())
    together = decoder(torch.cat([prefix, context], 1), start=2)
    apart = decoder(prefix, start=2, context=decoder.project_context(context, first=PREFIX))
    torch.testing.assert_close(apart, together, rtol=1e-10, atol=1e-12)
    close(gradients(apart.sin().sum(), inputs), gradients(together.sin().sum(), inputs))


@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dual_and_its_gradients_are_those_of_all_rows_together(config: DecoderConfig, checkpoint_layers: bool) -> None:
    decoder, (prefix, prefix_t), context = make(config), (randn(2, PREFIX, 8) for _ in range(2)), randn(2, CONTEXT, 8)
    inputs = (prefix, prefix_t, context, *decoder.parameters())
    rows, rows_t = torch.cat([prefix, context], 1), torch.cat([prefix_t, torch.zeros_like(context)], 1)
    together = decoder.dual(rows, rows_t, start=2)
    apart = decoder.dual(prefix, prefix_t, start=2, context=decoder.project_context(context, first=PREFIX),
                         checkpoint_layers=checkpoint_layers)
    close(apart, together)
    close(*(gradients(hidden.sin().sum() + hidden_t.square().sum(), inputs)
            for hidden, hidden_t in (apart, together)))


@pytest.mark.parametrize("second", [False, True], ids=["forward", "dual"])
def test_a_constant_context_asks_for_no_gradient_of_its_rows(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the memory's is what it is otherwise."""
    decoder = make(LLAMA).requires_grad_(False)
    prefix, context = randn(2, PREFIX, 8), randn(2, CONTEXT, 8)
    asked: list[dict[str, Any]] = []
    for name in ("__call__", "dual"):
        run = getattr(type(OP), name)

        def record(op: Any, *args: Any, run: Any = run, **options: Any) -> Any:
            if op is OP:
                asked.append({name: options[name] for name in ("grad_rows", "tangent_rows")})
            return run(op, *args, **options)

        monkeypatch.setattr(type(OP), name, record)

    def gradient(context: Tensor) -> Tensor:
        rows = decoder.project_context(context, first=PREFIX)
        out = decoder.dual(prefix, prefix.cos(), context=rows)[1] if second else decoder(prefix, context=rows)
        return gradients(out.sin().sum(), (prefix,))[0]

    trained, (first, later) = gradient(context), asked
    assert first == {"grad_rows": None, "tangent_rows": (0, PREFIX) if second else None}
    assert later == dict.fromkeys(first)
    asked.clear()
    constant, (first, later) = gradient(context.detach()), asked
    assert first == dict.fromkeys(first, (0, PREFIX))
    assert later == dict.fromkeys(first)
    torch.testing.assert_close(constant, trained, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_write_projects_the_context_once(recompute: str, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, prefix = make(LLAMA).requires_grad_(trained), Prefix(8, dtype=F64)
    table, memory = randn(5, 8), randn(2, PREFIX, 8)
    labels = torch.randint(5, (2, CONTEXT + 1))
    rows: list[int] = []
    run = nn.Linear.forward

    def record(module: nn.Linear, x: Tensor) -> Tensor:
        if module is decoder.layers[0].self_attn["k_proj"]:
            rows.append(x.numel() // (2 * 8))
        return run(module, x)

    monkeypatch.setattr(nn.Linear, "forward", record)
    loss = PrefixLoss(decoder, prefix, table[labels].detach(), labels, table.detach())
    out = write(loss, memory, steps=3, lr=0.1, recompute=recompute)
    out.memory.square().sum().backward()
    assert rows.count(CONTEXT) == 1
    assert set(rows) == ({CONTEXT, PREFIX} if recompute == "none" else {CONTEXT, PREFIX, 2 * PREFIX})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hook", [lambda *args: args[-1] + 1, lambda *args: args[-1] * 2], ids=["adds", "scales"])
def test_hooks_of_linear_layers_take_part(hook: Any, bias: bool) -> None:
    """In the dual form as in the plain one."""
    decoder = make(DecoderConfig(8, 2, 2, 7, mlp_bias=bias))
    decoder.layers[0].mlp["up_proj"].register_forward_hook(hook)
    decoder.layers[1].mlp["down_proj"].register_forward_pre_hook(lambda module, args: (hook(args[0]),))
    ids, table = torch.randint(5, (2, CONTEXT)), randn(5, 8).detach()
    memory = randn(2, PREFIX, 8)
    found = [gradients(write(PrefixLoss(decoder, Prefix(8, dtype=F64), table[ids], ids, table), memory, steps=2, lr=0.5,
                             recompute=mode).memory.square().sum(), (memory,)) for mode in ("step", "layer", "none")]
    close(found[0], found[2])
    close(found[1], found[2])


def test_a_loss_may_outlive_a_change_of_the_parameters() -> None:
    """What write prepares, it keeps for itself."""
    decoder, table = make(LLAMA), randn(5, 8)
    labels, memory = torch.randint(5, (2, CONTEXT)), randn(2, PREFIX, 8)
    loss = PrefixLoss(decoder, Prefix(8, dtype=F64), table[labels].detach(), labels, table.detach())
    write(loss, memory, steps=1, lr=0.1)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(1.5)
    again = write(loss, memory, steps=2, lr=0.1)
    fresh = write(PrefixLoss(decoder, Prefix(8, dtype=F64), table[labels].detach(), labels, table.detach()), memory,
                  steps=2, lr=0.1)
    assert torch.equal(again.memory, fresh.memory)


def test_one_context_token_leaves_nothing_to_project() -> None:
    decoder, table, labels = make(LLAMA), randn(5, 8), torch.randint(5, (2, 1))
    loss = PrefixLoss(decoder, Prefix(8, dtype=F64), table[labels], labels, table)
    memory = randn(2, PREFIX, 8)
    assert isinstance(loss.prepared(memory), PrefixLoss)
    assert torch.equal(loss.prepared(memory)(memory), loss(memory))


def test_context_rows_know_whether_they_are_constant() -> None:
    rows = ContextRows(*(torch.zeros(1) for _ in range(4)), first=0)
    assert rows.constant
    asked = rows._replace(v=torch.zeros(1, requires_grad=True))
    assert not asked.constant
    with torch.no_grad():
        assert asked.constant


def test_rows_of_another_position_are_refused() -> None:
    decoder = make(LLAMA)
    rows = decoder.project_context(randn(2, CONTEXT, 8), first=PREFIX)
    with pytest.raises(ArgumentError, match=r"Decoder: context: expected rows projected for first=2.*got first=3"):
        decoder(randn(2, 2, 8), context=rows)
    with pytest.raises(ArgumentError, match=r"Decoder.dual: context: expected rows projected for first=4"):
        decoder.dual(randn(2, 4, 8), randn(2, 4, 8), context=rows)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_autocast(config: DecoderConfig) -> None:
    """Products in bfloat16, the residual stream and the weights in float32: every form runs, and is only rounded."""
    decoder = make(config).float()
    ids, table, memory = torch.randint(5, (2, CONTEXT)), torch.randn(5, 8), torch.ones(2, PREFIX, 8, requires_grad=True)

    def gradient(mode: str, narrow: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = PrefixLoss(decoder, Prefix(8), table[ids], ids, table)
            out = write(loss, memory, steps=2, lr=0.01, recompute=mode)
            return gradients(out.memory.square().sum(), (memory,))[0]

    exact = gradient("none", False)
    for mode in ("none", "step", "layer"):
        assert (gradient(mode, True) - exact).norm() < 0.2 * exact.norm()


def gradients(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, materialize_grads=True)


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
