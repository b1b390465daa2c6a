"""transformers' models on these kernels are what they are on its eager attention, to second order.

Models are tiny, random, built from configurations, and compared in float64 (:class:`Double`) with attention="eager".
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import grad
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402

from gradmem_kernels import ArgumentError, attention, write  # noqa: E402
from gradmem_kernels.integrations import transformers as integration  # noqa: E402
from gradmem_kernels.integrations.transformers import KeyMask, attend, make_mask, register  # noqa: E402

register()

B, S, VOCAB, WINDOW = 2, 11, 32, 4
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
         "intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
GEMMA = {**GROUPED, "sliding_window": WINDOW, "query_pre_attn_scalar": 6,
         "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": lambda **kw: transformers.LlamaConfig(**GROUPED, **kw),
    "qwen3": lambda **kw: transformers.Qwen3Config(**GROUPED, **kw),
    "mistral": lambda **kw: transformers.MistralConfig(**GROUPED, sliding_window=WINDOW, **kw),
    "gpt2": lambda **kw: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, scale_attn_by_inverse_layer_idx=True, **kw),
    "gpt_neox": lambda **kw: transformers.GPTNeoXConfig(**SIZES, **kw),
    "gemma2": lambda **kw: transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=1.5, **kw),
    "gemma3": lambda **kw: transformers.Gemma3TextConfig(**GEMMA, **kw),
    # Its sliding layers pass no sliding_window: the mask alone says it.
    "qwen2_moe": lambda **kw: transformers.Qwen2MoeConfig(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2,
        num_experts=2, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        experts_implementation="eager", **kw),
}
RIGHT = torch.arange(S) < torch.tensor([[S], [7]])
PACKED = torch.tensor([[*range(5), *range(6)], [*range(S)]])


class Double(TorchFunctionMode):
    """Wherever a model asks for float32, as in softmax and norms, it gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        given = [*args, *(kwargs or {}).values()]
        given = [torch.float64 if value is torch.float32 else value for value in given]
        return func(*given[:len(args)], **dict(zip(kwargs or {}, given[len(args):], strict=True)))


@functools.cache
def build(family, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**options)).double().eval()
    for parameter in model.parameters():  # as initialised, attention would be all but uniform
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def use(model, name):
    model.set_attn_implementation(name)
    return model


def random_ids(batch=B, length=S):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def derivatives(model, name, valid=None, order=2, batch=B, **inputs):
    """Logits, gradients, and, through one step of gradient descent on the embeddings, gradients again."""
    use(model, name)
    embeds = model.get_input_embeddings()(random_ids(batch)).detach().requires_grad_()
    valid = torch.ones(batch, S, dtype=torch.bool) if valid is None else valid
    wanted = [embeds, *(p for p in model.parameters() if p.requires_grad)]

    def forward(x):
        with Double():
            logits = model(inputs_embeds=x, use_cache=False, **inputs).logits
        return logits, torch.where(valid[..., None], logits.cos(), 0).sum()

    logits, loss = forward(embeds)
    first = grad(loss, wanted, create_graph=order > 1, allow_unused=True)
    found = [logits[valid], loss, *first]
    if order > 1:
        found += grad(forward(embeds - 0.1 * first[0])[1], wanted, allow_unused=True)
    return [torch.zeros(()) if t is None else t.detach() for t in found]


def assert_same(found, expected, rtol=1e-9):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * max(scale, 1e-3))


@pytest.fixture
def calls(monkeypatch):
    """The keywords of every call of attention."""
    found = []

    def spy(q, k, v, **options):
        found.append(options)
        return attention(q, k, v, **options)

    monkeypatch.setattr(integration, "attention", spy)
    return found


def patterns():
    own = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(2)) - 0.5
    own = own.double().masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), torch.finfo(torch.float64).min)
    return {
        "plain": ({}, None),
        "right": ({"attention_mask": RIGHT.long()}, RIGHT),
        "left": ({"attention_mask": RIGHT.flip(1).long()}, RIGHT.flip(1)),
        "packed": ({"position_ids": PACKED}, None),
        "own": ({"attention_mask": own}, None),
    }


