"""GradMem around models of transformers, by the fused decoder and by their own forward, is what eager attention gives.

Models are tiny, random, built from configurations, and compared in float64 (:class:`Double`) with plain autograd
through attn_implementation="eager".
"""

from __future__ import annotations

import contextlib
import logging
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmem import GradMem, GradMemConfig, OwnForwardLM, TransformersLM
from gradmem_kernels import ArgumentError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_transformers import Double  # noqa: E402

VOCAB, D = 23, 16
SIZES = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": None,
         "intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
GPT2 = {"vocab_size": VOCAB, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": None, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **kw: transformers.LlamaConfig(**{**GROUPED, **kw}),
    "qwen3": lambda **kw: transformers.Qwen3Config(**{**GROUPED, "tie_word_embeddings": True, **kw}),
    "mistral": lambda **kw: transformers.MistralConfig(**{**GROUPED, "sliding_window": 5, **kw}),
    "gpt2": lambda **kw: transformers.GPT2Config(**{**GPT2, **kw}),
    "gpt_neox": lambda **kw: transformers.GPTNeoXConfig(**{**SIZES, **kw}),
}
#: Soft cap, scaled embeddings, sliding layers; and a head with a bias. Neither has a fused decoder.
OTHERS: dict[str, Callable[..., Any]] = {
    "gemma2": lambda **kw: transformers.Gemma2Config(**{
        **GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0, **kw}),
    "phi": lambda **kw: transformers.PhiConfig(**{**SIZES, **kw}),
}
OPTIONS: dict[str, Any] = {"memory_tokens": 3, "steps": 2, "inner_lr": 0.5, "memory_init_std": 0.5}


def build(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config((FAMILIES | OTHERS)[family](**fields)).double().eval()
    for parameter in model.parameters():  # as initialised, attention is all but uniform, biases are 0 and norms 1
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and "norm" in family), std=0.3)
    return model


def make(model: Any, forward: str, **options: Any) -> GradMem:
    torch.manual_seed(1)
    made = GradMem.from_pretrained_backbone(model, GradMemConfig(**{**OPTIONS, **options}), forward=forward)
    if isinstance(made.backbone, OwnForwardLM):
        logits = made.backbone.logits

        def double(*args: Any) -> Tensor:  # here, as the mode is not on while autograd runs
            with Double():
                return logits(*args)

        made.backbone.logits = double  # type: ignore[method-assign]
    with torch.no_grad():
        for name, weight in made.named_parameters():  # nothing at its special initial value
            if not name.startswith("backbone.") or "lora_" in name:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return made


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


CONTEXT, LENGTHS, QUERY = ids(2, 8), torch.tensor([8, 5]), ids(2, 5, seed=1)
LABELS = QUERY.masked_fill(torch.arange(5) < 2, -100)


def plain_loss(made: GradMem, model: Any) -> tuple[Tensor, Tensor]:
    """The training loss and memory of :class:`GradMem` by the model's own forward and torch alone."""
    cfg = made.config
    embed = model.get_input_embeddings()

    def rows(prefix: Any, memory: Tensor, *fast: Tensor) -> Tensor:
        if fast:
            memory = torch.einsum("bmi,boi->bmo", memory, fast[0]) + fast[1][:, None]
        elif prefix.projection is not None:
            memory = memory @ prefix.projection.weight.T + prefix.projection.bias
        edges = [] if prefix.start is None else [prefix.start.expand(2, -1, -1), prefix.end.expand(2, -1, -1)]
        return torch.cat([*edges[:1], memory, *edges[1:]], 1)

    def predict(prefix: Any, memory: tuple[Tensor, ...], tokens: Tensor, head: Tensor | None) -> Tensor:
        before = rows(prefix, *memory)
        inputs = {"inputs_embeds": torch.cat([before, embed(tokens)], 1), "use_cache": False}
        logits = model(**inputs).logits if head is None else model.base_model(**inputs).last_hidden_state @ head.T
        return logits[:, before.shape[1] - 1 : -1].transpose(1, 2)

    memory = (made.memory_init.expand(2, -1, -1),)
    if cfg.memory_projection == "per_sample":
        projection = made.write_prefix.projection
        memory += (projection.weight.expand(2, -1, -1), projection.bias.expand(2, -1))
    targets = CONTEXT.masked_fill(torch.arange(8) >= LENGTHS[:, None], -100)
    for _ in range(cfg.steps):
        with written(model, made):
            losses = F.cross_entropy(predict(made.write_prefix, memory, CONTEXT, made.write_head), targets,
                                     reduction="none", ignore_index=-100).sum(1) / LENGTHS
        slopes = torch.autograd.grad(losses.sum(), memory, create_graph=True)
        memory = tuple(m - cfg.inner_lr * clipped(cfg, slope) for m, slope in zip(memory, slopes, strict=True))
    read = F.cross_entropy(predict(made.read_prefix, memory, QUERY, None), LABELS, ignore_index=-100)
    if len(memory) > 1:
        memory = (torch.einsum("bmi,boi->bmo", memory[0], memory[1]) + memory[2][:, None],)
    return read + (cfg.inner_loss_weight * losses.mean() if cfg.steps else 0.0), memory[0]


