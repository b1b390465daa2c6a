"""Tasks from files on the command line, with the built-in decoder and a model of transformers; hub names."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import flags, refused, run
from test_file_tasks import PARAGRAPH, SQUAD, STORY, write

from gradmem import Checkpoint, DataConfig, Experiment, HubError, Memory, MissingExtraError, TransformersLM, hub
from gradmem.metrics import read_metrics
from gradmem.tasks import ByteTokenizer, read_rows
from gradmem.training import CHECKPOINT, METRICS

SMALL = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
RUN = {"memory_tokens": 2, "steps": 1, "batch_size": 2, "max_steps": 2, "eval_every": 2, "log_every": 1}
FILES = {"babi": STORY, "squad": SQUAD, "jsonl": [{"context": "abc", "query": "?", "target": "b"}],
         "text": "A text that goes on for a while.\nAnd ends."}


def trained(task: str, path: Path, out: Path, **options: Any) -> Path:
    given = {"data": path, "eval_data": path, "out": out, **RUN, **options}
    result = run("train", task, "--no-plot", *flags(given))
    assert result.exit_code == 0, result.output
    assert "pairs" not in result.output
    return out / CHECKPOINT


@pytest.mark.parametrize(("task", "query", "extra"), [
    ("babi", "Where is Ada?", {"babi_facts": "all"}), ("squad", "Who?", {"squad_order": "question-context"}),
    ("jsonl", "?", {}), ("text", "", {"chunk_tokens": 12})])
def test_train_eval_write_and_read(task: str, query: str, extra: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "data", FILES[task])
    checkpoint = trained(task, path, tmp_path / "run", **SMALL, **extra)
    experiment = Checkpoint.load(checkpoint).experiment
    assert experiment.data == DataConfig(task=task, data=str(path), eval_data=str(path), **extra)
    assert experiment.model.vocab_size == ByteTokenizer.vocab_size
    last = read_metrics(tmp_path / "run" / METRICS)[-1]
    assert 0 <= last["held_out_exact_match"] <= last["held_out_token_accuracy"] <= 1

    result = run("eval", checkpoint, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "token accuracy" in result.output
    rows = [line.split("\u2502") for line in result.output.splitlines() if "\u2502" in line]
    assert int(rows[-1][5]) == len(read_rows(str(path), ByteTokenizer(), experiment.data))
    assert run("eval", checkpoint, "--data", path, "--steps", 1).output == result.output
    if task == "text":
        assert "--text: expected a task of files whose answers are texts" in refused("eval", checkpoint, "--text")
    else:
        scored = run("eval", checkpoint, "--steps", 1, "--text")
        assert scored.exit_code == 0, scored.output
        rows = [line.split("\u2502") for line in scored.output.splitlines() if "\u2502" in line]
        assert len(rows[-1]) == 10
        assert all(0 <= float(score) <= 1 for score in rows[-1][6:9])

    memory = tmp_path / "m"
    assert run("write", checkpoint, "--context", write(tmp_path / "context", "Ada went."), "-o", memory).exit_code == 0
    assert len(Memory.load(memory)) == 1
    read = ["read", checkpoint, memory, "--query", query]
    if task != "text":
        assert "--max-new-tokens: expected the length of the longest answer" in refused(*read)
        read += ["--max-new-tokens", 3]
    result = run(*read)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{query}\t")

    path.write_text(path.read_text().replace("A", "E").replace("abc", "abd"))
    assert "the data files have changed" in refused("train", task, "--no-plot", "--resume", "--out", tmp_path / "run")
    other = "jsonl" if task != "jsonl" else "text"
    assert f"task: checkpoint '{task}', now '{other}'" in refused("train", other, "--resume", "--out", tmp_path / "run")


def test_each_task_has_its_own_options(tmp_path: Path) -> None:
    for command in (("squad", "--babi-facts", "all"), ("jsonl", "--pairs", 2), ("babi", "--queries", 2),
                    ("kv", "--tokenizer", "bytes")):
        result = run("train", *command)
        assert result.exit_code == 2
        assert "No such option" in result.stderr, command
    assert "data: expected a file to train on where task is 'babi'" in refused("train", "babi", "--out", tmp_path / "x")
    story = write(tmp_path / "story", "1 Ada went\nup.")
    message = refused("train", "babi", "--out", tmp_path / "x", "--data", story, "--eval-data", story)
    assert f"{story}:2: expected a number, a space and a sentence" in message
    assert not (tmp_path / "x").exists()


def test_answers_lose_the_space_before_them_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    for task, shown in (("babi", "attic"), ("jsonl", " attic")):
        checkpoint = trained(task, write(tmp_path / task, FILES[task]), tmp_path / f"{task}-run", **SMALL)
        memory = tmp_path / f"{task}-m"
        run("write", checkpoint, "--context", write(tmp_path / "context", "Ada went."), "-o", memory)
        ids = [*tokenizer.encode(" attic"), tokenizer.end_id, *tokenizer.encode("x")]
        monkeypatch.setattr("gradmem.GradMem.generate", lambda *_, ids=ids, **options: torch.tensor([[ids]]))
        result = run("read", checkpoint, memory, "--query", "Where is Ada?", "--max-new-tokens", 8)
        assert result.output == f"Where is Ada?\t{shown}\n"


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A tiny model and a tokenizer of words, saved as one that was downloaded."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["</s>", "?", *sorted({word for word in STORY.replace("?", "").replace(".", "").split() if word.isalpha()})]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="?").save_pretrained(
        tmp_path / "base")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(words) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_model_of_transformers_with_its_tokenizer(pretrained: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "qa", STORY)
    checkpoint = trained("babi", path, tmp_path / "run", backbone=pretrained)
    loaded = Checkpoint.load(checkpoint)
    model, tokenizer = loaded.model(), loaded.experiment.make_tokenizer()
    assert isinstance(model.backbone, TransformersLM)
    assert model.backbone.name_or_path == str(pretrained)
    assert tokenizer.encode_target(" attic") == ([tokenizer.encode("attic")[0], tokenizer.end_id], 2)
    assert tokenizer.answer([tokenizer.encode("attic")[0], tokenizer.end_id, 3]) == "attic"
    start = TransformersLM(hub.load_model(str(pretrained)))
    assert not torch.equal(model.backbone.embed_tokens.weight, start.embed_tokens.weight)  # trained, and restored
    run("write", checkpoint, "--context", write(tmp_path / "context", "Ada went to the attic."), "-o", tmp_path / "m")
    result = run("read", checkpoint, tmp_path / "m", "--query", "Where is Ada?", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    Memory.load(tmp_path / "m", model).export_peft(tmp_path / "adapter")
    adapter = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(pretrained)
    result = run("train", "babi", "--no-plot", *flags({"data": path, "eval_data": path, "out": tmp_path / "other",
                                                       "backbone": pretrained, "tokenizer": "bytes"}))
    assert result.exit_code == 2
    message = result.stderr.splitlines()[-1]  # after the progress bars of loading
    assert "tokenizer: expected one of at most the backbone's" in message
    assert message.endswith("got '258 tokens'")


@pytest.mark.parametrize("server", ["peft", "vllm", "sglang"])
def test_example_scripts(server: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:
    """The one for peft runs; those for servers run up to what they pass to a stand-in."""
    passed: list[Any] = []

    def generate(*args: Any, **options: Any) -> Any:
        passed.append(args[0]["prompt_embeds"] if args else torch.tensor(options["input_embeds"]))
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[3, 0])])
        return [output] if args else {"text": "attic"}

    engine = SimpleNamespace(generate=generate, shutdown=lambda: None)
    if server == "peft":
        pytest.importorskip("peft", reason="peft is not installed")
    else:
        monkeypatch.setitem(sys.modules, server, SimpleNamespace(
            LLM=lambda **_: engine, Engine=lambda **_: engine, SamplingParams=lambda **_: None))
    checkpoint = trained("babi", write(tmp_path / "qa", STORY), tmp_path / "run", backbone=pretrained)
    context = write(tmp_path / "context", "Ada went to the attic.\n")
    scripts = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(scripts)
    monkeypatch.setattr(sys, "argv", ["", str(checkpoint), "--context", str(context), "--query", "Where is Ada?",
                                      "--served", str(tmp_path / "served"), "--max-new-tokens", "3"])
    capsys.readouterr()
    runpy.run_path(str(scripts / f"read_with_{server}.py"), run_name="__main__")
    said = capsys.readouterr().out

    model, tokenizer = Checkpoint.load(checkpoint).model(), Checkpoint.load(checkpoint).experiment.make_tokenizer()
    memory = model.write(torch.tensor([tokenizer.encode("Ada went to the attic.")]))
    query = torch.tensor([tokenizer.encode("Where is Ada?")])
    if server == "peft":
        answer = model.generate(memory, query, max_new_tokens=3, eos_token_id=tokenizer.end_id)[0].tolist()
        assert said == f"{tokenizer.answer(answer)}\n"
    else:
        torch.testing.assert_close(passed[0], memory.prompt_embeds(query)[0])
        served = hub.load_model(str(tmp_path / "served"))
        assert torch.equal(served.get_input_embeddings().weight, model.backbone.embed_tokens.weight)


def test_old_checkpoints_have_no_backbone() -> None:
    experiment = Experiment.from_options({"pairs": 2})
    values = experiment.to_dict()
    del values["backbone"]
    values["data"] = {"data": None, "eval_data": None}
    assert Experiment.from_dict(values) == experiment


def test_kv_has_tokens_of_its_own() -> None:
    from gradmem_kernels import ArgumentError

    with pytest.raises(ArgumentError, match="BackboneConfig: tokenizer: expected None where the task is kv"):
        Experiment.from_options({"tokenizer": "bytes"})


RECORD = {"context": PARAGRAPH, "question": "Who?", "answers": {"text": ["Ada"], "answer_start": [46]}}


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A library of data sets, and how it was called."""
    calls: list[tuple[Any, ...]] = []
    records = {"squad": [RECORD, {**RECORD, "answers": {"text": [], "answer_start": []}}],
               "text": [{"text": "ab"}, {"text": ""}, {"text": "cde"}],
               "lines": [{"context": "a", "query": "b", "target": "c"}, {"context": "a", "query": "b"}], "none": []}

    def load_dataset(*names: str, split: str) -> list[dict[str, Any]]:
        calls.append((*names, split))
        if names[0] == "far/away":
            raise ConnectionError("Couldn't reach 'far/away' on the Hub\nmore")
        return records[names[0]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def read(name: str, task: str, **options: Any) -> Any:
    return read_rows(name, ByteTokenizer(), DataConfig(task=task, data="-", eval_data="-", **options))


def test_data_sets_of_the_hub(data_sets: list[tuple[Any, ...]]) -> None:
    tokenizer = ByteTokenizer()
    answered, unanswered = read("hub:squad:train", "squad")
    assert tokenizer.decode(answered.context) == PARAGRAPH
    assert (tokenizer.decode(answered.target), tokenizer.decode(unanswered.target)) == (" Ada", "")
    chunks = read("hub:text:raw:test", "text", chunk_tokens=2)
    assert [tokenizer.decode(row.context) for row in chunks] == ["ab", "cd", "e"]
    assert data_sets == [("squad", "train"), ("text", "raw", "test")]
    from gradmem import DataError

    for name, task, message in (
            ("hub:lines:train", "jsonl", "hub:lines:train: record 1: target: expected a string, got None"),
            ("hub:text:train", "squad", "hub:text:train: record 0: context: expected a string"),
            ("hub:none:train", "jsonl", "hub:none:train: expected at least one record"),
            ("hub:none:train", "text", "hub:none:train: expected text, got none"),
            ("hub:squad:train", "babi", "expected a file in bAbI's text format")):
        with pytest.raises(DataError, match=message):
            read(name, task)


def test_what_the_hub_does_not_have_is_refused(data_sets: list[tuple[Any, ...]], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    message = "data set hub:far/away:train: cannot be loaded: Couldn't reach 'far/away' on the Hub; without a"
    with pytest.raises(HubError, match=f"^{message} connection, give the path of a copy on this machine$"):
        read("hub:far/away:train", "jsonl")
    for name in ("hub:", "hub:squad", "hub:squad:", "hub::train", "hub:a:b:c:d"):
        with pytest.raises(HubError, match=f"^{name}: expected hub:NAME:SPLIT or hub:NAME:CONFIGURATION:SPLIT"):
            read(name, "jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(MissingExtraError, match=r"needs datasets, which cannot be .*gradmem-kernels\[datasets\]"):
        read("hub:squad:train", "squad")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (hub.load_model, hub.load_tokenizer):
        with pytest.raises(MissingExtraError, match=r"some/name needs transformers, .*kernels\[transformers\]"):
            load("some/name")


def test_a_model_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = write(tmp_path / "qa", STORY)
    for name in ("no/such-model", str(tmp_path)):
        message = refused("train", "babi", "--no-plot", *flags({"data": path, "eval_data": path, "backbone": name,
                                                                "out": tmp_path / "run"}))
        assert f"tokenizer {name}: cannot be loaded: " in message
        assert message.endswith("without a connection, give the path of a copy on this machine")
    with pytest.raises(HubError, match="model no/such-model: cannot be loaded"):
        hub.load_model("no/such-model")


def test_a_real_data_set_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "train.jsonl", [RECORD])
    (row,) = read(f"hub:{tmp_path}:train", "squad")
    assert ByteTokenizer().decode(row.target) == " Ada"
    with pytest.raises(HubError, match="cannot be loaded: Unknown split"):
        read(f"hub:{tmp_path}:nothing", "squad")
