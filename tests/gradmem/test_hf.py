"""GradMem as a PreTrainedModel: transformers.Trainer and accelerate take it as it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from gradmem import CheckpointError, GradMemConfig  # noqa: E402
from gradmem.hf import ContextCollator, GradMemForCausalLM  # noqa: E402
from gradmem_kernels import ArgumentError  # noqa: E402

VOCAB = 23
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
                         "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
RECORDS = [{"context": [1 + i % 5, 2, 3 + i % 7, 4][: 3 + i % 2], "query": [5, i % 9], "target": [7 + i % 3, 8]}
           for i in range(16)]
WAYS = ("fused", "own")


def make(forward: str = "fused", **options: Any) -> GradMemForCausalLM:
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    config = GradMemConfig(**{"memory_tokens": 2, "steps": 2, "inner_lr": 0.5, "control_tokens": 1, **options})
    return GradMemForCausalLM.from_backbone(base, config, forward=forward)


def trainer(model: Any, directory: Path, **options: Any) -> Any:
    given = {"output_dir": str(directory), "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
             "remove_unused_columns": False, "report_to": "none", "logging_steps": 1, "save_steps": 2, "use_cpu": True,
             "disable_tqdm": True, **options}
    return transformers.Trainer(model=model, args=transformers.TrainingArguments(**given), train_dataset=RECORDS,
                                eval_dataset=RECORDS[:6], data_collator=ContextCollator())


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("forward", WAYS)
def test_trains_evaluates_saves_loads_and_resumes_exactly(forward: str, tmp_path: Path) -> None:
    model = make(forward)
    before = weights(model)
    run = trainer(model, tmp_path / "a")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4
    after = weights(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert run.evaluate()["eval_loss"] > 0
    logits = run.predict(RECORDS[:5]).predictions[0]
    assert logits.shape == (5, 4, VOCAB)

    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert {name: p.shape for name, p in weights(loaded).items()} == {name: p.shape for name, p in after.items()}
    batch = ContextCollator()(RECORDS[:3])
    with torch.no_grad():
        found, expected = loaded(**batch), model.eval()(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)

    again = make(forward)
    trainer(again, tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, weight in weights(again).items():
        assert torch.equal(weight, after[name]), name


@pytest.mark.parametrize("forward", WAYS)
@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_mixed_precision_and_checkpointing(forward: str, options: dict, tmp_path: Path) -> None:
    plain, other = make(forward), make(forward)
    for model, given in ((plain, {}), (other, options)):
        trainer(model, tmp_path / str(len(given)), max_steps=2, save_strategy="no", **given).train()
    for (name, found), expected in zip(weights(other).items(), weights(plain).values(), strict=True):
        assert found.isfinite().all()
        if "bf16" not in options:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)
    if "bf16" not in options:
        assert other.gradmem.config.recompute == ("layer" if forward == "fused" else "step")
        other.gradient_checkpointing_disable()
        assert other.gradmem.config.recompute == "step"


#: Of 1 to 4 labels, some of which are the first token of all.
UNEVEN = [{"context": [1 + i % 5, 2, 3, 4], "query": [5] * (i % 3), "target": list(range(7, 8 + i % 4))}
          for i in range(8)]


@pytest.mark.parametrize(("records", "options"), [(UNEVEN, {}), (RECORDS, {"inner_loss_weight": 0.5})],
                         ids=["uneven", "inner loss"])
def test_accumulated_gradients_are_those_of_the_whole_batch(records: list, options: dict, tmp_path: Path) -> None:
    """Also where micro-batches differ in their numbers of labels, and the mean of their means is not the mean."""
    whole, parts = make(**options), make(**options)
    losses = []
    for model, size in ((whole, 8), (parts, 2)):
        run = trainer(model, tmp_path, max_steps=1, save_strategy="no", per_device_train_batch_size=size, optim="sgd",
                      gradient_accumulation_steps=8 // size, learning_rate=1.0)
        run.train_dataset = records
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, found), expected in zip(weights(parts).items(), weights(whole).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_micro_batches_without_labels_add_nothing() -> None:
    model, batch = make(), ContextCollator()(RECORDS[:2])
    part = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert model(**part, num_items_in_batch=torch.tensor(4)).loss == 0
    assert model(**part, num_items_in_batch=0).loss == 0
    assert torch.equal(model(**batch, num_items_in_batch=4).loss, model(**batch).loss)
    torch.testing.assert_close(model(**batch, num_items_in_batch=8).loss, model(**batch).loss / 2)


def test_accelerate() -> None:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(RECORDS, batch_size=8, collate_fn=ContextCollator())  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(8):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", [
    {"memory_projection": "per_sample"}, {"write_head": True, "learn_inner_lr": "step"}, {"write_lora_rank": 2},
    {"freeze_backbone": True}, {"freeze_backbone": True, "write_lora_rank": 2},
], ids=str)
@pytest.mark.parametrize("forward", WAYS)
def test_options_survive_saving(forward: str, options: dict, tmp_path: Path) -> None:
    if "write_lora_rank" in options:
        pytest.importorskip("peft")
    model = make(forward, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    model.save_pretrained(tmp_path)
    loaded = GradMemForCausalLM.from_pretrained(tmp_path)
    assert loaded.gradmem.config == model.gradmem.config
    trained, expected = ({name for name, p in m.named_parameters() if p.requires_grad} for m in (loaded, model))
    assert trained == expected
    batch = ContextCollator()(RECORDS[:3])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("forward", WAYS)
def test_a_backbone_stays_as_it_was_given(forward: str) -> None:
    """Modules that transformers did not make itself, as a new head or LoRA, are not initialised again."""
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    base.model.layers[0].self_attn.q_proj = torch.nn.Linear(16, 16, bias=False)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    GradMemForCausalLM.from_backbone(base, GradMemConfig(memory_tokens=2), forward=forward)
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name]), name
    pytest.importorskip("peft")
    second = [p for name, p in make(forward, write_lora_rank=2).named_parameters() if "lora_B" in name]
    assert second
    assert not any(p.any() for p in second)  # WRITE starts as that of the backbone


@pytest.mark.parametrize("forward", WAYS)
def test_what_could_not_be_loaded_again_is_refused(forward: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ArgumentError, match=r"backbone: expected a model without adapters of peft.*merge_and_unload"):
        GradMemForCausalLM.from_backbone(adapted, GradMemConfig(), forward=forward)
    model = make(forward)
    with pytest.raises(ArgumentError, match="resize the backbone's, then call from_backbone"):
        model.resize_token_embeddings(VOCAB + 1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["gradmem.memory_init"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected all tensors .*, got none named gradmem\.memory_init"):
        GradMemForCausalLM.from_pretrained(tmp_path)


def test_another_model_s_files_are_refused(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"config.base_config: expected the configuration of a backbone, got None"):
        GradMemForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("forward", WAYS)
def test_bfloat16_is_loaded_trained_and_saved(forward: str, tmp_path: Path) -> None:
    make(forward).save_pretrained(tmp_path / "a")
    model = GradMemForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = ContextCollator()(RECORDS[:3])
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path / "b")
    again = GradMemForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_what_the_collator_makes() -> None:
    batch = ContextCollator(pad_token_id=9)([{"context": [1, 2, 3], "query": [4], "target": [5, 6]},
                                             {"context": torch.tensor([7]), "query": [], "target": [8]}])
    assert batch["context_input_ids"].tolist() == [[1, 2, 3], [7, 9, 9]]
    assert batch["context_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["query_input_ids"].tolist() == [[4, 5, 6], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [8, -100, -100]]
    with pytest.raises(ArgumentError, match=r"records\[0\]: expected context, query and target, got context; .*unused"):
        ContextCollator()([{"context": [1]}])


def test_padding_is_told_by_a_mask_or_by_lengths() -> None:
    model, batch = make(), ContextCollator()(RECORDS[:3])
    lengths = batch["context_attention_mask"].sum(1)
    others = {name: t for name, t in batch.items() if name != "context_attention_mask"}
    expected = model(**batch)
    assert torch.equal(model(**others, context_lengths=lengths).loss, expected.loss)
    assert not torch.equal(model(**others).loss, expected.loss)
    assert torch.equal(model.gradmem(others["context_input_ids"], others["query_input_ids"], others["labels"],
                                     lengths).loss, expected.loss)
    with pytest.raises(ArgumentError, match="context_lengths: expected None with context_attention_mask"):
        model(**batch, context_lengths=lengths)
    with pytest.raises(ArgumentError, match=r"context_attention_mask: expected padding on the right.*padding_side"):
        model(**{**batch, "context_attention_mask": batch["context_attention_mask"].flip(1)})
    with pytest.raises(ArgumentError, match="use_reentrant: expected False, got True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmem import MissingExtraError

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "gradmem.hf")
    with pytest.raises(MissingExtraError, match=r"gradmem.hf needs transformers.*gradmem-kernels\[transformers\]"):
        __import__("gradmem.hf")