def clipped(cfg: GradMemConfig, slope: Tensor) -> Tensor:
    if cfg.inner_clip_value is not None:
        slope = slope.clamp(-cfg.inner_clip_value, cfg.inner_clip_value)
    if cfg.inner_clip_norm is not None:
        norm = slope.flatten(1).norm(dim=1).view(-1, *[1] * (slope.ndim - 1))
        slope = torch.where(norm > cfg.inner_clip_norm, slope * (cfg.inner_clip_norm / (norm + 1e-6)), slope)
    return slope


@contextlib.contextmanager
def written(model: nn.Module, made: GradMem) -> Iterator[None]:
    """LoRA by hooks that add its term to the layers' outputs, in WRITE alone."""
    cfg, hooks = made.config, []
    for module in model.modules():
        if cfg.write_lora_rank and hasattr(module, "lora_A"):
            def add(layer: Any, inputs: Any, out: Tensor) -> Tensor:
                a, b = (getattr(layer, name)["gradmem_write"].weight for name in ("lora_A", "lora_B"))
                return out + inputs[0] @ a.T @ b.T * (cfg.write_lora_alpha / cfg.write_lora_rank)

            assert module.disable_adapters
            hooks.append(module.register_forward_hook(add))
    yield
    for hook in hooks:
        hook.remove()


