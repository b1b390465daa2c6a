"""The decoder over the modules of transformers' models is what these are on eager attention, to second order.

Models are tiny, random, built from configurations, and compared in float64 (:class:`Double`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_transformers import Double  # noqa: E402

from gradmem import GradMem, GradMemConfig, TransformersLM  # noqa: E402
from gradmem_kernels import ArgumentError, Decoder, DecoderConfig, Prefix, PrefixLoss, write  # noqa: E402
from gradmem_kernels.decoder import RopeScaling  # noqa: E402
from gradmem_kernels.decoder.rope import inverse_frequencies  # noqa: E402

F64 = torch.float64
B, P, S, VOCAB, D, WINDOW = 2, 3, 8, 23, 32, 4
SIZES = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": None,
         "intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-2}
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
NEOX = {"rope_theta": 100.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
GPT2 = {"vocab_size": VOCAB, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 1,
        "eos_token_id": None}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**{**GROUPED, "head_dim": 8}, **MIXED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, **MIXED),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, rope_parameters=NEOX),
}
VARIANTS: dict[str, Callable[[], Any]] = {
    "llama-biases": lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama-linear-rope": lambda: transformers.LlamaConfig(
        **GROUPED, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}),
    "qwen3-biases": lambda: transformers.Qwen3Config(**GROUPED, attention_bias=True, tie_word_embeddings=True),
    "mistral-full": lambda: transformers.MistralConfig(**GROUPED, sliding_window=None),
    "gpt2-options": lambda: transformers.GPT2Config(**GPT2, n_inner=20, scale_attn_weights=False,
                                                    activation_function="gelu", layer_norm_epsilon=1e-2),
    "gpt_neox-options": lambda: transformers.GPTNeoXConfig(
        **SIZES, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_fast", tie_word_embeddings=True),
}
FAMILIES = list(CONFIGS)


def make(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    for p in model.parameters():  # as initialised, attention is all but uniform, biases are 0 and norms 1
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return model


@functools.cache
def build(family: str) -> Any:
    return make((CONFIGS | VARIANTS)[family]())


def random_ids(length: int = S, batch: int = B) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()


def head(model: Any) -> Tensor:
    return model.get_output_embeddings().weight


def assert_same(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Each tensor, to ``rtol`` of its largest element."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * max(scale, 1e-3))


@pytest.mark.parametrize("prefix_rows", [0, P])
@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_logits_and_gradients(family: str, prefix_rows: int) -> None:
    model = build(family)
    prefix, ids = random(B, prefix_rows, D), random_ids()
    decoder = Decoder.from_transformers(model)

    def derivatives(logits_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        embeds = torch.cat([prefix, model.get_input_embeddings()(ids)], 1)
        logits = logits_of(embeds)
        return [logits, *grad(logits.cos().sum(), [embeds, prefix, *model.parameters()])]

    def theirs(embeds: Tensor) -> Tensor:
        with Double():
            return model(inputs_embeds=embeds, use_cache=False).logits

    assert_same(derivatives(lambda embeds: decoder(embeds) @ head(model).T), derivatives(theirs))


class DoubleThrice(Double):
    """Also a layer norm that may be differentiated three times: PyTorch's own gives other numbers then (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.layer_norm:
            return super().__torch_function__(func, types, args, kwargs)
        x = args[0] - args[0].mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + kwargs["eps"])
        return torch.addcmul(kwargs["bias"], x, kwargs["weight"])


@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_dual_form(family: str, checkpoint_layers: bool) -> None:
    model = build(family)
    decoder = Decoder.from_transformers(model)
    x, x_t = random(B, S, D), random(B, S, D).detach().flip(0).requires_grad_()
    hidden, hidden_t = decoder.dual(x, x_t, start=2, checkpoint_layers=checkpoint_layers)
    with DoubleThrice():
        y = model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state[:, 2:]
    c = torch.zeros_like(y, requires_grad=True)  # the tangent as a derivative of a derivative: <c, J x_t> by c
    y_t, = grad(grad(y, x, c, create_graph=True)[0], c, x_t, create_graph=True)
    wanted = [x, x_t, *decoder.parameters()]
    assert_same([hidden, hidden_t, *grad(hidden.cos().sum() + hidden_t.square().sum(), wanted)],
                [y, y_t, *grad(y.cos().sum() + y_t.square().sum(), wanted)])


