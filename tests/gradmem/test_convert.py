"""Checkpoints of the paper's code: memories and logits are those of its formulas, written here in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_cli import run
from torch import Tensor

from gradmem import CheckpointError
from gradmem.convert import convert_config, from_gradmem_gpt, read_gradmem_gpt
from gradmem_kernels import ArgumentError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_pretrained import CONTEXT, FAMILIES, LENGTHS, QUERY, VOCAB, D, build  # noqa: E402
from test_transformers import Double  # noqa: E402

LR, STEPS, MEM, CTRL = 0.7, 2, 3, 2


def checkpoint(family: str, *, proj: str = "none", ctrl: bool = False, head: bool = False,
               lora: bool = False) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """A state dict and a configuration as GradMemGPT has them, and the language model that they are of."""
    base = build(family)
    config: dict[str, Any] = {"n_mem_tokens": MEM, "K": STEPS, "lr": LR, "inner_clip_norm": 0.05, "model_type":
                              "grad_memgpt", "base_config": {**base.config.to_dict()}}
    model = base
    if lora:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        targets = ["c_attn", "attn.c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets))
        config |= {"use_write_lora": True, "write_lora_r": 2, "write_lora_alpha": 6}
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    state = {f"model.{name}": draw(*t.shape) if "lora_" in name else t.clone()
             for name, t in model.state_dict().items()}
    model.load_state_dict({name.removeprefix("model."): t for name, t in state.items()})
    state["mem"] = draw(MEM, D)
    if proj != "none":
        state |= {"mem_proj.weight": draw(D, D), "mem_proj.bias": draw(D)}
        config |= {"use_mem_proj": True, "mem_proj_mode": proj}
    if ctrl:
        state |= {name: draw(CTRL, D) for name in ("write_st", "write_end", "read_st", "read_end")}
        config["n_ctrl_tokens"] = CTRL
    if head:
        state["write_head.weight"] = draw(VOCAB, D)
        config["use_write_head"] = True
    return state, config, model


def expected(model: Any, state: dict[str, Tensor], *, lora: bool = False, proj: str = "none") -> tuple[Tensor, Tensor]:
    """The memory and READ's logits by the formulas of the paper, with the language model's own forward.

    Where WRITE changes the projection too, the memory is the projected one.
    """
    base = model.get_base_model() if lora else model
    embed = base.get_input_embeddings()

    def projected(memory: Tensor, *fast: Tensor) -> Tensor:
        if fast:
            return torch.einsum("bmi,boi->bmo", memory, fast[0]) + fast[1][:, None]
        return memory if proj == "none" else memory @ state["mem_proj.weight"].T + state["mem_proj.bias"]

    def rows(memory: tuple[Tensor, ...], phase: str, ids: Tensor) -> Tensor:
        parts = [projected(*memory), embed(ids)]
        if "read_st" in state:
            start, end = (state[f"{phase}_{side}"].expand(len(ids), -1, -1) for side in ("st", "end"))
            parts = [start, parts[0], end, parts[1]]
        return torch.cat(parts, 1)

    written = ("mem", "mem_proj.weight", "mem_proj.bias") if proj == "per_sample" else ("mem",)
    memory = tuple(state[name].expand(len(CONTEXT), *state[name].shape).clone().requires_grad_() for name in written)
    first = MEM + (2 * CTRL if "read_st" in state else 0) - 1
    valid = torch.arange(CONTEXT.shape[1]) < LENGTHS[:, None]
    with Double():
        for _ in range(STEPS):
            out = model(inputs_embeds=rows(memory, "write", CONTEXT), output_hidden_states=True)
            head = state.get("write_head.weight")
            logits = out.logits if head is None else out.hidden_states[-1] @ head.T
            loss = F.cross_entropy(logits[:, first:-1].transpose(1, 2), CONTEXT, reduction="none")
            grads = torch.autograd.grad(((loss * valid).sum(1) / LENGTHS).sum(), memory)
            memory = tuple((m - LR * clipped(g)).detach().requires_grad_() for m, g in zip(memory, grads, strict=True))
        if lora:
            model.disable_adapter_layers()
        logits = model(inputs_embeds=rows(memory, "read", QUERY)).logits[:, first:-1].detach()
        if lora:
            model.enable_adapter_layers()
    return (memory[0] if proj != "per_sample" else projected(*memory)).detach(), logits


def clipped(grad: Tensor) -> Tensor:
    norm = grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.ndim - 1))
    return torch.where(norm > 0.05, grad * 0.05 / (norm + 1e-6), grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("parts", [
    {}, {"proj": "proj", "ctrl": True, "head": True}, {"proj": "per_sample", "ctrl": True},
    {"lora": True, "proj": "proj"}], ids=["bare", "all", "per_sample", "lora"])
def test_memories_and_logits_are_those_of_the_formulas(family: str, parts: dict[str, Any]) -> None:
    state, config, model = checkpoint(family, **parts)
    memory, logits = expected(model, state, lora=parts.get("lora", False), proj=parts.get("proj", "none"))
    config_of_base = FAMILIES[family]()
    torch.manual_seed(9)  # other weights: all come from the state dict
    made = from_gradmem_gpt(state, config, transformers.AutoModelForCausalLM.from_config(config_of_base).double())
    made.eval()
    written = made.write(CONTEXT, context_lengths=LENGTHS)
    torch.testing.assert_close(written.tensor, memory, rtol=0, atol=1e-9)
    torch.testing.assert_close(made.read(written, QUERY), logits, rtol=0, atol=1e-9)
    assert not torch.allclose(memory, state["mem"], atol=1e-3)


@pytest.mark.parametrize(("fields", "message"), [
    ({"use_adam": True}, r"config\['use_adam'\]: expected False, got True; its Adam clamps and detaches"),
    ({"mem_proj_mode": "per_sample", "use_hopfield_memory": False}, "got 'per_sample'; READ there takes the project"),
    ({"mem_proj_mode": "proj_rw"}, "expected one of 'none', 'proj', 'per_sample', got 'proj_rw'"),
    ({"use_hopfield_memory": True}, "use_hopfield_memory"),
    ({"memory_update": "forward"}, "expected 'gradient', got 'forward'"),
    ({"n_hash_tokens": 4}, "got 'n_hash_tokens'; leave the field out if"),
])
def test_configurations_without_a_counterpart_are_refused(fields: dict[str, Any], message: str) -> None:
    state, config, _ = checkpoint("llama")
    with pytest.raises(ArgumentError, match=message):
        convert_config({**config, **fields}, state)


def test_configuration() -> None:
    state, config, _ = checkpoint("llama")
    made = convert_config({**config, "K": 4, "last_K_second_order": 1, "add_inner_loss_to_outer": True,
                           "inner_clip_value": 0.5}, state)
    assert (made.memory_tokens, made.steps, made.inner_lr, made.second_order_steps) == (MEM, 4, LR, 1)
    assert (made.inner_loss_weight, made.inner_clip_value, made.inner_clip_norm) == (1.0, 0.5, 0.05)
    first = convert_config({"grad_mode": "first", "last_K_second_order": 0}, state)
    assert (first.order, first.second_order_steps, first.inner_lr, first.memory_tokens) == ("first", None, 0.01, 8)


def test_tensors_that_do_not_fit_are_refused_by_name_and_change_nothing() -> None:
    state, config, _ = checkpoint("llama")
    base = build("llama")
    before = {name: t.clone() for name, t in base.state_dict().items()}
    wrong = {**state, "model.model.norm.weight": torch.zeros(D)}
    for bad, message in (({**wrong, "read_mem_proj.weight": torch.zeros(D, D)}, "got 'read_mem_proj.weight'"),
                         ({**wrong, "mem": torch.zeros(3, 17)}, r"'mem'\]: expected shape \[3, 16\], got \[3, 17"),
                         ({n: t for n, t in wrong.items() if n != "mem"}, "'mem' among them, got none of this name"),
                         ({n: t for n, t in wrong.items() if "q_proj" not in n}, "q_proj.weight' among them")):
        with pytest.raises(ArgumentError, match=message):
            from_gradmem_gpt(bad, config, base)
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())


def test_command(tmp_path: Path) -> None:
    from gradmem.hf import GradMemForCausalLM

    state, config, base = checkpoint("gpt2", proj="proj")
    tied = {name: t.float() for name, t in state.items() if name != "model.lm_head.weight"}
    save_file(tied, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("convert", tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "out").gradmem.double()
    memory, _ = expected(base, state, proj="proj")
    found = loaded.eval().write(CONTEXT, context_lengths=LENGTHS)
    torch.testing.assert_close(found.tensor, memory, rtol=0, atol=1e-5)
    (tmp_path / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tied)}
    for part in set(parts.values()):
        save_file({name: t for name, t in tied.items() if parts[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    again, _, _ = read_gradmem_gpt(tmp_path)
    assert {name: t.tolist() for name, t in again.items()} == {name: t.tolist() for name, t in tied.items()}
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected pretrained_model, or base_config with its model_type"):
        read_gradmem_gpt(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected config\.json, and model\.safetensors"):
        read_gradmem_gpt(tmp_path / "none")