def gradients(loss: Tensor, made: GradMem) -> dict[str, Tensor]:
    names, weights = zip(*[(n, p) for n, p in made.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(names, found, strict=True)}


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    atol = 1e-9 * max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_equals_eager(model: Any, made: GradMem) -> None:
    out = made(CONTEXT, QUERY, LABELS, LENGTHS)
    found = gradients(out.loss, made)
    now = model.config._attn_implementation
    model.gradient_checkpointing_disable()  # what runs again in autograd would not run in float64
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    with Double():
        loss, memory = plain_loss(made, model)
        expected = gradients(loss, made)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(now)
    assert_same(out.loss, loss, "loss")
    assert_same(out.memory, memory, "memory")
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    for name, g in expected.items():
        assert_same(found[name], g, name)


@pytest.mark.parametrize("recompute", ["none", "step", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_decoder_equals_eager_attention(family: str, recompute: str) -> None:
    model = build(family)
    made = make(model, "auto", recompute=recompute, control_tokens=1)
    assert made.chosen is not None
    assert made.chosen.forward == "fused"
    assert_equals_eager(model, made)


@pytest.mark.parametrize("recompute", ["none", "step"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_a_model_s_own_forward_equals_eager_attention(family: str, recompute: str) -> None:
    model = build(family)
    made = make(model, "own", recompute=recompute, control_tokens=1)
    assert model.config._attn_implementation == "gradmem"
    assert_equals_eager(model, made)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_paper_s_loop_runs_unchanged(family: str) -> None:
    """A model of transformers, inputs_embeds, autograd.grad K times, an outer backward: nothing of GradMem's own."""
    model = build(family)
    made = make(model, "own", steps=3, control_tokens=1)
    found: list[dict[str, Tensor]] = []
    for name in ("gradmem", "eager"):
        model.set_attn_implementation(name)
        with Double():
            loss, memory = plain_loss(made, model)
            found.append({"loss": loss, "memory": memory, **gradients(loss, made)})
    for name, expected in found[1].items():
        assert_same(found[0][name], expected, name)


PAPER = [{"inner_clip_value": 0.02}, {"inner_clip_norm": 0.05}, {"inner_loss_weight": 0.7}, {"write_head": True},
         {"memory_projection": "shared", "control_tokens": 2}, {"steps": 1}, {"memory_projection": "per_sample"},
         {"memory_projection": "per_sample", "control_tokens": 1, "inner_clip_norm": 0.05, "recompute": "none"},
         {"write_lora_rank": 2, "write_lora_alpha": 3.0}, {"write_lora_rank": 2, "recompute": "none"},
         {"write_lora_rank": 2, "freeze_backbone": True}, {"freeze_backbone": True, "memory_projection": "shared"}]


@pytest.mark.parametrize("options", PAPER, ids=str)
@pytest.mark.parametrize("forward", ["fused", "own"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])  # tied tables
def test_the_paper_s_options_on_both_ways(family: str, forward: str, options: dict) -> None:
    if "write_lora_rank" in options:
        pytest.importorskip("peft")
    model = build(family)
    assert_equals_eager(model, make(model, forward, **options))


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}


@pytest.mark.parametrize("config", [
    lambda: transformers.LlamaConfig(**{**GROUPED, "max_position_embeddings": 8}, rope_parameters=DYNAMIC),
    lambda: transformers.Gemma3TextConfig(
        **{**GROUPED, "max_position_embeddings": 8}, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 10.0}, "full_attention": DYNAMIC}),
], ids=["llama", "gemma3"])
def test_what_is_computed_does_not_depend_on_what_was_before(config: Callable[[], Any]) -> None:
    """Dynamic rotary embeddings change with the longest sequence that they have seen."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config()).double().eval()
    longer, found = ids(2, 14, seed=3), []
    for recompute in ("none", "step"):
        made = make(model, "auto", recompute=recompute)
        before = made.write(CONTEXT).tensor
        found.append(gradients(made(CONTEXT, longer, longer).loss, made))  # READ is longer than WRITE, which runs again
        made.write(ids(2, 30))
        assert torch.equal(made.write(CONTEXT).tensor, before)
    for name, expected in found[0].items():
        assert_same(found[1][name], expected, name)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
@pytest.mark.parametrize("recompute", ["none", "step"])
def test_gradient_checkpointing_of_a_model_s_own_forward(recompute: str) -> None:
    model = build("phi", attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
    model.gradient_checkpointing_enable()
    made = make(model, "own", recompute=recompute)
    runs: list[int] = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss = made(CONTEXT, QUERY, LABELS, LENGTHS).loss
    plain = len(runs)
    assert loss is not None
    loss.backward()
    hook.remove()
    assert len(runs) > plain + (0 if recompute == "none" else OPTIONS["steps"])  # layers ran again
    made.zero_grad()
    assert_equals_eager(model, made)


def test_reading_writing_and_generating_by_a_model_s_own_forward() -> None:
    model = build("llama")
    fused, own = make(model, "fused", control_tokens=1), make(model, "own", control_tokens=1)
    query, lengths = ids(2, 3, 4, seed=2), torch.tensor([[4, 1, 3], [2, 0, 4]])
    with torch.no_grad(), Double():
        memories = [made.write(CONTEXT, context_lengths=LENGTHS) for made in (fused, own)]
        assert_same(memories[1].tensor, memories[0].tensor, "memory")
        assert_same(own.read(memories[1], query, next_token=True), fused.read(memories[0], query, next_token=True),
                    "logits")
        expected = fused.generate(memories[0], query, query_lengths=lengths, max_new_tokens=5)
        found = own.generate(memories[1], query, query_lengths=lengths, max_new_tokens=5)
        assert torch.equal(found, expected)
        end = expected[0, 0, 1].item()
        both = [made.generate(memory, query, query_lengths=lengths, max_new_tokens=5, eos_token_id=end)
                for made, memory in zip((fused, own), memories, strict=True)]
        assert torch.equal(*both)


def test_the_model_s_own_settings_of_generation_take_no_part() -> None:
    made = make(build("llama"), "own")
    settings = made.backbone.pretrained.generation_config  # type: ignore[attr-defined]
    memory, query = made.write(CONTEXT), ids(2, 4, seed=2)
    expected = made.generate(memory, query, max_new_tokens=5)
    settings.eos_token_id, settings.repetition_penalty, settings.max_length = expected[0, 1].item(), 9.0, 3
    assert torch.equal(made.generate(memory, query, max_new_tokens=5), expected)
    settings.do_sample, settings.temperature = True, 9.0
    assert torch.equal(made.generate(memory, query, max_new_tokens=5), expected)
    assert made.backbone.pretrained.generation_config is settings  # type: ignore[attr-defined]


def test_dropout_of_a_model_s_own_forward_is_replayed() -> None:
    model = build("gpt2", attn_pdrop=0.2, resid_pdrop=0.2).train()
    losses = []
    for recompute in ("none", "step"):
        made = make(model, "auto", recompute=recompute)
        assert made.chosen is not None
        assert made.chosen.forward == "own"
        torch.manual_seed(5)
        out = made(CONTEXT, QUERY, LABELS, LENGTHS)
        losses.append({"loss": out.loss, **gradients(out.loss, made)})
    for name in losses[0]:
        assert_same(losses[1][name], losses[0][name], name)


def test_the_choice_is_told_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gradmem"):
        for _ in range(2):
            chosen = make(build("phi"), "auto").chosen
    assert chosen is not None
    assert chosen.forward == "own"
    assert "got PhiForCausalLM" in chosen.reason
    assert [r.getMessage() for r in caplog.records] == [f"PhiForCausalLM is run by {chosen}"]
    assert str(chosen).startswith("the model's own forward: Decoder.from_transformers: model: expected a LlamaFor")
    llama = build("llama")
    assert isinstance(make(llama, "auto").backbone, TransformersLM)
    assert isinstance(make(llama, "own").backbone, OwnForwardLM)
    assert make(build("gpt2"), "fused").chosen.reason == "as asked"  # type: ignore[union-attr]
    dropping = make(build("gpt2", attn_pdrop=0.1), "auto").chosen
    assert "attn_pdrop=0.1" in dropping.reason  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match=r"Decoder.from_transformers: model: expected .*got PhiForCausalLM"):
        make(build("phi"), "fused")
    with pytest.raises(ArgumentError, match="forward: expected one of auto, fused, own, got 'mine'"):
        make(llama, "mine")


class Capped(transformers.LlamaForCausalLM):
    """A model of somebody's own, of a known architecture."""

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        out = super().forward(inputs_embeds=inputs_embeds, **kwargs)
        out.logits = out.logits.tanh()
        return out


def changed(kind: str) -> Any:
    model = build("llama")
    layer = model.model.layers[1]
    if kind == "class":
        model.__class__ = Capped
    elif kind == "hook":  # as steering vectors are added
        layer.register_forward_hook(lambda module, inputs, out: out + 0.5)
    else:
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, **kw: (2 * attend(*args, **kw)[0], None)
    return model


@pytest.mark.parametrize(("kind", "name"), [("class", "Capped"), ("hook", r"model\.model\.layers\.1"),
                                            ("forward", r"model\.model\.layers\.1\.self_attn")])
def test_models_with_code_of_their_own_run_it(kind: str, name: str) -> None:
    model = changed(kind)
    made = make(model, "auto")
    assert made.chosen is not None
    assert re.match(f"{name} has code or hooks that are not of transformers", made.chosen.reason)
    assert_equals_eager(model, made)
    plain = make(build("llama"), "auto")
    assert plain(CONTEXT, QUERY, LABELS, LENGTHS).loss != made(CONTEXT, QUERY, LABELS, LENGTHS).loss
    assert make(changed(kind), "fused").chosen.reason == "as asked"  # type: ignore[union-attr]


def test_linear_maps_with_hooks_are_run_by_the_fused_decoder() -> None:
    for family, name in (("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")):
        model = build(family)
        model.get_submodule(name).register_forward_hook(lambda module, inputs, out: 2 * out)
        made = make(model, "auto")
        assert isinstance(made.backbone, TransformersLM)
        assert_equals_eager(model, made)


def test_layers_that_cannot_choose_their_attention_are_told_of() -> None:
    fields: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4}
    bloom = transformers.AutoModelForCausalLM.from_config(transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=D, n_layer=1, n_head=4))
    chosen = GradMem.from_pretrained_backbone(bloom, GradMemConfig()).chosen
    assert chosen is not None
    assert chosen.reason.endswith("its layers cannot choose their attention, and keep 'eager'")
    falcon = transformers.AutoModelForCausalLM.from_config(transformers.FalconConfig(**fields))
    made = GradMem.from_pretrained_backbone(falcon, GradMemConfig())
    with pytest.raises(ArgumentError, match="got 'sdpa'; load the model with attn_implementation='eager'"):
        made(CONTEXT, QUERY, LABELS)
    assert "cannot choose" not in make(build("phi"), "own").chosen.reason  # type: ignore[union-attr]


