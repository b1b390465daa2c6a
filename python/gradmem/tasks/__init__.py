"""Tasks: what is written, what is asked, and whether the answer is right."""

from gradmem.tasks.babi import read_babi
from gradmem.tasks.batch import Batch, exact_match, token_accuracy
from gradmem.tasks.examples import Example
from gradmem.tasks.files import TASKS, DataConfig, FileTask, Row, read_rows
from gradmem.tasks.jsonl import read_jsonl
from gradmem.tasks.kv import KVConfig, KVTask, KVTokenizer
from gradmem.tasks.squad import read_squad
from gradmem.tasks.tokenizer import ByteTokenizer, CharTokenizer, PretrainedTokenizer, Tokenizer

__all__ = ["TASKS", "Batch", "ByteTokenizer", "CharTokenizer", "DataConfig", "Example", "FileTask", "KVConfig",
           "KVTask", "KVTokenizer", "PretrainedTokenizer", "Row", "Tokenizer", "exact_match", "read_babi", "read_jsonl",
           "read_rows", "read_squad", "token_accuracy"]
