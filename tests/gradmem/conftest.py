"""A tiny model in float64, and a tiny experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradmem import CausalLM, Experiment, GradMem, GradMemConfig, LMConfig

VOCAB = 20


@pytest.fixture
def make_model() -> Callable[..., GradMem]:
    def make(seed: int = 0, **options: Any) -> GradMem:
        torch.manual_seed(seed)
        lm = LMConfig(vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
                      intermediate_size=24, tie_embeddings=options.pop("tie_embeddings", False))
        options = {"memory_tokens": 3, "steps": 2, "inner_lr": 2.0, "memory_init_std": 0.5, **options}
        model = GradMem(CausalLM(lm, dtype=torch.float64), GradMemConfig(**options))
        with torch.no_grad():
            for weight in model.parameters():  # nothing at its special initial value
                weight.add_(torch.randn_like(weight), alpha=0.1)
        return model

    return make


@pytest.fixture
def options() -> dict[str, Any]:
    """Of an experiment that takes milliseconds a step."""
    return {"alphabet_size": 4, "key_length": 1, "value_length": 1, "pairs": 2, "hidden_size": 8, "num_layers": 1,
            "num_heads": 2, "intermediate_size": 8, "memory_tokens": 2, "steps": 1, "inner_lr": 1.0, "batch_size": 4,
            "max_steps": 6, "warmup_steps": 2, "log_every": 1, "eval_every": 4, "eval_samples": 8, "save_every": 100}


@pytest.fixture
def experiment(options: dict[str, Any]) -> Experiment:
    return Experiment.from_options(options)