def test_a_model_by_its_path(tmp_path: Any) -> None:
    build("llama").save_pretrained(tmp_path)
    made = make(str(tmp_path), "auto")
    assert made.backbone.name_or_path == str(tmp_path)
    assert made(CONTEXT, QUERY, LABELS).loss.isfinite()


def test_layers_are_checkpointed_by_the_model_itself() -> None:
    with pytest.raises(ArgumentError, match=r"recompute: expected one of none, step, auto .*, got 'layer'; .*checkp"):
        make(build("phi"), "own", recompute="layer")
    assert make(build("phi"), "own", recompute="auto").resolve_recompute(CONTEXT) == "step"


class Head(nn.Module):
    """No causal language model of transformers."""


@pytest.mark.parametrize(("model", "message"), [
    (Head, "model: expected a causal language model of transformers that takes inputs_embeds, got Head"),
    (lambda: build("llama", is_causal=False), "model.config: expected a causal decoder"),
    (lambda: build("llama").model, "model: expected a language model with a head, got LlamaModel"),
])
def test_what_no_forward_serves_is_refused(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make(model(), "own")


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Patches models as Liger does: classes, forwards of instances, and functions of a model's file."""

    def mark(value: Any) -> Any:
        value.__module__ = "liger_kernel.transformers.some"
        return value

    def patch(kind: str, model: Any) -> None:
        layer, file = model.model.layers[0], transformers.models.llama.modeling_llama
        if kind == "class":
            layer.mlp.__class__ = mark(type("LigerSwiGLUMLP", (type(layer.mlp),), {}))
        elif kind == "instance":
            layer.mlp.forward = types.MethodType(mark(lambda self, x: type(self).forward(self, x)), layer.mlp)
        elif kind == "forward of the class":
            monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", mark(
                lambda self, *args, inputs_embeds=None, **kw: self.model(inputs_embeds=inputs_embeds)))
        elif kind == "function":
            rotary = file.apply_rotary_pos_emb
            monkeypatch.setattr(file, "apply_rotary_pos_emb", mark(lambda *args, **kw: rotary(*args, **kw)))
        else:
            entropy = F.cross_entropy
            monkeypatch.setattr(F, "cross_entropy", mark(lambda *args, **kw: entropy(*args, **kw)))

    return patch


