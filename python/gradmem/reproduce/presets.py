"""The tables that can be reproduced."""

from __future__ import annotations

from gradmem.reproduce.cells import Preset

__all__ = ["PAPER", "PRESETS", "SMALL"]

_PAPER_PAIRS = (8, 16, 32, 64, 96)
_PAPER_MATCH = {1: (99.7, 96.3, 86.9, 58.6, 32.6), 5: (100.0, 100.0, 99.9, 99.1, 88.4)}
_BASELINES = (("gradient", 0), ("first", 2), ("none", 2), ("forward", 0), ("context", 0))

#: Kuratov et al., arXiv 2603.13875: the table of key-value retrieval.
PAPER = Preset(
    name="paper",
    options={
        "alphabet_size": 62, "key_length": 2, "value_length": 2,
        "hidden_size": 128, "num_layers": 4, "num_heads": 4, "intermediate_size": 512,
        "memory_tokens": 8, "batch_size": 64, "lr": 1e-4, "schedule": "constant", "warmup_steps": 10_000,
        "beta2": 0.999, "max_steps": 200_000, "ema": 0.998,
        "log_every": 100, "eval_every": 5000, "eval_samples": 1024, "save_every": 1000},
    gradient={"write_head": True, "inner_loss_weight": 0.5},
    inner_lr={1: 0.12, 2: 0.04, 5: 0.08},
    methods=(("gradient", 1), ("gradient", 2), ("gradient", 5), *_BASELINES),
    pairs=_PAPER_PAIRS, seeds=(0, 1, 2), grown=True, target=100.0, samples=8192,
    paper={("gradient", k, n): match for k, row in _PAPER_MATCH.items()
           for n, match in zip(_PAPER_PAIRS, row, strict=True)})

#: Without gradient steps a model has to find by itself that a query's key stands before the value. That takes some
#: thousands of steps, which are cheaper.
_LONGER = {"lr": 1e-3, "max_steps": 6000}

#: The same claims at a size that a CPU trains in minutes.
SMALL = Preset(
    name="small",
    options={
        "alphabet_size": 16, "key_length": 1, "value_length": 1,
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128,
        "memory_tokens": 8, "memory_init_std": 1.0, "batch_size": 32, "queries": 4,
        "lr": 3e-3, "schedule": "constant", "warmup_steps": 50, "max_steps": 1000, "ema": 0.95,
        "recompute": "none", "log_every": 10, "eval_every": 1_000_000, "save_every": 50},
    gradient={"write_head": True, "inner_loss_weight": 0.1, "learn_inner_lr": "step"},
    inner_lr={1: 50.0, 2: 50.0}, of_method={"forward": _LONGER, "context": _LONGER},
    methods=(("gradient", 1), ("gradient", 2), *_BASELINES),
    pairs=(2, 4), seeds=(0,), grown=True, target=99.0, samples=1024)

PRESETS = {preset.name: preset for preset in (PAPER, SMALL)}
