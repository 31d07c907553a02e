"""The documents' links lead somewhere, their commands and options exist, and the README stays short."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
from invoke import invoke
from models import write_hf

from quantize.cli import command as quantize

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
COMMANDS = {
    "llama-convert": "converters.cli",
    "llama-quantize": "quantize.cli",
    "llama-run": "runtime.cli",
    "llama-plan": "runtime.plan_cli",
    "llama-bench": "runtime.bench_cli",
    "llama-eval": "runtime.eval_cli",
}


def _anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in _anchors(found), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:converters|quantize|runtime|tests|benchmarks)/[\w/]+\.py\b", text))
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in readme] == []
    assert len(readme.splitlines()) <= 200


def _command_lines() -> Iterator[tuple[str, str]]:
    """Each command with its arguments, of the indented lines of all documents."""
    for document in DOCUMENTS:
        text = re.sub(r"\\\n\s+|\n {16,}(?=\[)", " ", document.read_text(encoding="utf-8"))
        yield from re.findall(r"^ {4,}(?:\$ )?(llama-[a-z]+)\b([^\n#]*)", text, re.MULTILINE)


def test_every_option_that_is_shown_exists() -> None:
    shown = list(_command_lines())
    assert {name for name, _ in shown} == COMMANDS.keys()
    for name, arguments in shown:
        command: click.Command = import_module(COMMANDS[name]).command
        options = {option for parameter in command.params for option in parameter.opts}
        for option in re.findall(r"--[a-z][a-z0-9-]*", arguments):
            assert option in options, f"{name} {option}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    """By the synopsis of the command's own page."""
    page = (ROOT / "docs" / f"{name.removeprefix('llama-')}.md").read_text(encoding="utf-8")
    command: click.Command = import_module(COMMANDS[name]).command
    missing = [
        parameter.opts[0]
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.opts[0] not in page and parameter.opts[0] != "--version"
    ]
    assert [option for option in missing if option != "--traceback"] == []


def test_the_example_of_an_evaluation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As below: 42 tokens in windows of 16, compared with themselves."""
    page = (ROOT / "docs" / "eval.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    invoke(quantize, write_hf(tmp_path / "hf"), "--int8", "--out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/eval.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[1:] == ["0.0 1.0", "(39,)"]


def test_the_example_in_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small random model, in a folder with its shards: ids, four steps, logits of 50 tokens, scores."""
    page = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    invoke(quantize, write_hf(tmp_path / "hf"), "--int8", "--out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/run.md", "exec"), {})
    _, *steps, shape, scores = capsys.readouterr().out.split("\n", 6)
    assert [len(json.loads(step)) for step in steps] == [2] * 4
    assert shape == "torch.Size([2, 50])"
    assert len(re.findall(r"-\d+\.\d+", scores)) == 6