@pytest.mark.parametrize("kind", ["class", "instance", "forward of the class", "function", "cross entropy"])
def test_patches_that_are_wrong_at_second_order_are_refused(liger: Any, kind: str) -> None:
    model = build("llama")
    made = make(model, "own")
    made(CONTEXT, QUERY, LABELS)
    liger(kind, model)
    with pytest.raises(ArgumentError, match=r"expected kernels that are right at second order, got .*liger_kernel; "
                                            r"load the model in a process that does not patch it .*order='first'"):
        made(CONTEXT, QUERY, LABELS)
    with torch.no_grad():  # no second derivative will be asked for
        if kind != "forward of the class":
            made.write(CONTEXT)
            make(model, "own", order="first")(CONTEXT, QUERY, LABELS)
    if kind != "cross entropy":  # the fused decoder reads parameters and runs no forward of the model's modules
        make(model, "fused")(CONTEXT, QUERY, LABELS)


@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
def test_attention_without_a_second_derivative_is_refused(name: str) -> None:
    model = build("phi")
    made = make(model, "own")
    model.set_attn_implementation(name)
    with pytest.raises(ArgumentError, match=rf"attn_implementation: expected .*, got '{name}'; call "
                                            r"model.set_attn_implementation\('gradmem'\)"):
        made(CONTEXT, QUERY, LABELS)
    model.set_attn_implementation("eager")
    assert made(CONTEXT, QUERY, LABELS).loss.isfinite()
    model.config._experts_implementation_internal = "sonicmoe"
    with pytest.raises(ArgumentError, match=r"experts_implementation: expected .*'sonicmoe'; call model.set_experts"):
        made(CONTEXT, QUERY, LABELS)
    model.config._experts_implementation_internal = None
    model._use_kernels = True  # what its property reads
    with pytest.raises(ArgumentError, match=r"use_kernels: expected .*got True; load the model with use_kernels=False"):
        made(CONTEXT, QUERY, LABELS)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
