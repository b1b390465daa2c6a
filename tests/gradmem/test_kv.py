"""The key-value task and its tokenizer."""

from __future__ import annotations

import re

import pytest
import torch

from gradmem.tasks import CharTokenizer, KVConfig, KVTask, exact_match
from gradmem_kernels import ArgumentError


def parse(task: KVTask, batch, row: int) -> tuple[str, dict[str, str]]:
    context = task.tokenizer.decode(batch.context_ids[row].tolist())
    return context, dict(re.findall(r"!(\w+):(\w+)!", context))


@pytest.mark.parametrize("config", [
    KVConfig(),
    KVConfig(pairs=60),  # random keys that often collide
    KVConfig(alphabet_size=2, key_length=3, value_length=1, pairs=8),  # every key there is
    KVConfig(alphabet_size=62, key_length=4, value_length=4, pairs=8, filler=20, segments=4),
    KVConfig(alphabet_size=10, key_length=1, value_length=3, pairs=3, segments=3),
])
def test_batches_have_the_format_of_the_paper(config: KVConfig) -> None:
    task = KVTask(config, seed=1)
    batch = task.batch(0, 6, queries=2)
    assert batch.context_ids.shape[1] == task.longest_context
    key, value = rf"\w{{{config.key_length}}}", rf"\w{{{config.value_length}}}"
    assert batch.context_lengths.tolist() == [batch.context_ids.shape[1]] * 6
    for row in range(6):
        context, pairs = parse(task, batch, row)
        assert re.fullmatch(rf"(?:(?:!{key}:{value}!|\w)*\|)+", context)
        assert len(pairs) == config.pairs  # unique keys
        assert context.count("|") == config.segments
        outside = re.sub(rf"!{key}:{value}!|\|", "", context)
        assert len(outside) == config.filler
        assert set(context) <= set("!:|") | set(task.alphabet)
        asked = set()
        for query in range(2):
            text = task.tokenizer.decode(batch.query_ids[row, query].tolist())
            match = re.fullmatch(rf"\?!({key}):({value})!\|", text)
            assert pairs[match[1]] == match[2]
            asked.add(match[1])
            labels = batch.labels[row, query]
            target = labels != -100
            assert target.tolist() == [False] * (3 + config.key_length) + [True] * (config.value_length + 2)
            assert torch.equal(labels[target], batch.query_ids[row, query][target])
            counted = batch.query_ids[row, query][batch.value_mask[row, query]]
            assert task.tokenizer.decode(counted.tolist()) == match[2]
        assert len(asked) == 2


def test_filler_and_pairs_are_mixed() -> None:
    task = KVTask(KVConfig(pairs=3, filler=12))
    batch = task.batch(0, 20)
    shapes = {re.sub(r"!\w+:\w+!", "P", parse(task, batch, row)[0]).replace("|", "").find("P") for row in range(20)}
    assert len(shapes) > 3


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    task = KVTask(KVConfig(filler=5, segments=2), seed=3)
    first, again = task.batch(7, 4), KVTask(task.config, seed=3).batch(7, 4)
    assert torch.equal(first.context_ids, again.context_ids)
    assert torch.equal(first.query_ids, again.query_ids)
    assert not torch.equal(first.context_ids, task.batch(8, 4).context_ids)
    assert not torch.equal(first.context_ids, KVTask(task.config, seed=4).batch(7, 4).context_ids)
    (held_out,) = task.held_out(4, 4)
    assert not torch.equal(held_out.context_ids, task.batch(0, 4).context_ids)


def test_held_out_samples_and_levels() -> None:
    task = KVTask(KVConfig(alphabet_size=8, key_length=1, value_length=1, pairs=3, segments=2))
    batches = list(task.held_out(10, 4))
    assert [len(batch.context_ids) for batch in batches] == [4, 4, 2]
    (whole,) = task.held_out(10, 10)
    assert torch.equal(torch.cat([batch.query_ids for batch in batches]), whole.query_ids)
    assert parse(task, whole, 5)[0] == task.text(5)[0]
    small = task.batch(0, 2, queries=3, level=1)
    assert small.query_ids.shape[:2] == (2, 1)  # as many keys as there are
    assert parse(task, small, 0)[0].count("|") == 1
    with pytest.raises(ArgumentError, match="level: expected 1 to pairs=3, got 4"):
        task.batch(0, 2, level=4)
    context, pairs = task.text(5)
    assert dict(pairs) == dict(re.findall(r"!(\w):(\w)!", context))
    assert task.config.chance == 1 / 8


@pytest.mark.parametrize(("name", "values"), [
    ("alphabet_size", {"alphabet_size": 63}), ("pairs", {"pairs": 0}), ("filler", {"filler": -1}),
    ("pairs", {"alphabet_size": 3, "key_length": 1, "pairs": 4}), ("segments", {"pairs": 2, "segments": 3}),
])
def test_impossible_tasks_are_refused(name: str, values: dict) -> None:
    with pytest.raises(ArgumentError, match=rf"KVConfig: {name}: expected "):
        KVConfig(**values)


def test_exact_match_counts_value_characters_only() -> None:
    task = KVTask(KVConfig(alphabet_size=5, key_length=1, value_length=2, pairs=2))
    batch = task.batch(0, 3, queries=2)
    logits = torch.nn.functional.one_hot(batch.query_ids, task.tokenizer.vocab_size).float()
    logits[:, :, :4] = 0  # whatever stands at the query
    logits[:, :, 6:] = 0  # and at the end marks
    assert exact_match(logits, batch).all()
    logits[1, 0, 5] = -logits[1, 0, 5]  # one of the two characters
    assert exact_match(logits, batch).tolist() == [[True, True], [False, True], [True, True]]


def test_tokenizer() -> None:
    tokenizer = CharTokenizer("ab!")
    assert tokenizer.encode("!ba") == [3, 2, 1]
    assert tokenizer.decode([3, 0, 2, 1, 0]) == "!ba"
    assert tokenizer.vocab_size == 4
    with pytest.raises(ArgumentError, match="expected characters of 'ab!', got 'c' at position 1"):
        tokenizer.encode("ac")
    with pytest.raises(ArgumentError, match="expected different characters"):
        CharTokenizer("aa")
