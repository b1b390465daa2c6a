"""Tasks from files: what their readers make of a file, the files they refuse, tokenizers, batches and metrics."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gradmem import DataConfig, DataError, GradMem, evaluate
from gradmem.tasks import (
    ByteTokenizer,
    CharTokenizer,
    Example,
    FileTask,
    KVTokenizer,
    PretrainedTokenizer,
    Row,
    exact_match,
    read_babi,
    read_jsonl,
    read_rows,
    read_squad,
    token_accuracy,
)
from gradmem_kernels import ArgumentError

STORY = """\
1 Ada went to the attic.
2 Ben took the lamp.
3 Where is Ada?\tattic\t1
4 Ben went to the cellar.
5 Where is the lamp? \tcellar\t2 4
1 Cid went to the yard.
2 What is Cid carrying?\tnothing\t
"""
PARAGRAPH = "The mill stands by the river. It was built by Ada."
SQUAD = {"version": "v2.0", "data": [{"title": "Mill", "paragraphs": [{"context": PARAGRAPH, "qas": [
    {"id": "a", "question": "Who built the mill?", "is_impossible": False,
     "answers": [{"text": "Ada", "answer_start": 46}, {"text": "built by Ada", "answer_start": 37}]},
    {"id": "b", "question": "When?", "is_impossible": True, "answers": []}]}]}]}
LINES = [{"context": "!a:12!|", "query": "?!a:", "target": "12!|", "id": 5},
         {"context": "!ab:3!!b:4!|", "query": "?!ab:", "target": "3!|"},
         {"context": "xyz", "query": "", "target": "z"}]
BYTES = ByteTokenizer()


def write(path: Path, content: Any) -> Path:
    if isinstance(content, list):
        content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def rows(path: Path, task: str, tokenizer: Any = BYTES, **options: Any) -> list[Row]:
    config = DataConfig(task=task, data="-", eval_data="-", **options)
    return read_rows(str(path), tokenizer, config)


def parts(examples: list[Example]) -> list[tuple[str, str, str]]:
    return [(e.context, e.query, e.target) for e in examples]


def test_babi(tmp_path: Path) -> None:
    path = write(tmp_path / "qa", STORY)
    attic, lamp, cellar = "Ada went to the attic.", "Ben took the lamp.", "Ben went to the cellar."
    assert parts(read_babi(path)) == [
        (f"{attic}\n{lamp}", "Where is Ada?", " attic"),
        (f"{attic}\n{lamp}\n{cellar}", "Where is the lamp?", " cellar"),
        ("Cid went to the yard.", "What is Cid carrying?", " nothing")]
    assert [example.source for example in read_babi(path)] == [f"{path}:{n}" for n in (3, 5, 7)]
    write(path, STORY.removesuffix("1 Cid went to the yard.\n2 What is Cid carrying?\tnothing\t\n"))
    assert [example.context for example in read_babi(path, "supporting")] == [attic, f"{lamp}\n{cellar}"]


@pytest.mark.parametrize(("story", "message"), [
    ("Ada went.", ":1: expected a number, a space and a sentence, as in "),
    ("1 Ada went.\n\n3 Where is Ada?\tattic\t1", ":3: expected line number 2, or 1 for a new story, got 3"),
    ("2 Ada went.", ":1: expected line number 1, or 1"),
    ("1 Ada went.\n2 Where is Ada?  attic  1\n3 Where is Ada?", ":3: expected a question followed by a tab"),
    ("1 Ada went.\n2 Where is Ada?\t\t1", ":2: expected a question, its answer and the numbers"),
    ("1 Ada went.\n2 Where is Ada?\tattic\t1\t1", ":2: expected a question, its answer and the numbers"),
    ("1 Where is Ada?\tattic\t1", ":1: expected a statement before the first question"),
    ("1 Ada went.\n2 Where?\tattic\t2", ":2: supporting facts: expected numbers of statements before the question"),
    ("1 Ada went.\n2 Where?\tattic\tone", ":2: supporting facts: expected numbers of statements"),
    ("1 Ada went.", "expected at least one question"),
    ("\n", "expected at least one line"),
])
def test_what_is_no_babi_is_refused(tmp_path: Path, story: str, message: str) -> None:
    path = write(tmp_path / "qa", story)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_babi(path)
    assert str(caught.value).startswith(str(path))
    write(path, "1 Ada went.\n2 Where?\tattic\t")
    with pytest.raises(DataError, match=":2: supporting facts: expected at least one, got none; use all"):
        read_babi(path, "supporting")


def test_squad(tmp_path: Path) -> None:
    path = write(tmp_path / "squad", SQUAD)
    who, when = "Who built the mill?", "When?"
    assert parts(read_squad(path)) == [(PARAGRAPH, who, " Ada"), (PARAGRAPH, when, "")]
    assert parts(read_squad(path, "question-context")) == [(f"{who}\n{PARAGRAPH}", "", " Ada"),
                                                           (f"{when}\n{PARAGRAPH}", "", "")]
    assert [row.counted for row in rows(path, "squad")] == [5, 1]  # the end counts; alone where there is no answer
    one = json.loads(json.dumps(SQUAD))
    one["data"][0]["paragraphs"][0]["qas"][0].pop("is_impossible")  # version 1.1 has none
    assert parts(read_squad(write(path, one)))[0] == (PARAGRAPH, who, " Ada")


def changed(*place: Any, to: Any) -> Any:
    document = json.loads(json.dumps(SQUAD))
    entry = document
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = to
    return document


QAS = ("data", 0, "paragraphs", 0, "qas")


@pytest.mark.parametrize(("document", "message"), [
    ('{"data": [\n{"title": }]}', ":2: not JSON"),
    ("[{}]", ": data: expected a list, got no object but list"),
    (changed("data", to={}), ": data: expected a list, got dict; the format is data[].paragraphs[].qas[]"),
    (changed("data", 0, "paragraphs", to=None), ": data[0]: paragraphs: expected a list, got NoneType"),
    (changed("data", 0, "paragraphs", 0, "context", to=3), "data[0].paragraphs[0]: context: expected a string, got 3"),
    (changed("data", 0, "paragraphs", 0, "context", to=" "), "context: expected a paragraph"),
    (changed(*QAS, 1, "question", to=None), ": data[0].paragraphs[0].qas[1]: question: expected a string, got None"),
    (changed(*QAS, 0, "answers", to=None), "qas[0]: answers: expected a list, got NoneType"),
    (changed(*QAS, 0, "answers", to=[]), "qas[0]: answers: expected at least one where is_impossible is false"),
    (changed(*QAS, 0, "answers", 0, "text", to=""), "qas[0].answers[0]: text: expected an answer"),
    (changed(*QAS, 0, "answers", 0, "answer_start", to=45), "expected the position of 'Ada' in the context, got 45, "
                                                            "where ' Ad' stands"),
    (changed(*QAS, 0, "answers", 0, "answer_start", to="46"), "answer_start: expected the position"),
    (changed(*QAS, 0, "answers", 0, "answer_start", to=-4), "answer_start: expected the position"),
    (changed(*QAS, 0, to="Who?"), "qas[0]: expected an object, got str"),
    (changed("data", to=[]), "expected at least one question, got none"),
])
def test_what_is_no_squad_is_refused(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "squad"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_squad(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("lines", "message"), [
    ([], "expected at least one line"),
    ([LINES[0], "{'context': 1}"], ":2: not JSON"),
    ([LINES[0], "[]"], ":2: expected an object, got list"),
    (["", {"context": "a", "query": "b"}], ":2: target: expected a string, got None"),
    ([{**LINES[0], "query": 3}], ":1: query: expected a string, got 3"),
    ([{**LINES[0], "context": ""}], ":1: expected a context and a target that are not empty"),
    ([{**LINES[0], "target": ""}], ":1: expected a context and a target that are not empty"),
])
def test_bad_lines_are_refused_with_their_number(tmp_path: Path, lines: list, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_jsonl(write(tmp_path / "data", lines))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    for task in ("babi", "squad", "jsonl", "text"):
        with pytest.raises(DataError, match="cannot be read: No such file"):
            rows(tmp_path / "nothing", task)
        (tmp_path / "data").write_bytes(b"1 a.\n2 b\xff\xfe\x00")
        with pytest.raises(DataError, match=r"data:2: cannot be read: expected UTF-8 text, got byte 0xff; convert"):
            rows(tmp_path / "data", task)
    for target, message in (("!|", "target: expected a value before '!|'"), ("1", "got '\u00e9' at position 0")):
        path = write(tmp_path / "data", ["", {**LINES[0], "context": "\u00e9" if target == "1" else "a",
                                              "target": target}])
        with pytest.raises(DataError, match=rf":2: .*{re.escape(message)}"):
            rows(path, "kv", KVTokenizer("a1"))


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    for task, content in (("babi", STORY), ("squad", json.dumps(SQUAD)), ("jsonl", json.dumps(LINES[0])),
                          ("text", "Ada went.")):
        path = write(tmp_path / "data", content)
        plain = rows(path, task)
        path.write_text("\ufeff" + content.replace("\n", "\r\n"), encoding="utf-8", newline="")
        assert rows(path, task) == plain, task


class Words:
    """A tokenizer of ``transformers``: a token for each word."""

    eos_token_id, pad_token_id = 0, None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join("x" * i for i in ids)


@pytest.mark.parametrize("tokenizer", [BYTES, PretrainedTokenizer(Words())])
def test_half_a_surrogate_pair_is_refused_with_its_place(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data", [LINES[0], {**LINES[1], "query": "ab\ud83d?"}])
    with pytest.raises(DataError, match=r"data:2: .*got half a surrogate pair, '.ud83d', at position 2"):
        rows(path, "jsonl", tokenizer)


def test_contexts_without_a_token_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data", [LINES[0], {**LINES[1], "context": " "}])
    with pytest.raises(DataError, match=r"data:2: context: expected at least one token, got none"):
        rows(path, "jsonl", PretrainedTokenizer(Words()))


def test_json_lines_in_the_characters_of_keys_and_values(tmp_path: Path) -> None:
    tokenizer = KVTokenizer("0123456789abcxyz")
    path = write(tmp_path / "data", [*LINES, ""])
    task, same = (FileTask(rows(path, "kv", tokenizer), tokenizer) for _ in range(2))
    (batch,) = task.held_out(100, 10)
    assert batch.context_lengths.tolist() == [7, 12, 3]
    assert tokenizer.decode(batch.context_ids[1].tolist()) == "!ab:3!!b:4!|"
    assert [tokenizer.decode(row[mask].tolist()) for row, mask in
            zip(batch.query_ids[:, 0], batch.value_mask[:, 0], strict=True)] == ["12", "3", "z"]
    assert [tokenizer.decode(row[row != -100].tolist()) for row in batch.labels[:, 0]] == ["12!|", "3!|", "z"]
    perfect = F.one_hot(batch.query_ids, tokenizer.vocab_size).float()
    assert token_accuracy(perfect, batch).tolist() == [[1.0]] * 3  # the end marks do not count
    assert len(task) == 3
    assert torch.equal(task.batch(2, 5).query_ids, same.batch(2, 5).query_ids)
    assert not torch.equal(task.batch(2, 5).query_ids, task.batch(3, 5).query_ids)
    with pytest.raises(ArgumentError, match="queries=2"):
        task.batch(0, 4, queries=2)
    assert task.longest_context == 12
    other_rows = rows(write(tmp_path / "other", LINES[:2]), "kv", tokenizer)
    other = FileTask(other_rows, tokenizer, rows(path, "kv", tokenizer))
    assert len(other) == 3
    assert other.digest != task.digest
    written_out = repr([[tuple(row[:4]) for row in part] for part in (other_rows, rows(path, "kv", tokenizer))])
    assert other.digest == hashlib.sha256(written_out.encode()).hexdigest()  # which checkpoints hold


def test_labels_stand_where_the_answer_is(tmp_path: Path) -> None:
    task = FileTask(rows(write(tmp_path / "qa", STORY), "babi"), BYTES)
    (batch,) = task.held_out(2, 2)
    for i, (query, answer) in enumerate((("Where is Ada?", " attic"), ("Where is the lamp?", " cellar"))):
        target = batch.labels[i, 0] != -100
        assert torch.equal(batch.labels[i, 0][target], batch.query_ids[i, 0][target])
        assert batch.labels[i, 0][target].tolist() == [*BYTES.encode(answer), BYTES.end_id]
        assert target.nonzero()[0].item() == len(query)
        assert torch.equal(batch.value_mask[i, 0], target)
        assert BYTES.decode(batch.context_ids[i, : batch.context_lengths[i]].tolist()).startswith("Ada went")
        assert set(batch.context_ids[i, batch.context_lengths[i] :].tolist()) <= {BYTES.pad_id}


def test_text_is_cut_into_chunks_that_are_their_own_answers(tmp_path: Path) -> None:
    text = "One caf\u00e9, two caf\u00e9s."
    found = rows(write(tmp_path / "text", text), "text", chunk_tokens=10)
    assert BYTES.decode([i for row in found for i in row.context]) == text
    assert [len(row.context) for row in found] == [10, 10, 2]
    for row in found:
        assert row == Row(row.context, [], [*row.context, BYTES.end_id], len(row.context))


def test_metrics_count_the_tokens_of_the_answer(tmp_path: Path) -> None:
    task = FileTask(rows(write(tmp_path / "qa", STORY), "babi"), BYTES)
    (batch,) = task.held_out(3, 3)
    logits = F.one_hot(batch.query_ids, BYTES.vocab_size).float()
    assert exact_match(logits, batch).all()
    assert token_accuracy(logits, batch).tolist() == [[1.0]] * 3
    end = int(batch.value_mask[0, 0].nonzero()[-1])
    logits[0, 0, end] = -logits[0, 0, end]  # goes on after the right word
    logits[1, 0, 0] = -logits[1, 0, 0]  # within the question
    assert exact_match(logits, batch).tolist() == [[False], [True], [True]]
    assert token_accuracy(logits, batch).flatten().tolist() == pytest.approx([6 / 7, 1.0, 1.0])


def test_evaluation_equals_greedy_answers(make_model: Any, tmp_path: Path) -> None:
    """Exact match with the answer given as input is exact match of what is generated, end included."""
    model: GradMem = make_model()
    tokenizer = KVTokenizer("0123")
    row = rows(write(tmp_path / "data", [{"context": "01", "query": "?", "target": "1"}]), "kv", tokenizer)[0]
    ids = torch.tensor([row.query])
    memory = model.write(torch.tensor([row.context]))
    answer = model.generate(memory, ids, max_new_tokens=3)[0].tolist()
    for target, match, tokens in ((answer, 1.0, 1.0), ([*answer[:2], (answer[2] + 1) % 20], 0.0, 2 / 3)):
        found = evaluate(model, FileTask([Row(row.context, row.query, target, 3)], tokenizer), 1)
        assert (found.exact_match, found.token_accuracy) == (match, pytest.approx(tokens))


def test_bytes() -> None:
    for text in ("", "a\x00b\n", "caf\u00e9 \U0001f600"):
        assert BYTES.decode(BYTES.encode(text)) == text
    assert max(BYTES.encode("\U0010ffff")) < BYTES.vocab_size
    assert BYTES.encode_target("ab") == ([99, 100, 1], 3)
    assert BYTES.answer([99, 1, 100]) == "a"
    assert BYTES.answer([99, 100]) == "ab"
    assert BYTES.decode([0, 1, 2 + 0xC3]) == "\ufffd"
    assert BYTES.decode([99, 258, 100, 5000]) == "a\ufffdb\ufffd"
    assert KVTokenizer("ab").answer(KVTokenizer("ab").encode("ab!|a")) == "ab"
    assert not hasattr(CharTokenizer("ab"), "end_id")


def test_a_tokenizer_without_an_end_is_refused() -> None:
    class Endless:
        eos_token_id, name_or_path = None, "some/tokenizer"

    with pytest.raises(ArgumentError, match="end-of-sequence token, got some/tokenizer, whose eos_token is None; set"):
        PretrainedTokenizer(Endless())


@pytest.mark.parametrize(("values", "message"), [
    ({"task": "babi"}, "data: expected a file to train on where task is 'babi'"),
    ({"data": "x"}, "eval_data: expected a file where data is one"),
    ({"task": "squad", "data": "x", "eval_data": "x", "babi_facts": "supporting"},
     "babi_facts: expected 'all', or the task babi, which alone has this option"),
    ({"chunk_tokens": 5}, "chunk_tokens: expected 64, or the task text"),
    ({"task": "chess"}, "task: expected one of kv, babi"),
    ({"task": "squad", "squad_order": "none"}, "squad_order: expected one of context-question"),
])
def test_impossible_configurations_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"DataConfig: {message}"):
        DataConfig(**values)