@pytest.mark.parametrize(("forward", "recompute"), [("fused", "layer"), ("own", "none"), ("own", "step")])
def test_layers_that_run_again_run_with_the_write_adapter_as_it_was(forward: str, recompute: str) -> None:
    """Also in READ, where it is off, and in a model's own checkpointing, which runs layers in the backward pass."""
    pytest.importorskip("peft")
    model = build("gpt_neox", attention_dropout=0.0, hidden_dropout=0.0).train()
    if forward == "own":
        model.gradient_checkpointing_enable()
    made = make(model, forward, recompute=recompute, write_lora_rank=2)
    adapters = [p for name, p in made.named_parameters() if "lora_" in name]
    assert adapters
    assert_equals_eager(model, made)


def test_the_write_adapter_is_no_part_of_what_reads(tmp_path: Any) -> None:
    pytest.importorskip("peft")
    for family in ("llama", "qwen3"):  # the latter with tied tables
        model = build(family)
        with torch.no_grad():
            plain = model(QUERY).logits
        made = make(model, "fused", write_lora_rank=2, write_lora_targets="q_proj,down_proj")
        before, memory = made.fingerprint(), made.write(CONTEXT)
        adapted = {name.split(".")[-4] for name, _ in made.named_parameters() if "lora_A" in name}
        assert adapted == {"q_proj", "down_proj"}
        with torch.no_grad():
            for name, p in made.named_parameters():
                if "lora_" in name:
                    p.add_(0.1)
        assert made.fingerprint() == before
        assert not torch.equal(made.write(CONTEXT).tensor, memory.tensor)
        with torch.no_grad():
            assert torch.equal(model(QUERY).logits, plain)
        made.write(CONTEXT)[0].export_peft(tmp_path / "adapter")  # which refuses active adapters
        made.backbone.save_pretrained(tmp_path / family)  # type: ignore[attr-defined]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family, attn_implementation="eager")
        assert not [name for name, _ in loaded.named_parameters() if "lora_" in name or "base_layer" in name]
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(QUERY).logits, plain, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_dropout_of_write_adapters_takes_the_model_s_own_forward() -> None:
    pytest.importorskip("peft")
    found = []
    for recompute in ("none", "step"):  # which drops the same again
        made = make(build("llama"), "auto", write_lora_rank=2, write_lora_dropout=0.5, recompute=recompute)
        assert made.chosen is not None
        assert made.chosen.forward == "own"
        assert "write_lora_dropout=0.5" in made.chosen.reason
        torch.manual_seed(5)
        found.append(gradients(made.train()(CONTEXT, QUERY, LABELS).loss, made))
    for name, expected in found[0].items():
        assert_same(found[1][name], expected, name)
    assert not torch.equal(*(made.train()(CONTEXT, QUERY).memory for _ in range(2)))
    assert torch.equal(*(made.eval()(CONTEXT, QUERY).memory for _ in range(2)))


