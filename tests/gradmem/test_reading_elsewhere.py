"""Memories of a transformers model, read by peft and by the model itself from embeddings."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmem import GradMem, GradMemConfig, Memory, MemoryFileError, TransformersLM
from gradmem_kernels import ArgumentError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_transformers import Double  # noqa: E402

VOCAB = 31
CONTEXT = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
QUERY = torch.tensor([[3, 14, 15, 9], [2, 7, 18, 28]])


def base_model(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": None}
    if family == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.3, **sizes))
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.3, **sizes))
    return model.to(dtype).eval()


def make(base: Any, **options: Any) -> GradMem:
    torch.manual_seed(1)
    config = {"memory_tokens": 3, "steps": 2, "inner_lr": 2.0, "memory_init_std": 0.5, "control_tokens": 2,
              "memory_projection": "shared", **options}
    model = GradMem(TransformersLM(base), GradMemConfig(**config))
    with torch.no_grad():
        for weight in [*model.read_prefix.parameters(), *model.write_prefix.parameters()]:
            weight.add_(torch.randn_like(weight), alpha=0.2)  # not the identity, start and end different
    return model


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Any:
    return base_model(request.param, torch.float32)


def written(base: Any, **options: Any) -> Memory:
    with torch.no_grad():
        return make(base, **options).write(CONTEXT)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peft_computes_what_read_does(family: str, dtype: torch.dtype, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    base = base_model(family, dtype)
    memory = written(base)
    assert memory.model is not None
    with torch.no_grad():
        expected = memory.model.read(memory, QUERY, next_token=True)
    continued = memory.model.generate(memory, QUERY, max_new_tokens=6)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of the embedding that peft loads the adapter into
    try:
        for i in range(2):
            memory[i].export_peft(tmp_path / str(i))
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "0", adapter_name="first")
        adapted.load_adapter(tmp_path / "1", adapter_name="second")
    finally:
        torch.set_default_dtype(previous)
    for i, name in enumerate(("first", "second")):
        adapted.set_adapter(name)
        ids = QUERY[i : i + 1]
        with torch.no_grad(), Double() if dtype == torch.float64 else contextlib.nullcontext():
            logits = adapted(input_ids=ids).logits[:, -ids.shape[1] - 1 :]
            plain = base(inputs_embeds=memory[i].prompt_embeds(ids)).logits[:, -ids.shape[1] - 1 :]
        assert torch.equal(logits, plain)
        assert relative(logits, expected[i : i + 1]) < (1e-12 if dtype == torch.float64 else 1e-6)
        tokens = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens[0, ids.shape[1] :], continued[i])


def test_the_adapter_names_its_base_and_its_provenance(base: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    base.name_or_path = "models/base"  # what from_pretrained sets
    memory = written(base)[1]
    memory.export_peft(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/base"
    assert (config["num_virtual_tokens"], config["token_dim"]) == (3 + 2 * 2, 16)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert list(file.keys()) == ["prompt_embeddings"]
        about = json.loads(file.metadata()["gradmem"])
    assert about["provenance"][0]["context"] == memory.provenance[0].context
    memory.export_peft(tmp_path, base_model="elsewhere")  # over itself
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "elsewhere"


def test_prompt_embeds_are_what_the_model_continues(base: Any) -> None:
    memory = written(base)
    assert memory.model is not None
    rows = memory.prompt_embeds(QUERY)
    assert rows.shape == (2, 7 + 4, 16)
    assert not rows.requires_grad
    with torch.no_grad():
        logits = base(inputs_embeds=rows).logits[:, 6:]
        assert relative(logits, memory.model.read(memory, QUERY, next_token=True)) < 1e-6
    tokens = base.generate(inputs_embeds=rows, attention_mask=torch.ones(2, 11), max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, memory.model.generate(memory, QUERY, max_new_tokens=6))

    several = memory.prompt_embeds(torch.stack([QUERY, QUERY.flip(0)], 1))
    assert several.shape == (2, 2, 11, 16)
    assert torch.equal(several[:, 0], rows)
    torch.testing.assert_close(several[0, 1], memory[0].prompt_embeds(QUERY[1:])[0])
    assert torch.equal(memory.prompt_embeds(torch.empty(2, 0, dtype=torch.int64)), rows[:, :7])


def test_a_memory_from_its_file_is_exported_too(base: Any, tmp_path: Path) -> None:
    memory = written(base)
    memory.save(tmp_path / "m")
    loaded = Memory.load(tmp_path / "m", memory.model)
    assert torch.equal(loaded.prompt_embeds(QUERY), memory.prompt_embeds(QUERY))
    with pytest.raises(ArgumentError, match=r"Memory.prompt_embeds: model: .*none; .*Memory.load\(path, model\)"):
        Memory.load(tmp_path / "m").prompt_embeds(QUERY)


def test_a_trained_backbone_is_saved_beside_its_memories(base: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        next(base.parameters()).mul_(1.5)
    memory = written(base)
    assert memory.model is not None
    memory.model.backbone.save_pretrained(tmp_path)
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = served(inputs_embeds=memory.prompt_embeds(QUERY)).logits[:, 6:]
        assert relative(logits, memory.model.read(memory, QUERY, next_token=True)) < 1e-6


def test_what_cannot_be_exported_is_refused(base: Any, tmp_path: Path) -> None:
    memory = written(base)
    path = tmp_path / "adapter"
    with pytest.raises(ArgumentError, match=r"memory: expected one memory, got 2; export memory\[i\]"):
        memory.export_peft(path)
    broken = memory.tensor.clone()
    broken[0, 0, 0] = torch.inf
    with pytest.raises(MemoryFileError, match="memory 0 is not finite"):
        Memory(broken[:1], memory.provenance[:1], memory.model).export_peft(path)
    with torch.no_grad():
        next(base.parameters()).mul_(1.5)  # trained on
    with pytest.raises(ArgumentError, match="model: expected the weights that wrote the memory, fingerprint"):
        memory[0].export_peft(path)
    assert not path.exists()


def test_a_backbone_with_adapters_of_its_own_is_refused(base: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "c_attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    memory = written(adapted.get_base_model())
    with pytest.raises(ArgumentError, match=r"a backbone without active adapters, got one at .*; merge them"):
        memory[0].export_peft(tmp_path)
    adapted.merge_adapter()
    written(adapted.get_base_model())[0].export_peft(tmp_path)


def test_the_built_in_decoder_is_refused(make_model: Any, tmp_path: Path) -> None:
    memory = make_model().write(CONTEXT[:1])
    with pytest.raises(ArgumentError, match=r"whose backbone is a model of transformers, got CausalLM; peft adapts"):
        memory.export_peft(tmp_path)
