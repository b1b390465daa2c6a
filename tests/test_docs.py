"""Whatever the documentation names exists: paths, make targets, commands with their options, modules, names."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from benchmarks.__main__ import COMMANDS, SUITES, parser
from gradmem.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "csrc").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"),
                *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(p for top in ("gradmem_kernels", "python", "benchmarks", "examples", "tests")
                 for p in (ROOT / top).rglob("*.py"))
PACKAGES = ("gradmem", "gradmem_kernels", "benchmarks")
#: Folders whose files are named from the root.
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "gradmem_kernels", "python", "tests", ".ci")

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4,}\S.*\n?)+", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
DOTTED = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.(?!md\b|py\b)\w+)+")


class Page(NamedTuple):
    """The code on a page: python blocks, the lines of other blocks, and inline spans."""

    python: list[str]
    lines: list[str]
    spans: list[str]

    @classmethod
    def read(cls, path: Path) -> "Page":
        text = path.read_text()
        python = [body for _, language, body in FENCE.findall(text) if language == "python"]
        blocks = [body for _, language, body in FENCE.findall(text) if language != "python"]
        text = FENCE.sub("", text)
        blocks += INDENTED.findall(text)
        lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        return cls(python, lines, INLINE.findall(text))

    def commands(self, program: str) -> list[list[str]]:
        """The arguments of each call of ``program``, from lines and spans, comments and shell prefixes stripped."""
        found = []
        for line in [*self.lines, *self.spans]:
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # prose or output, not a shell line
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0].removeprefix(".venv/bin/") == program:
                found.append(words[1:])
        return found


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def path(request):
    return request.param


@pytest.fixture
def page(path):
    return Page.read(path)


def test_paths_exist(path, page):
    words = {word.rstrip(":,;") for text in [*page.lines, *page.spans] for word in text.split()}
    named = {word for word in words if re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*", word)
             or re.fullmatch(r"\w+\.(md|toml|cfg)|constraints\.txt|Makefile|LICENSE", word)}
    links = {link.partition("#")[0] for link in LINK.findall(path.read_text()) if "://" not in link}
    missing = {word for word in named if not list(ROOT.glob(word))}
    missing |= {link for link in links if link and not (path.parent / link).exists()}
    assert not missing


def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for words in page.commands("make"):
        for word in words:
            name, is_variable, _ = word.partition("=")
            pattern = rf"^{name} \??=" if is_variable else rf"^(?:[\w/-]+ )*{name}(?: [\w/-]+)*:"
            assert re.search(pattern, makefile, re.MULTILINE), f"make {word}"


def test_gradmem_commands_exist(page):
    for words in page.commands("gradmem"):
        _check_command(words)


def test_modules_and_suites_exist(page):
    for words in page.commands("python") + page.commands("python3"):
        if words[:1] != ["-m"]:
            continue
        module, *rest = words[1:]
        assert importlib.util.find_spec(module), f"python -m {module}"
        if module == "gradmem":
            _check_command(rest)
        if module == "benchmarks" and rest and not rest[0].startswith("<"):
            assert rest[0] in {*SUITES, *COMMANDS, "all"}, f"python -m benchmarks {rest[0]}"
            if rest[0] not in COMMANDS:
                options = {option.partition("=")[0] for option in rest if option.startswith("--")}
                known = {name for action in parser()._actions for name in action.option_strings}
                assert options <= known, f"python -m benchmarks {' '.join(rest)}"


def test_dotted_names_exist(page):
    for text in [*page.lines, *page.spans, *page.python]:
        for name in DOTTED.findall(text):
            assert _resolves(name), name


def test_python_blocks_parse_and_import_what_exists(page):
    for block in page.python:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"from {node.module} import {missing}"


def test_pages_named_in_the_sources_exist():
    missing = {(str(source.relative_to(ROOT)), page) for source in SOURCES if source != Path(__file__)
               for page in re.findall(r"\bdocs/\w+\.md\b", source.read_text()) if not (ROOT / page).exists()}
    assert not missing


def _check_command(words):
    """The words of a ``gradmem`` call name commands and options that there are."""
    command = typer.main.get_command(app)
    for word in words:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
        elif hasattr(command, "commands") and re.fullmatch(r"[a-z][a-z-]*", word):
            pytest.fail(f"gradmem {' '.join(words)}: no command {word}")
        elif word.startswith("-"):
            options = {option for p in command.params for option in [*p.opts, *p.secondary_opts]} | {"--help"}
            assert word.partition("=")[0] in options, f"gradmem {' '.join(words)}: no option {word}"


def _resolves(name):
    """Whether a dotted name is a module, or an attribute reached from one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