def test_freezing_leaves_what_gradmem_adds_and_adapters() -> None:
    pytest.importorskip("peft")
    model = build("llama")
    made = make(model, "fused", freeze_backbone=True, write_lora_rank=2, control_tokens=1, write_head=True)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert all("lora_" in name or not name.startswith("backbone.") for name in trained)
    assert {"memory_init", "write_head", "write_prefix.start", "read_prefix.end"} < trained
    assert any("lora_" in name for name in trained)
    assert make(build("llama"), "fused", write_lora_rank=2).backbone.embed_tokens.weight.requires_grad


def test_write_adapters_that_cannot_be_are_refused() -> None:
    pytest.importorskip("peft")
    with pytest.raises(ArgumentError, match=r"write_lora_targets: expected names of linear layers .*, got 'wings'"):
        make(build("llama"), "fused", write_lora_rank=2, write_lora_targets="wings")
    with pytest.raises(ArgumentError, match=r"write_lora_dropout: expected 0\.0 with the fused decoder.*own forward"):
        make(build("llama"), "fused", write_lora_rank=2, write_lora_dropout=0.1)
    for forward in ("fused", "own"):
        with pytest.raises(ArgumentError, match=r"write_lora_targets: expected names of linear layers .*, got 'wings'"):
            make(build("llama"), forward, write_lora_rank=2, write_lora_targets="q_proj, wings")
        with pytest.raises(ArgumentError, match=r"write_lora_targets: expected layers .*, got 'lm_head'; .*write_head"):
            make(build("llama"), forward, write_lora_rank=2, write_lora_targets="q_proj,lm_head")
        with pytest.raises(ArgumentError, match=r"write_lora_targets: expected layers between .*'model.embed_tokens'"):
            make(build("llama"), forward, write_lora_rank=2, write_lora_targets="embed_tokens")
    adapted = make(build("llama"), "fused", write_lora_rank=2)
    with pytest.raises(ArgumentError, match=r"write_lora_rank: expected 0 for a model that has .*; merge them"):
        GradMem(adapted.backbone, GradMemConfig(write_lora_rank=2))
    from gradmem import CausalLM, LMConfig

    with pytest.raises(ArgumentError, match="write_lora_rank: expected 0 with a CausalLM, got 2; adapters of peft"):
        GradMem(CausalLM(LMConfig()), GradMemConfig(write_lora_rank=2))


def test_a_projection_of_each_sample_s_own_depends_on_its_context_alone() -> None:
    made = make(build("llama"), "fused", memory_projection="per_sample")
    both = made.write(CONTEXT, context_lengths=LENGTHS).tensor
    for i, n in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(made.write(CONTEXT[i : i + 1, :n]).tensor, both[i : i + 1], rtol=1e-11, atol=1e-12)
    assert_same(made(CONTEXT, QUERY, context_lengths=LENGTHS).logits,
                made.read(made.write(CONTEXT, context_lengths=LENGTHS), QUERY), "logits")
    with pytest.raises(ArgumentError, match="memory: expected 3 tensor"):
        made._write_loss(CONTEXT, None)(made.memory_init.expand(2, -1, -1))
