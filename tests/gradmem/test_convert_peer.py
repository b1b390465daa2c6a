"""Checkpoints of the paper's code against that code: loss, logits, memory, all gradients and greedy continuations.

Run with GRADMEM_PEER=PATH, where PATH is a checkout of github.com/yurakuratov/gradmem (seen with its main branch,
9aa98cb).
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmem import GradMem, OwnForwardLM
from gradmem.convert import NAMES, _place, from_gradmem_gpt

PATH = os.environ.get("GRADMEM_PEER")
if not PATH:
    pytest.skip("needs a checkout of the paper's code: GRADMEM_PEER=PATH", allow_module_level=True)
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_pretrained import CONTEXT, FAMILIES, LABELS, LENGTHS, QUERY, assert_same  # noqa: E402
from test_transformers import Double  # noqa: E402

LORA = {"use_write_lora": True, "write_lora_r": 2, "write_lora_alpha": 6}
PROJ, PER_SAMPLE = ({"use_mem_proj": True, "mem_proj_mode": mode} for mode in ("proj", "per_sample"))
OPTIONS: list[dict[str, Any]] = [
    {}, {"n_ctrl_tokens": 2}, PROJ, PER_SAMPLE, {"use_write_head": True}, {"K": 1}, {"freeze_backbone": True, **PROJ},
    {"inner_clip_value": 0.02, "inner_clip_norm": 0.05}, {"grad_mode": "first"}, {"grad_mode": "none"},
    {**PER_SAMPLE, "n_ctrl_tokens": 1, "inner_clip_norm": 0.05, "grad_mode": "first"},
    {**PER_SAMPLE, "grad_mode": "none", "add_inner_loss_to_outer": True}, {"add_inner_loss_to_outer": True},
    {**PROJ, "use_write_head": True, "n_ctrl_tokens": 1, "inner_clip_value": 0.02},
    {"grad_mode": "first", "add_inner_loss_to_outer": True, "inner_loss_weight": 0.3},
    {"K": 4, "last_K_second_order": 2}, {"K": 3, "last_K_second_order": 0}, {"use_gradient_checkpointing": True},
    LORA, {**LORA, "freeze_backbone": True, **PROJ}, {**LORA, "use_write_head": True}, {**LORA, "grad_mode": "first"},
]


def peer(family: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A GradMemGPT of random weights in float64, and its config.json."""
    sys.modules.setdefault("attn_double_bwd", types.ModuleType("attn_double_bwd"))  # attention that needs a GPU
    if PATH not in sys.path:
        sys.path.append(str(PATH))
    from grad_memgpt import GradMemGPT, GradMemGPTConfig  # type: ignore[import-not-found]

    torch.manual_seed(0)
    config = GradMemGPTConfig(base_config=FAMILIES[family](pad_token_id=0), n_mem_tokens=3,
                              **{"K": 2, "lr": 0.7, **options})
    model = GradMemGPT(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3).add_(float(p.ndim == 1 and "norm" in name))
    return model, json.loads(config.to_json_string())


def parameters(made: GradMem) -> dict[str, Tensor]:
    """Those of a converted model, by the names that load_gradmem_gpt gives to the peer's."""
    ours = dict(made.named_parameters())
    pretrained = made.backbone.pretrained.state_dict(keep_vars=True)  # type: ignore[attr-defined]
    return {**{f"model.{name}": p for name, p in pretrained.items()},
            **{theirs: ours[name] for theirs, name in NAMES.items() if name in ours}}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("forward", ["fused", "own"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_converted_checkpoint_is_what_it_was(family: str, forward: str, options: dict[str, Any]) -> None:
    if options.get("use_write_lora"):
        pytest.importorskip("peft")
    model, config = peer(family, options)
    torch.manual_seed(9)  # other weights: all come from the state dict
    base = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](pad_token_id=0)).double()
    made = from_gradmem_gpt(model.state_dict(), config, base, forward=forward).eval()
    if isinstance(made.backbone, OwnForwardLM):
        logits = made.backbone.logits

        def double(*args: Any) -> Tensor:
            with Double():
                return logits(*args)

        made.backbone.logits = double  # type: ignore[method-assign]
    context = (CONTEXT % 22 + 1).masked_fill(torch.arange(CONTEXT.shape[1]) >= LENGTHS[:, None], 0)
    with Double():
        theirs = model({"context_input_ids": context, "query_input_ids": QUERY}, labels=LABELS, return_mem=True)
        theirs["loss"].backward()
    ours = made(context, QUERY, LABELS, LENGTHS)
    assert ours.loss is not None
    ours.loss.backward()

    memory = theirs["mem"] if "W" not in theirs else model._apply_linear(theirs["mem"], theirs["W"], theirs["b"])
    assert_same(ours.loss, theirs["loss"], "loss")
    assert_same(ours.logits, theirs["predictions"][:, :-1], "logits")
    assert_same(ours.memory, memory, "memory")
    places = parameters(made)
    for name, p in model.named_parameters():
        mine = places[_place(name)]
        assert mine.requires_grad == p.requires_grad, name
        found, expected = (torch.zeros_like(p) if t.grad is None else t.grad for t in (mine, p))
        assert_same(found, expected, name)

    tokens = made.generate(made.write(context, context_lengths=LENGTHS), QUERY, max_new_tokens=3)
    query = QUERY
    for _ in range(3):
        with Double():
            logits = model({"context_input_ids": context, "query_input_ids": query})["predictions"]
        query = torch.cat([query, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, query[:, QUERY.shape[1]:])