def through_the_model(model: Any, prefix: Prefix, ids: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The WRITE loss by the model's own forward."""

    def loss(memory: Tensor) -> Tensor:
        rows = plain.prefix_rows(prefix, memory)
        with Double():
            embeds = torch.cat([rows, model.get_input_embeddings()(ids)], 1)
            logits = model(inputs_embeds=embeds, use_cache=False).logits[:, rows.shape[1] - 1 : -1]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return losses.sum(1) / (labels != -100).sum(1)

    return loss


def make_prefix() -> Prefix:
    torch.manual_seed(3)
    return Prefix(D, control_tokens=1, projection=True, dtype=F64)


def padded(ids: Tensor) -> Tensor:
    """Labels of right-padded contexts."""
    return ids.masked_fill(torch.arange(ids.shape[1]) >= torch.tensor([[S], [5]]), -100)


@functools.cache
def expected_write(family: str, order: str) -> list[Tensor]:
    model, prefix, ids, memory = build(family), make_prefix(), random_ids(), random(B, P, D)
    out, losses, _ = plain.write(through_the_model(model, prefix, ids, padded(ids)), (memory,), steps=2,
                                 lr=lambda k, i: 0.3, order=order)
    outer = out[0].sin().sum() + losses.square().sum()
    return [out[0].detach(), losses.detach(), *grad(outer, [memory, *prefix.parameters(), *model.parameters()])]


@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_write_equals_create_graph_through_the_model(family: str, order: str, recompute: str) -> None:
    """Also: contexts padded to the right, and tables that are both embedding and head, which get both gradients."""
    model, prefix, ids, memory = build(family), make_prefix(), random_ids(), random(B, P, D)
    decoder, embeds = Decoder.from_transformers(model), model.get_input_embeddings()(ids)
    loss = PrefixLoss(decoder, prefix, embeds, padded(ids), head(model))
    out = write(loss, memory, steps=2, lr=0.3, order=order, recompute=recompute)
    outer = out.memory.sin().sum() + out.losses.square().sum()
    found = [out.memory, out.losses, *grad(outer, [memory, *prefix.parameters(), *model.parameters()])]
    assert_same(found, expected_write(family, order))


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_cache_equals_full_forward(family: str) -> None:
    """In chunks, and by steps from rows of different lengths; windows are shorter than the rows."""
    decoder = Decoder.from_transformers(build(family))
    x, extra = random(B, 7, D).detach(), random(B, 4, D).detach().flip(2)
    cache = decoder.new_cache(B, 11)
    found = torch.cat([decoder.prefill(x[:, :2], cache), decoder.prefill(x[:, 2:], cache)], 1)
    assert_same([found], [decoder(x).detach()])
    cache.truncate(torch.tensor([7, 5]))
    steps = torch.cat([decoder.step(extra[:, t : t + 1], cache) for t in range(4)], 1)
    for row, length in enumerate((7, 5)):
        whole = torch.cat([x[row, :length], extra[row]])[None]
        assert_same([steps[row : row + 1]], [decoder(whole, start=length).detach()])


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_any_strides(family: str) -> None:
    decoder, x = Decoder.from_transformers(build(family)), random(B, S, D)
    for dims in ((1, 0, 2), (2, 1, 0)):
        strided = x.permute(dims).contiguous().permute(dims)
        assert_same([decoder(strided), *decoder.dual(strided, strided)], [decoder(x), *decoder.dual(x, x)])


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_changes_nothing(family: str) -> None:
    model, ids, memory = build(family), random_ids(), random(B, P, D)
    decoder, prefix = Decoder.from_transformers(model), Prefix(D, dtype=F64)

    def derivatives(ids: Tensor, labels: Tensor) -> list[Tensor]:
        loss = PrefixLoss(decoder, prefix, model.get_input_embeddings()(ids), labels, head(model))(memory)
        return [loss, *grad(loss.sum(), [memory, *model.parameters()])]

    labels = ids.masked_fill(torch.arange(S) >= 5, -100)
    assert_same(derivatives(ids, labels), derivatives(ids[:, :5], ids[:, :5]), 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_the_model_s_own(family: str) -> None:
    model = make(CONFIGS[family]())
    before = {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    lm = TransformersLM(model)
    assert {id(p) for p in lm.parameters()} == {id(p) for p in model.parameters()}
    mine = {m for m in lm.modules() if any(True for _ in m.parameters(recurse=False))}
    assert mine <= set(model.modules())
    lm.decoder(random(B, S, D)).sum().backward()
    assert {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert lm.head_weight is head(model)
    assert lm.embed_tokens is model.get_input_embeddings()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_one_trains_the_other(family: str) -> None:
    model = make(CONFIGS[family]())
    decoder, x = Decoder.from_transformers(model), random(B, S, D)

    def hidden() -> Tensor:
        with Double(), torch.no_grad():
            return model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state

    before = hidden()
    optimizer = torch.optim.SGD(decoder.parameters(), lr=1e-2)
    decoder(x).cos().sum().backward()
    optimizer.step()
    assert (hidden() - before).abs().max() > 1e-3
    assert_same([decoder(x).detach()], [hidden()])
    state = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert_same([decoder(x).detach()], [hidden()])


class Adapted(nn.Module):
    """A low-rank term beside a linear layer, as LoRA has it."""

    def __init__(self, base: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        y = base(torch.zeros(1, 1, base.weight.shape[int(type(base) is nn.Linear)], dtype=F64))
        inputs, outputs = base.weight.numel() // y.shape[-1], y.shape[-1]
        self.base, self.dropout = base, nn.Dropout(dropout)
        self.a, self.b = (nn.Parameter(torch.randn(s, dtype=F64) * 0.3) for s in ((inputs, 1), (1, outputs)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.a @ self.b


def adapt(model: Any, names: tuple[str, ...], dropout: float = 0.0) -> list[nn.Parameter]:
    """Puts adapters in the place of layers; returns their parameters. The model's own are frozen."""
    model.requires_grad_(False)
    found: list[nn.Parameter] = []
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in names:
            adapter = Adapted(module, dropout)
            setattr(model.get_submodule(parent), name, adapter)
            found += [adapter.a, adapter.b]
    return found


@pytest.mark.parametrize(("family", "names"), [
    ("llama", ("q_proj", "down_proj")), ("qwen2", ("k_proj", "o_proj", "gate_proj")),
    ("gpt2", ("c_attn", "c_proj", "c_fc")), ("gpt_neox", ("query_key_value", "dense")),
])
@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
def test_adapters_that_come_later_take_part(family: str, names: tuple[str, ...], recompute: str) -> None:
    model, ids, memory, prefix = make(CONFIGS[family]()), random_ids(), random(B, P, D), Prefix(D, dtype=F64)
    decoder = Decoder.from_transformers(model)
    adapters = adapt(model, names)
    assert {id(p) for p in decoder.parameters() if p.requires_grad} == {id(p) for p in adapters}
    loss = PrefixLoss(decoder, prefix, model.get_input_embeddings()(ids), ids, head(model))
    found = write(loss, memory, steps=2, lr=0.3, recompute=recompute).memory
    expected = plain.write(through_the_model(model, prefix, ids, ids), (memory,), steps=2, lr=lambda k, i: 0.3)[0][0]
    assert_same(grad(found.sin().sum(), [memory, *adapters]), grad(expected.sin().sum(), [memory, *adapters]))


def test_adapters_with_dropout_have_no_dual_form() -> None:
    model = make(CONFIGS["llama"]())
    adapt(model, ("q_proj",), dropout=0.1)
    decoder, x = Decoder.from_transformers(model).train(), random(B, S, D)
    decoder(x)
    with pytest.raises(ArgumentError, match=r"Adapted: expected an adapter without dropout.*got dropout 0\.1 in train"):
        decoder.dual(x, x)
    decoder.eval().dual(x, x)


def test_a_bias_does_not_round_the_tangent_of_an_adapted_layer() -> None:
    linear, x = Adapted(nn.Linear(8, 8).double()), torch.randn(2, 3, 8, dtype=F64)
    nn.init.constant_(linear.base.bias, 1e9)
    from gradmem_kernels.decoder import linear_dual

    expected = x[1] @ linear.base.weight.T + x[1] @ linear.a @ linear.b
    torch.testing.assert_close(linear_dual(linear, x)[1], expected, rtol=1e-12, atol=1e-12)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_of_linear_is_run_as_it_is() -> None:
    from gradmem_kernels.decoder import linear_dual

    linear, x = Doubled(8, 5).double(), torch.randn(2, 3, 8, dtype=F64)
    assert_same([linear_dual(linear, x)], [torch.stack([linear(x[0]), 2 * x[1] @ linear.weight.T])])


@pytest.mark.parametrize(("family", "fields"), [
    ("gpt2", {"attn_pdrop": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.1, "embd_pdrop": 0.2}),
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.2}),
    ("gpt_neox", {"attention_dropout": 0.2, "hidden_dropout": 0.1}),
    ("gpt_neox", {"attention_dropout": 0.0, "hidden_dropout": 0.1})])
def test_dropout_in_training_is_refused(family: str, fields: dict[str, float]) -> None:
    config = CONFIGS[family]()
    for name, value in fields.items():
        setattr(config, name, value)
    model, x = make(config), random(B, S, D)
    decoder = Decoder.from_transformers(model)
    expected = decoder(x)
    model.train()
    named = ", ".join(f"{name}={value}" for name, value in fields.items() if value)
    for call in (decoder, lambda x: decoder.dual(x, x), lambda x: decoder.prefill(x, decoder.new_cache(B, S))):
        with pytest.raises(ArgumentError, match=f"training: expected .*eval mode.*, got .*{named}"):
            call(x)
    model.eval()
    assert torch.equal(decoder(x), expected)


def changed(family: str, **fields: Any) -> Any:
    config = CONFIGS[family]()
    for name, value in fields.items():
        setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_config(config)


def quantised() -> Any:
    model = changed("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def spread() -> Any:
    model = changed("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    return model


def shortened() -> Any:
    model = changed("llama")
    model.config.num_hidden_layers = 1
    return model


class Peft(nn.Module):
    def get_base_model(self) -> None: ...


ROPE = {"rope_theta": 100.0, "factor": 2.0}
OSS = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 131072}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gelu": (lambda: changed("llama", hidden_act="gelu"), "config.hidden_act: expected one of silu, swish, got 'gelu'"),
    "relu": (lambda: changed("gpt2", activation_function="relu"), "config.activation_function: .*, got 'relu'"),
    "scale": (lambda: changed("gpt2", scale_attn_by_inverse_layer_idx=True),
              "config.scale_attn_by_inverse_layer_idx: expected False, got True"),
    "reorder": (lambda: changed("gpt2", reorder_and_upcast_attn=True), "config.reorder_and_upcast_attn: .*got True"),
    "cross": (lambda: changed("gpt2", add_cross_attention=True), "config.add_cross_attention: .*got True"),
    "dynamic": (lambda: changed("llama", rope_parameters={"rope_type": "dynamic", **ROPE}),
                r"config.rope_parameters\['rope_type'\]: expected one of default, linear, llama3, got 'dynamic'"),
    "yarn": (lambda: changed("gpt_neox", rope_parameters={
        "rope_type": "yarn", **ROPE, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 32}),
             r"config.rope_parameters\['rope_type'\]: .*got 'yarn'"),
    "both ways": (lambda: changed("llama", is_causal=False), "config.is_causal: expected True, got False"),
    "quantised": (quantised, "config.quantization_config: expected None, got {'quant_method': 'gptq'}"),
    "devices": (spread, "model.hf_device_map: expected one device"),
    "layers": (shortened, "model.model.layers: expected the 1 layers that the configuration has, got 2"),
    "softcap": (lambda: transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**GROUPED)),
                "model: expected .*, got Gemma2ForCausalLM .*'gemma2'"),
    "sinks": (lambda: transformers.AutoModelForCausalLM.from_config(transformers.GptOssConfig(**OSS)),
              "model: expected .*, got GptOssForCausalLM .*'gpt_oss'"),
    "headless": (lambda: changed("llama").model, "model: expected a LlamaForCausalLM, .*, got LlamaModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_by_name(case: str) -> None:
    make_model, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=rf"Decoder.from_transformers: {message}.*attn_implementation='gradmem'"):
        Decoder.from_transformers(make_model())


def test_other_refusals() -> None:
    with pytest.raises(ArgumentError, match=r"model: expected .*, got Peft; pass model.get_base_model\(\)"):
        Decoder.from_transformers(Peft())
    with pytest.raises(ArgumentError, match=r"model: expected a LlamaForCausalLM, .*, got str"):
        Decoder.from_transformers("gpt2")
    model = changed("llama")
    model.lm_head = nn.Linear(D, VOCAB)
    with pytest.raises(ArgumentError, match=r"TransformersLM: model: expected a head .*nn\.Linear without bias"):
        TransformersLM(model)
    decoder = Decoder.from_transformers(build("gpt2"))
    for call in (decoder, lambda x: decoder.dual(x, x), lambda x: decoder.prefill(x, decoder.new_cache(B, 20))):
        with pytest.raises(ArgumentError, match=r"inputs_embeds: expected at most the 16 positions .*, got 17"):
            call(random(B, 17, D))
    cache = decoder.new_cache(B, 20)
    decoder.prefill(random(B, 16, D), cache)
    with pytest.raises(ArgumentError, match=r"Decoder\.step: inputs_embeds: expected at most the 16 positions"):
        decoder.step(random(B, 1, D), cache)


@pytest.mark.parametrize("family", ["llama", "llama-linear-rope", "gpt_neox"])
def test_rope_of_the_configuration_is_the_model_s(family: str) -> None:
    """To the rounding of the model's own frequencies, which are float32, and which a borrowed decoder takes."""
    decoder = Decoder.from_transformers(build(family))
    ours = inverse_frequencies(decoder.config, torch.device("cpu"))
    torch.testing.assert_close(ours, decoder.rotary_emb.inv_freq.double(), rtol=1e-6, atol=0)


def test_llama3_scaling_keeps_mixes_and_slows() -> None:
    rope = LLAMA3 | {"rope_theta": 1e4}
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=rope)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    scaling = RopeScaling("llama3", 4.0, original_max_position_embeddings=32)
    scaled, plain_ = (inverse_frequencies(DecoderConfig(64, 1, 1, 1, rope_scaling=s), torch.device("cpu"))
                      for s in (scaling, None))
    torch.testing.assert_close(scaled, rotary.inv_freq.double(), rtol=1e-6, atol=0)
    ratio = plain_ / scaled
    assert (ratio == 1).any()
    assert ((ratio > 1.01) & (ratio < 3.99)).any()
    assert ratio.max() > 3.999


def own_copy(decoder: Decoder) -> Decoder:
    """A decoder of the same configuration with parameters of its own, copied from a model's with fused projections."""
    own, d = Decoder(decoder.config, dtype=F64), decoder.config.head_size
    pairs = [(own.norm, decoder.norm)]
    if own.embed_positions is not None:
        pairs.append((own.embed_positions, decoder.embed_positions))
    for mine, theirs in zip(own.layers, decoder.layers, strict=True):
        for role in ("attention_norm", "mlp_norm", "o", "down"):
            pairs.append((mine.get_submodule(getattr(mine.names, role)),
                          theirs.source.get_submodule(getattr(theirs.names, role))))
        pairs.append((mine.mlp.up_proj, theirs.source.get_submodule(theirs.names.up[0])))
        fused = theirs.source.get_submodule(theirs.names.qkv[0])
        for index, name in enumerate(mine.names.qkv):
            for p, q in zip(mine.get_submodule(name).parameters(), parameters(fused), strict=True):
                heads = (q.unflatten(0, (-1, 3, d))[:, index] if theirs.names.qkv_per_head else
                         q.unflatten(0, (3, -1, d))[index])
                p.data.copy_(heads.flatten(0, 1))
    for mine_module, their_module in pairs:
        for p, q in zip(mine_module.parameters(), parameters(their_module), strict=True):
            p.data.copy_(q)
    return own


def parameters(module: nn.Module) -> list[Tensor]:
    """Weight and bias, if any; matrices as ``nn.Linear`` has them."""
    transposed = type(module).__name__ == "Conv1D"
    return [p.T if transposed and p.ndim == 2 else p for p in module.parameters()]


@pytest.mark.parametrize("family", ["gpt2", "gpt2-options", "gpt_neox", "gpt_neox-options"])
def test_own_modules_equal_borrowed_ones(family: str) -> None:
    borrowed, x = Decoder.from_transformers(build(family)), random(B, S, D)
    own = own_copy(borrowed)
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in borrowed.parameters())
    own.rotary_emb = borrowed.rotary_emb  # whose frequencies are rounded
    assert_same([own(x), *own.dual(x, x)], [borrowed(x), *borrowed.dual(x, x)], 1e-12)


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2", "qwen3", "qwen3-biases", "mistral"])
def test_state_dict_of_a_model_loads(family: str) -> None:
    borrowed, x = Decoder.from_transformers(build(family)), random(B, S, D)
    own = Decoder(borrowed.config, dtype=F64)
    own.load_state_dict({n: t for n, t in build(family).model.state_dict().items() if n != "embed_tokens.weight"})
    own.rotary_emb = borrowed.rotary_emb
    assert_same([own(x), *own.dual(x, x)], [borrowed(x), *borrowed.dual(x, x)], 1e-12)


def test_rope_tables_follow_the_model_s_buffer() -> None:
    model, x = make(CONFIGS["llama"]()), random(B, S, D)
    decoder = Decoder.from_transformers(model)
    before = decoder(x)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    assert (decoder(x) - before).abs().max() > 1e-3


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_fully_sharded(family: str, mesh: Any) -> None:
    """Outside the methods that are registered parameters are sharded, and no operation takes them."""
    decoder, x = Decoder.from_transformers(make(CONFIGS[family]())), random(B, S, D)

    def derivatives() -> list[Tensor]:
        hidden, hidden_t = decoder.dual(x, x)
        (hidden.cos() + hidden_t.square()).sum().backward()
        weights = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in decoder.parameters()]
        decoder.zero_grad()
        context = decoder.project_context(x[:, 3:], first=3)
        return [decoder(x[:, :3], context=context).detach(), hidden.detach(), hidden_t.detach(), *weights]

    expected = derivatives()
    for module in (*decoder.layers, decoder):
        fully_shard(module, mesh=mesh)
        for method in ("dual", "project_context"):
            register_fsdp_forward_method(module, method)
    assert all(isinstance(p, DTensor) for p in decoder.parameters())
    assert_same(derivatives(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_backbone_of_gradmem(family: str) -> None:
    model = make(CONFIGS[family]())
    gradmem = GradMem(TransformersLM(model), GradMemConfig(memory_tokens=P, steps=2, inner_lr=0.3)).eval()
    contexts, queries = random_ids(), random_ids(3)
    out = gradmem(contexts, queries, labels=queries)
    prefix = Prefix(D, dtype=F64)
    start = gradmem.memory_init.expand(B, -1, -1)
    memory = plain.write(through_the_model(model, prefix, contexts, contexts), (start,), steps=2,
                         lr=lambda k, i: 0.3)[0][0]
    with Double():
        embeds = torch.cat([memory, model.get_input_embeddings()(queries)], 1)
        logits = model(inputs_embeds=embeds, use_cache=False).logits[:, P - 1 : -1]
    loss = F.cross_entropy(logits.flatten(0, 1), queries.flatten())
    wanted = [gradmem.memory_init, *model.parameters()]
    assert_same([out.logits, out.loss, *grad(out.loss, wanted)], [logits, loss, *grad(loss, wanted)])

    written = gradmem.write(contexts)
    found = gradmem.generate(written, queries, max_new_tokens=3)
    tokens = queries
    for _ in range(3):
        tokens = torch.cat([tokens, gradmem.read(written, tokens, next_token=True)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens[:, 3:])
    assert written.provenance[0].model == gradmem.fingerprint()
