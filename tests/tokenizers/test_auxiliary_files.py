"""The files beside the weights: what goes along from the source to the shards and back, and what is said of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from invoke import invoke
from meta_format import write_meta
from models import edit_json, make_model, write_hf
from tokenizer_models import train_sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters.cli import command as convert
from converters.model.families.hf_config import to_hf
from converters.sources.opening import open_source
from converters.tokenizers.auxiliary_files import read_auxiliary_files
from quantize.cli import command as quantize
from runtime.run.text import find_codec

NO_TOKENIZER = "gives no tokenizer.json"
FILES = {
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool_use.jinja": "tools: {{ messages[0].content }}",
    "additional_chat_templates/rag-2.jinja": "{{ documents }}",
    "generation_config.json": '{"eos_token_id": [2, 7], "temperature": 0.5, "do_sample": true}',
    "special_tokens_map.json": '{"pad_token": "</s>"}',
}


def source_with_files(directory: Path) -> Path:
    make_model(directory, vocab=810, eos=2)
    (directory / "tokenizer.model").write_bytes(train_sentencepiece())
    (directory / "additional_chat_templates").mkdir()
    for name, content in FILES.items():
        (directory / name).write_text(content)
    edit_json(directory / "config.json", lambda fields: fields.update(pad_token_id=7))
    return directory


def check_files(directory: Path) -> None:
    for name, content in FILES.items():
        assert (directory / name).read_text() == content, name
    assert json.loads((directory / "config.json").read_text())["pad_token_id"] == 7


def test_there_and_back(tmp_path: Path) -> None:
    source = source_with_files(tmp_path / "hf")
    said = invoke(convert, "--source", source, "--out", tmp_path / "checkpoint").stderr
    said += invoke(quantize, tmp_path / "checkpoint", "--int8", "--chips", 2, "--out", tmp_path / "out").stderr
    said += invoke(quantize, tmp_path / "out", "--int8", "--chips", 4, "--out", tmp_path / "again").stderr
    said += invoke(convert, "--source", tmp_path / "again", "--out", tmp_path / "back").stderr
    assert NO_TOKENIZER not in said
    for name in ("checkpoint", "out", "again", "back"):
        check_files(tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "Hi"
    assert tokenizer.apply_chat_template(chat, chat_template="tool_use", tokenize=False) == "tools: Hi"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.pad_token_id == 7


def test_straight_to_shards(tmp_path: Path) -> None:
    invoke(quantize, source_with_files(tmp_path / "hf"), "--int8", "--out", tmp_path / "out")
    check_files(tmp_path / "out")


def test_only_files_of_the_known_names_go_along(tmp_path: Path) -> None:
    """Of the folder of templates too: no folder in it, no other kind of file, no name that leads elsewhere."""
    folder = tmp_path / "additional_chat_templates"
    (folder / "inner.jinja").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for path in (folder / "a.jinja", folder / "a.txt", folder / "-b c.jinja", folder / "c.jinja.partial"):
        path.write_text("x")
    for path in (folder / "inner.jinja" / "d.jinja", tmp_path / "other" / "e.jinja", tmp_path / "f.jinja"):
        path.write_text("x")
    os.symlink(tmp_path / "f.jinja", folder / "linked.jinja")  # as the hub's cache has every file
    assert list(read_auxiliary_files(tmp_path)) == [
        "additional_chat_templates/a.jinja",
        "additional_chat_templates/linked.jinja",
    ]


@pytest.mark.parametrize("pad", [-1, None])
def test_no_padding_token(pad: int | None, tmp_path: Path) -> None:
    """As older files of LLaMA say it; transformers can't load a model with -1."""
    assert "pad_token_id" not in to_hf(open_source(write_hf(tmp_path, pad_token_id=pad)).config)


def test_a_padding_token_without_a_row(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", pad_token_id=50)
    said = invoke(convert, "--source", source, "--out", tmp_path / "out").stderr
    assert "Note: pad_token_id in config.json is 50, and the vocabulary has 50 tokens: it is left out." in said
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# --- no tokenizer


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    """Once on the way: of a checkpoint that llama-convert wrote, llama-quantize doesn't say it again."""
    make_model(tmp_path / "hf")
    words = f"Note: {tmp_path / 'hf'} {NO_TOKENIZER}"
    assert words in invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint").stderr
    assert words in invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "direct").stderr
    arguments = (tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    assert NO_TOKENIZER not in invoke(quantize, *arguments).stderr


def test_random_weights_have_none(tmp_path: Path) -> None:
    arguments = ("--storage", "seed", "--layers", 1, "--out", tmp_path / "checkpoint")
    assert NO_TOKENIZER not in invoke(convert, "--config", "tiny", *arguments).stderr
    assert NO_TOKENIZER not in invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out").stderr


def test_files_that_do_not_say_how_text_is_cut(tmp_path: Path) -> None:
    make_model(tmp_path / "hf")
    (tmp_path / "hf" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "hf" / "merges.txt").write_text("")
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out").stderr
    assert f"{NO_TOKENIZER} (vocab.json and merges.txt alone don't say how text is cut)" in said


# --- Meta's downloads, which have one tokenizer.model for several models


def meta_beside_its_tokenizer(root: Path) -> Path:
    model = make_model(root / "hf", heads=8, hidden=48, ffn=128, vocab=810)
    (root / "tokenizer.model").write_bytes(train_sentencepiece())
    return write_meta(root / "7B", model, 2)


def test_the_tokenizer_of_the_folder_above(tmp_path: Path) -> None:
    source = meta_beside_its_tokenizer(tmp_path)
    result = invoke(convert, "--source", source, "--out", tmp_path / "out")
    assert f"Note: {source} has no tokenizer.model: the one of the folder above it, {tmp_path}" in result.stderr
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == train_sentencepiece()
    assert find_codec(tmp_path / "out", 810).encode("Hello")[0] == 1
    before = open_source(source).fingerprint()
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(790))
    assert open_source(source).fingerprint() != before


@pytest.mark.parametrize("way", ["relative", "dot", "slash", "link"])
def test_however_the_directory_is_named(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = meta_beside_its_tokenizer(tmp_path / "models")
    (tmp_path / "elsewhere").mkdir()
    os.symlink(source, tmp_path / "elsewhere" / "link")
    monkeypatch.chdir(source if way == "dot" else tmp_path)
    path = {"relative": "models/7B", "dot": ".", "slash": f"{source}/", "link": "elsewhere/link"}[way]
    assert "tokenizer.json" in open_source(Path(path)).auxiliary_files()


def test_its_own_tokenizer_goes_before(tmp_path: Path) -> None:
    source = meta_beside_its_tokenizer(tmp_path)
    own = train_sentencepiece(700)
    (source / "tokenizer.model").write_bytes(own)
    assert open_source(source).auxiliary_files()["tokenizer.model"] == own


def test_a_hugging_face_directory_has_its_own(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", vocab=810)
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    assert "tokenizer.model" not in open_source(tmp_path / "hf").auxiliary_files()
