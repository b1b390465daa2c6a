"""What the examples share: a text written into a memory by a checkpoint whose backbone is a model of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gradmem import Checkpoint, Memory, TransformersLM
from gradmem.hub import load_tokenizer
from gradmem.tasks import Tokenizer


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="made by gradmem train ... --backbone NAME")
    parser.add_argument("--context", type=Path, required=True, help="text file to write into the memory")
    parser.add_argument("--query", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--served", type=Path, default=Path("runs/served"),
                        help="directory where the trained backbone and its tokenizer are saved to be served")
    return parser.parse_args()


@torch.inference_mode()
def write(args: argparse.Namespace) -> tuple[Memory, Tokenizer]:
    """The memory of ``args.context``; saves the backbone, as it was trained, and its tokenizer to ``args.served``."""
    loaded = Checkpoint.load(args.checkpoint)
    model, tokenizer = loaded.model(), loaded.experiment.make_tokenizer()
    names = loaded.experiment.backbone
    if not isinstance(model.backbone, TransformersLM) or names.backbone is None:
        raise SystemExit(f"{args.checkpoint}: expected a checkpoint with a backbone of transformers")
    model.backbone.save_pretrained(args.served)
    load_tokenizer(names.tokenizer or names.backbone).save_pretrained(args.served)
    ids = tokenizer.encode(args.context.read_text(encoding="utf-8").removesuffix("\n"))
    return model.write(torch.tensor([ids])), tokenizer


def query_ids(args: argparse.Namespace, tokenizer: Tokenizer) -> torch.Tensor:
    """``[1, T]`` int64."""
    return torch.tensor([tokenizer.encode(args.query)], dtype=torch.int64)
