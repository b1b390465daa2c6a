"""Tasks: what is written, what is asked, and whether the answer is right."""

from gradmem.tasks.batch import Batch, exact_match
from gradmem.tasks.jsonl import Example, JsonlTask, read_jsonl
from gradmem.tasks.kv import KVConfig, KVTask
from gradmem.tasks.tokenizer import CharTokenizer

__all__ = ["Batch", "CharTokenizer", "Example", "JsonlTask", "KVConfig", "KVTask", "exact_match", "read_jsonl"]