@pytest.mark.parametrize("pattern", patterns())
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager(family, pattern):
    model = build(family)
    inputs, valid = patterns()[pattern]
    assert_same(derivatives(model, "gradmem", valid, **inputs), derivatives(model, "eager", valid, **inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_finite(family):
    """Rows that see nothing, too, and the loss of them."""
    inputs = {"attention_mask": RIGHT.flip(1).long()}
    assert all(t.isfinite().all() for t in derivatives(build(family), "gradmem", **inputs))


@pytest.mark.parametrize("pattern", ["plain", "right"])
def test_bidirectional_decoder(pattern):
    inputs, valid = patterns()[pattern]
    model = build("llama", is_causal=False)
    assert_same(derivatives(model, "gradmem", valid, **inputs), derivatives(model, "eager", valid, **inputs))


@pytest.mark.parametrize("recompute", ["none", "step"])
def test_write_through_a_model(recompute):
    model, mask = build("llama"), RIGHT.flip(1)
    context = model.get_input_embeddings()(random_ids()).detach()
    memory = context[:, :3].clone().requires_grad_()
    wanted = [memory, *model.model.layers.parameters()]

    def inner_loss(memory):
        with Double():
            embeds = torch.cat([memory, context[:, 3:]], dim=1)
            logits = model(inputs_embeds=embeds, use_cache=False, attention_mask=mask.long()).logits
        return torch.where(mask[..., None], logits.cos(), 0).sum((1, 2))

    use(model, "gradmem")
    found = write(inner_loss, memory, steps=2, lr=0.01, recompute=recompute).memory
    use(model, "eager")
    expected = memory
    for _ in range(2):
        expected = expected - 0.01 * grad(inner_loss(expected).sum(), expected, create_graph=True)[0]
    assert_same(grad(found.square().sum(), wanted), grad(expected.square().sum(), wanted))


def test_only_what_must_be_is_a_matrix(calls):
    window = {"llama": {None}, "mistral": {WINDOW}, "gemma2": {WINDOW, None}, "qwen2_moe": {WINDOW, None}}
    for family, windows in window.items():
        for pattern, shape in (("plain", None), ("right", (B, 1, 1, S)), ("left", (B, 1, 1, S))):
            inputs, _ = patterns()[pattern]
            calls.clear()
            derivatives(build(family), "gradmem", order=1, **inputs)
            assert {call["window"] for call in calls} == windows
            assert all(call["causal"] for call in calls)
            assert {None if call["mask"] is None else tuple(call["mask"].shape) for call in calls} == {shape}


def test_packed_by_lengths(calls):
    """cu_seq_lens cost no matrix where a mask of ones keeps transformers from making one of position_ids."""
    for family in ("llama", "mistral"):
        model = build(family)
        bounds = torch.tensor([0, 5, S], dtype=torch.int32)
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
        expected = derivatives(model, "eager", batch=1, position_ids=PACKED[:1])
        calls.clear()
        both = derivatives(model, "gradmem", batch=1, position_ids=PACKED[:1], **lengths)
        assert all(call["mask"].shape == (1, 1, S, S) for call in calls)
        calls.clear()
        ones = torch.ones(1, S, dtype=torch.long)
        alone = derivatives(model, "gradmem", batch=1, position_ids=PACKED[:1], attention_mask=ones, **lengths)
        assert all(call["mask"] is None for call in calls)
        assert_same(both, expected)
        assert_same(alone, expected)


def test_packed_queries_and_keys_of_different_lengths():
    q, k, v = (torch.randn(1, 2, length, 4, dtype=torch.float64) for length in (5, S, S))
    bounds, key_bounds = (torch.tensor(b, dtype=torch.int32) for b in ([0, 2, 5], [0, 7, S]))
    found, _ = attend(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, cu_seq_lens_k=key_bounds)
    parts = [attention(q[:, :, :2], k[:, :, :7], v[:, :, :7], causal=True),
             attention(q[:, :, 2:], k[:, :, 7:], v[:, :, 7:], causal=True)]
    torch.testing.assert_close(found, torch.cat(parts, dim=2).transpose(1, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sliding_cache", [False, True])
def test_chunks_of_a_cache(family, padded, sliding_cache):
    """More keys than queries: the last query sees the last key, whatever a sliding cache has let go."""
    model, ids = build(family), random_ids()
    mask = RIGHT.flip(1).long() if padded else torch.ones(B, S, dtype=torch.long)

    def run(name):
        cache = transformers.DynamicCache(**({"config": model.config} if sliding_cache else {}))
        found = []
        for start, stop in ((0, 6), (6, 9), (9, 10), (10, S)):
            embeds = model.get_input_embeddings()(ids[:, start:stop]).detach().requires_grad_()
            with Double():
                logits = use(model, name)(inputs_embeds=embeds, past_key_values=cache,
                                          attention_mask=mask[:, :stop]).logits
            logits = logits[mask[:, start:stop].bool()]
            found += [logits.detach(), *grad(logits.cos().sum(), embeds, retain_graph=True)]
        return found

    assert_same(run("gradmem"), run("eager"))


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_like_eager(family, cache):
    model, ids = build(family), random_ids(length=7)
    mask = (torch.arange(7) >= torch.tensor([[0], [3]])).long()

    def run(name):
        options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
        with Double():
            out = use(model, name).generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False,
                                            return_dict_in_generate=True, output_logits=True, **options)
        return out.sequences, out.logits

    sequences, logits = run("gradmem")
    expected_sequences, expected_logits = run("eager")
    assert torch.equal(sequences, expected_sequences)
    assert_same([t.double() for t in logits], [t.double() for t in expected_logits], 1e-6)


def dropped(seed, x, **options):
    """The loss of a GPT-2 in training."""
    model = build("gpt2", **{"attn_pdrop": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **options})
    torch.manual_seed(seed)
    with Double():
        return use(model, "gradmem").train()(inputs_embeds=x, use_cache=False).logits.cos().sum()


@pytest.fixture
def x():
    return build("gpt2").get_input_embeddings()(random_ids()).detach().requires_grad_()


def test_dropout_has_the_seed_of_torch(x):
    assert torch.equal(dropped(0, x), dropped(0, x))
    assert not torch.equal(dropped(0, x), dropped(1, x))
    assert not torch.equal(dropped(0, x), dropped(0, x, attn_pdrop=0.0))
    assert torch.equal(dropped(0, x, resid_pdrop=0.1), dropped(0, x, resid_pdrop=0.1))


def test_dropout_to_second_order(x):
    direction = torch.randn_like(x)

    def slope(at, **options):
        return grad(dropped(0, at, **options), at, create_graph=True)[0]

    found, = grad((slope(x) * direction).sum(), x)
    step = 1e-5
    ahead, behind = (slope((x + sign * step * direction).detach().requires_grad_()).detach() for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6 * found.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
def test_checkpointing_draws_the_same_dropout():
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["gpt2"](attn_pdrop=0.3)).train()

    def slope():
        torch.manual_seed(0)
        loss = use(model, "gradmem")(random_ids(), use_cache=False).logits.cos().sum()
        return grad(loss, model.get_input_embeddings().weight)

    kept = slope()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(slope(), kept, 1e-5)


@pytest.mark.parametrize("kind", ["keys", "matrix"])
def test_rows_that_see_nothing_are_zero(kind):
    q, k, v = (torch.randn(B, 2, S, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keys = RIGHT.flip(1)
    mask = KeyMask(keys) if kind == "keys" else keys[:, None, None, :] & torch.ones(S, S, dtype=torch.bool).tril()
    out, _ = attend(torch.nn.Module(), q, k, v, mask)
    assert torch.equal(out[1, :4], torch.zeros_like(out[1, :4]))
    assert out[1, 4:].abs().min() > 0
    first = grad(out.cos().sum(), (q, k, v), create_graph=True)
    second = grad(sum(t.square().sum() for t in first), (q, k, v))
    for t in (*first, *second):
        assert torch.equal(t[1, :, :4], torch.zeros_like(t[1, :, :4]))
        assert t.isfinite().all()


def test_autocast():
    model = build("llama")
    single = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    single.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    embeds = single.get_input_embeddings()(random_ids()).detach().requires_grad_()

    def run(name):
        with torch.autocast("cpu", torch.bfloat16):
            loss = use(single, name)(inputs_embeds=embeds, use_cache=False).logits.float().cos().sum()
        slope, = grad(loss, embeds, create_graph=True)
        return [slope.detach(), *grad(slope.square().sum(), embeds)]

    for ours, theirs in zip(run("gradmem"), run("eager"), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("said_by", ["keyword", "module", "nobody"])
def test_without_a_mask(said_by, causal):
    q, k, v = (torch.randn(B, 2, S, 4, dtype=torch.float64) for _ in range(3))
    module = torch.nn.Module()
    if said_by != "nobody":
        module.is_causal = causal if said_by == "module" else not causal
    found, probabilities = attend(module, q, k, v, None, **({"is_causal": causal} if said_by == "keyword" else {}))
    torch.testing.assert_close(found, attention(q, k, v, causal=causal or said_by == "nobody").transpose(1, 2))
    assert probabilities is None


def test_autocast_leaves_float64():
    q, k, v = (torch.randn(B, 2, S, 4, dtype=torch.float64) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(torch.nn.Module(), q, k, v, None)[0].dtype == torch.float64


def test_masks_made():
    config = SimpleNamespace(sliding_window=WINDOW, attention_chunk_size=None)
    causal = masking_utils.causal_mask_function
    window = masking_utils.sliding_window_causal_mask_function(WINDOW)

    def made(q, k, function=causal, **options):
        return make_mask(batch_size=B, q_length=q, kv_length=k, mask_function=function, config=config, **options)

    sliding = {"function": window, "local_size": WINDOW}
    keys = RIGHT.flip(1)
    assert made(S, S) is None
    assert made(1, S, q_offset=S - 1) is None
    assert made(S, S, attention_mask=torch.ones(B, S, dtype=torch.bool)) is None
    assert made(3, S, q_offset=S - 3) == KeyMask()
    assert made(S, S, **sliding) == KeyMask(None, WINDOW)
    assert made(WINDOW, WINDOW, **sliding) is None
    assert torch.equal(made(S, S, attention_mask=keys).keys, keys)
    found = made(2, 5, attention_mask=RIGHT, q_offset=S - 2, kv_offset=S - 5, **sliding)
    assert torch.equal(found.keys, RIGHT[:, -5:])
    assert found.window == WINDOW
    short = made(S, S, attention_mask=RIGHT[:, :8])  # what a mask is too short for is hidden, as in transformers
    assert torch.equal(short.keys, RIGHT & (torch.arange(S) < 8))
    whole = made(S, S, allow_is_causal_skip=False)
    assert torch.equal(whole, torch.ones(S, S, dtype=torch.bool).tril().expand(B, 1, S, S))
    for q_offset, k in ((0, S), (torch.tensor(S - 3), S), (2, S)):  # static caches, prefixes
        assert torch.equal(made(3, k, q_offset=q_offset), made(3, k, q_offset=q_offset, allow_is_causal_skip=False))
    assert made(S, S, lambda b, h, q, k: k >= 0).shape == (B, 1, S, S)
    both_ways = {"function": masking_utils.bidirectional_mask_function, "allow_is_causal_skip": False}
    assert torch.equal(made(S, S, **both_ways, allow_is_bidirectional_skip=True), torch.ones(1, 1, 1, S).bool())
    assert torch.equal(made(S, S, **both_ways, allow_is_bidirectional_skip=True, attention_mask=keys),
                       keys[:, None, None, :])
    assert made(S, S, **both_ways, attention_mask=keys).shape == (B, 1, S, S)
    chunks = masking_utils.chunked_causal_mask_function(WINDOW, torch.zeros(B, dtype=torch.long))
    config = SimpleNamespace(sliding_window=WINDOW, attention_chunk_size=WINDOW)
    assert made(S, S, chunks, local_size=WINDOW).shape == (B, 1, S, S)


def test_sinks_raise():
    config = transformers.GptOssConfig(**{**GROUPED, "max_position_embeddings": 131072}, num_local_experts=2,
                                       num_experts_per_tok=1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="gradmem")
    with pytest.raises(ArgumentError, match=r"s_aux: expected None, got Parameter \[4\]; .*sinks.*eager"):
        model(random_ids())


def test_what_is_not_known_raises():
    model = use(build("llama"), "gradmem")
    with pytest.raises(ArgumentError, match=r"temperature: expected None, got 2\.0; .*eager"):
        model(random_ids(), temperature=2.0)
    model(random_ids(), temperature=None, sharpen=False)


def test_output_attentions_raises():
    model = use(build("llama"), "gradmem")
    with pytest.raises(ArgumentError, match=r"output_attentions: expected None, got True; .*eager"):
        model(random_ids(), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):  # transformers' own
        model.config.output_attentions = True
    model(random_ids(), output_attentions=False)


def refusals():
    square = torch.zeros(B, 1, S, S)
    bounds = torch.tensor([0, 5, S], dtype=torch.int32)
    one, several = torch.nn.Module(), torch.zeros(B, 2, 5, 4)
    return {
        "head_mask": ({"head_mask": torch.ones(2)}, "head_mask: expected None, got Tensor"),
        "position_bias": ({"position_bias": square}, "position_bias: expected None, .*gradient"),
        "cache": ({"cache": object()}, "cache: expected None, .*paged"),
        "window": ({"sliding_window": WINDOW}, "sliding_window: expected .*11 keys.*, got 4"),
        "chunk": ({"query": several}, "attention_mask: expected a mask for 5 queries and 11 keys.*, got None"),
        "not causal": ({"attention_mask": KeyMask(), "is_causal": False}, "is_causal: .*got False; .*config"),
        "three": ({"attention_mask": square[0]}, r"attention_mask: expected \[B, 1, Q, K\].*\[1, 11, 11\]"),
        "integers": ({"attention_mask": square.long()}, r"attention_mask: expected .*got torch.int64"),
        "learned": ({"attention_mask": square.requires_grad_()}, "attention_mask: .*no gradient.*eager"),
        "object": ({"attention_mask": object()}, "attention_mask: expected a tensor or None, got object"),
        "keys only": ({"cu_seq_lens_k": bounds}, "cu_seq_lens_k: expected cu_seq_lens_q"),
        "packed batch": ({"cu_seq_lens_q": bounds}, "cu_seq_?lens"),
        "module": ({"module": one, "softcap": -1.0}, "softcap"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refused(case):
    given, message = refusals()[case]
    tensors = {name: torch.zeros(B, 2, S, 4) for name in ("query", "key", "value")}
    with pytest.raises(ArgumentError, match=message):
        attend(**{"module": torch.nn.Module(), **tensors, "attention_mask": None, **given})


def test_register_again_and_without_a_fit_transformers(monkeypatch):
    register()
    assert transformers.AttentionInterface()["gradmem"] is attend
    assert transformers.AttentionMaskInterface()["gradmem"] is make_mask
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")  # it may have loaded itself anew
    with pytest.raises(ImportError, match=r"expected transformers >= 5\.4, got 4\.57\.6; .*gradmem-kernels\[trans"):
        register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"got none; .*gradmem-kernels\[transformers\]"):
        register()
