"""Scores of generated text: SQuAD's normalisation, exact match and F1 by hand, and the way from a task to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gradmem import CausalLM, DataConfig, GradMem, GradMemConfig, LMConfig, TextScores, score_text
from gradmem.tasks import ByteTokenizer, FileTask, KVConfig, KVTask, Row, read_rows, read_squad
from gradmem.tasks.scores import normalised, squad_exact_match, squad_f1, text_exact_match
from gradmem_kernels import ArgumentError

BYTES = ByteTokenizer()
PARAGRAPH = "The mill stands by the river. It was built by Ada."
SQUAD = {"data": [{"paragraphs": [{"context": PARAGRAPH, "qas": [
    {"question": "Who?", "answers": [{"text": "Ada", "answer_start": 46}, {"text": "built by Ada", "answer_start": 37},
                                     {"text": "Ada", "answer_start": 46}]},
    {"question": "When?", "is_impossible": True, "answers": []}]}]}]}


@pytest.fixture
def model() -> GradMem:
    torch.manual_seed(0)
    lm = LMConfig(vocab_size=BYTES.vocab_size, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8)
    return GradMem(CausalLM(lm), GradMemConfig(memory_tokens=2, steps=1, inner_lr=2.0, memory_init_std=0.5))


def task(tmp_path: Path) -> FileTask:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(SQUAD))
    return FileTask(read_rows(str(path), BYTES, DataConfig(task="squad", data="-", eval_data="-")), BYTES)


@pytest.mark.parametrize(("text", "expected"), [
    ("The  Mill,\n by an old river. ", "mill by old river"), ("U.S.", "us"), ("a-the", "athe"), ("theatre", "theatre"),
    ("(the) a", ""), ("Caf\u00e9 \u2013 1\u00a0000", "caf\u00e9 \u2013 1 000"), ("", "")])
def test_normalisation(text: str, expected: str) -> None:
    """Punctuation goes before articles, so that 'a-the' is one word; articles go as whole words alone."""
    assert normalised(text) == expected


@pytest.mark.parametrize(("answer", "gold", "text", "exact", "f1"), [
    ("Ada", ("Ada",), 1, 1, 1.0),
    (" the Ada! ", ("Ada",), 0, 1, 1.0),
    ("built by", ("Ada", "built by Ada"), 0, 0, 0.8),       # precision 2/2, recall 2/3
    ("ada ada ben", ("ada ada ada cid",), 0, 0, 4 / 7),     # as often as they occur: 2 of 3, 2 of 4
    ("ben", ("Ada",), 0, 0, 0.0),
    ("", ("",), 1, 1, 1.0),                                 # no answer, and none was given
    ("Ada", ("",), 0, 0, 0.0),
    ("", ("Ada",), 0, 0, 0.0),
    ("the", ("Ada",), 0, 0, 0.0),
    ("", ("The", "Ada"), 0, 0, 0.0),                        # an answer without a word left is none of the right ones
    ("a", ("the",), 0, 1, 1.0),                             # unless all are such
])
def test_scores_by_hand(answer: str, gold: tuple[str, ...], text: int, exact: int, f1: float) -> None:
    assert text_exact_match(answer, gold) == text
    assert squad_exact_match(answer, gold) == exact
    assert squad_f1(answer, gold) == pytest.approx(f1, abs=1e-12)


def test_all_answers_are_kept_and_training_is_what_it_was(tmp_path: Path) -> None:
    found = task(tmp_path)
    examples = read_squad(tmp_path / "squad.json")
    assert [example.answers for example in examples] == [("Ada", "built by Ada", "Ada"), ("",)]
    assert [example.target for example in examples] == [" Ada", ""]
    (asked,) = found.questions(8, 4)
    assert asked.answers == [("Ada", "built by Ada", "Ada"), ("",)]
    assert BYTES.decode(asked.query_ids[0].tolist()) == "Who?"
    assert asked.query_lengths.tolist() == [4, 5]
    assert asked.context_lengths.tolist() == [len(PARAGRAPH)] * 2
    assert found.longest_answer == len("built by Ada") + 2
    bare = FileTask([row._replace(answers=()) for row in found._held_out], BYTES)
    assert bare.digest == found.digest  # checkpoints from before there were scores of text resume


def test_other_tasks_are_scored_by_their_target(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text(json.dumps({"context": "abc", "query": "?", "target": " b "}))
    (row,) = read_rows(str(path), BYTES, DataConfig(task="jsonl", data="-", eval_data="-"))
    assert row.answers == (" b ",)


def test_generated_answers_are_scored(model: GradMem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def generate(self: GradMem, memory: Any, query_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.update(options)
        texts = (" The Ada", "")
        rows = [[*BYTES.encode(text), BYTES.end_id, *BYTES.encode("xxxxxxxx")][:9] for text in texts]
        return torch.tensor(rows[: len(query_ids)])

    monkeypatch.setattr(GradMem, "generate", generate)
    found = task(tmp_path)
    assert score_text(model, found, 2) == TextScores(2, 0.5, 1.0, 1.0)
    assert (asked["max_new_tokens"], asked["eos_token_id"]) == (14, BYTES.end_id)
    assert score_text(model, found, 1, max_new_tokens=3) == TextScores(1, 0.0, 1.0, 1.0)
    assert asked["max_new_tokens"] == 3


def test_what_it_generates_itself_is_right(model: GradMem) -> None:
    """Rows whose answer is what the model generates are all right, in batches of different lengths too."""
    rows = []
    for context, query in (("Ada went up.", "Who?"), ("Ben", "")):
        memory = model.write(torch.tensor([BYTES.encode(context)]))
        ids = model.generate(memory, torch.tensor([BYTES.encode(query)], dtype=torch.int64).view(1, -1),
                             max_new_tokens=4, eos_token_id=BYTES.end_id)[0].tolist()
        rows.append(Row(BYTES.encode(context), BYTES.encode(query), ids, 4, (BYTES.answer(ids),)))
    found = FileTask(rows, BYTES)
    assert score_text(model, found, 2, max_new_tokens=4).exact_match == 1.0
    assert score_text(model, found, 2, max_new_tokens=4, batch_size=1).exact_match == 1.0
    wrong = FileTask([row._replace(answers=("no such text",)) for row in rows], BYTES)
    assert score_text(model, wrong, 2, max_new_tokens=4).exact_match == 0.0


def test_what_has_no_text_is_refused(model: GradMem) -> None:
    with pytest.raises(ArgumentError, match="score_text: task: expected a FileTask, got KVTask"):
        score_text(model, KVTask(KVConfig()), 2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="expected rows with answers, got at least one without; chunks of text"):
        score_text(model, FileTask([Row([5], [], [5, 1], 1)], BYTES), 2)
