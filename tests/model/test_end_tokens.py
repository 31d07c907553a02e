"""End tokens: every place that names them is heeded, by llama-run and in what is written for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import VOCAB
from gguf_files import write as write_gguf
from invoke import invoke, refuse
from models import edit_json, make_model
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoModelForCausalLM

from converters.cli import command as convert
from converters.model.end_tokens import ends_by_text
from converters.model.families.hf_config import from_hf, to_hf
from converters.sources.gguf.source import open_gguf
from quantize.cli import command as quantize
from runtime.cli import command as run

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BY_TEXT = [
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "</s>", "<EOT>", "_<EOT>"),
    *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "\u2581<EOT>", "<|return|>", "<|call|>"),
]
PROMPT = [1, 17, 20, 5]


def new_tokens(shards: Path, limit: int = 12) -> tuple[list[int], str]:
    """What llama-run generates, and its table."""
    arguments = ("--shards", shards, "--backend", "eager", "--dtype", "float32", "--max-new-tokens", limit)
    ids = ("--prompt-ids", ",".join(map(str, PROMPT)), "--max-seq-len", 64, "--json", shards.parent / "run.json")
    table = invoke(run, *arguments, *ids).stdout
    return json.loads((shards.parent / "run.json").read_text())["token_ids"][0], table


def shards_of(source: Path, out: Path) -> Path:
    invoke(quantize, source, "--bf16", "--chips", 2, "--out", out)
    return out


def tokenizer(directory: Path, control: dict[int, str], normal: dict[int, str], size: int) -> None:
    """A tokenizer.json of ``size`` words, some of which are special tokens."""
    texts = {i: f"w{i}" for i in range(size)} | control | normal
    made = Tokenizer(models.WordLevel({text: i for i, text in texts.items()}, unk_token="w0"))
    made.add_special_tokens([AddedToken(text, special=True) for text in control.values()])
    made.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("value", "ids"),
    [(2, (2,)), ([2, 5], (2, 5)), (None, ()), (-1, ()), ([2, -1, None], (2,)), ([], ()), (0, (0,))],
    ids=str,
)
def test_ids_in_config_json(value: Any, ids: tuple[int, ...]) -> None:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    config = from_hf(sizes | {"eos_token_id": value, "bos_token_id": -1})
    assert (config.eos_token_ids, config.bos_token_id) == (ids, None)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("in_config", [7, [7, 9], None])
def test_generation_config(several: bool, in_config: Any, tmp_path: Path) -> None:
    """transformers ends by generation_config.json; llama-run by it and by config.json."""
    make_model(tmp_path / "hf", eos=in_config)
    (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)
    whole, table = new_tokens(shards_of(tmp_path / "hf", tmp_path / "whole"))
    assert len(whole) == 12
    assert "end tokens" not in table
    end = whole[5]
    settings = {"eos_token_id": [150, end] if several else end, "do_sample": False}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = model.generate(torch.tensor([PROMPT]), max_new_tokens=12)[0, len(PROMPT) :].tolist()
    assert theirs == whole[: whole.index(end) + 1]
    ours, table = new_tokens(shards_of(tmp_path / "hf", tmp_path / "out"))
    assert ours == theirs
    line = next(line for line in table.splitlines() if line.startswith("end tokens"))
    assert str(end) in line


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"eos_token_id": "2"}', b"\xff"])
def test_a_damaged_generation_config(content: bytes, tmp_path: Path) -> None:
    make_model(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_bytes(content)
    out = shards_of(tmp_path / "hf", tmp_path / "out")
    refuse(tmp_path, run, "--shards", out, "--backend", "eager", "--prompt-ids", "1", says=["generation_config.json"])


@pytest.mark.parametrize("text", BY_TEXT)
def test_control_tokens_that_say_so(text: str, tmp_path: Path) -> None:
    """In a GGUF file of which no key names them; what is written ends there, by transformers and by llama-run."""
    texts = {9: (text, CONTROL), 10: ("<|im_start|>", CONTROL)}
    config = open_gguf(gguf_of(tmp_path / "model.gguf", texts, eot_token_id=None)).config
    assert config.eos_token_ids == (2, 9)
    assert to_hf(config)["eos_token_id"] == [2, 9]


def gguf_of(path: Path, texts: dict[int, tuple[str, int]], **change: Any) -> Path:
    tokens, types = [f"w{i}" for i in range(VOCAB)], [NORMAL] * VOCAB
    for i, (text, kind) in texts.items():
        tokens[i], types[i] = text, kind
    keys = {"model": "llama", "scores": [0.0] * VOCAB, "tokens": tokens, "token_type": types, **change}
    return write_gguf(path, change={f"tokenizer.ggml.{key}": value for key, value in keys.items()})


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        ({9: ("</s>", NORMAL), 10: ("<eos>", USER_DEFINED)}, (2, 10)),  # as HTML has it; as some converters mark ends
        ({9: ("<|eot_id|>", NORMAL)}, (2, 9)),  # which no text holds
        ({9: ("<|end|>", CONTROL), 10: ("<|return|>", CONTROL), 11: ("<|call|>", CONTROL)}, (2, 10, 11)),
        ({9: ("<|end|>", CONTROL), 10: ("<|return|>", CONTROL)}, (2, 9, 10)),
        ({9: ("<|im_start|>", CONTROL), 10: ("<|fim_middle|>", CONTROL)}, (2,)),
        ({2: ("<|im_end|>", CONTROL)}, (2,)),
    ],
    ids=str,
)
def test_which_tokens_of_a_gguf_file(texts: dict[int, tuple[str, int]], ends: tuple[int, ...], tmp_path: Path) -> None:
    source = gguf_of(tmp_path / "model.gguf", texts, eot_token_id=None)
    assert open_gguf(source).config.eos_token_ids == ends


def test_keys_of_a_gguf_file_come_first(tmp_path: Path) -> None:
    texts = {9: ("<|eot_id|>", CONTROL), 4: ("<|end|>", CONTROL)}
    source = gguf_of(tmp_path / "model.gguf", texts, eot_token_id=9, eom_token_id=11)
    assert open_gguf(source).config.eos_token_ids == (2, 9, 11, 4)


def test_a_gguf_file_to_the_end(tmp_path: Path) -> None:
    """Converted, with a note; transformers and llama-run on the shards end at the token, and the way back keeps it."""
    texts = {i: (f"<{i}>", CONTROL) for i in range(VOCAB)}
    plain = gguf_of(tmp_path / "plain.gguf", texts, eot_token_id=None, eos_token_id=0)
    invoke(convert, "--source", plain, "--dtype", "float32", "--out", tmp_path / "plain")
    whole, _ = new_tokens(shards_of(tmp_path / "plain", tmp_path / "plain-shards"))
    end = whole[3]
    texts[end] = ("<|eot_id|>", CONTROL)
    source = gguf_of(tmp_path / "model.gguf", texts, eot_token_id=None, eos_token_id=0)
    said = invoke(convert, "--source", source, "--dtype", "float32", "--out", tmp_path / "checkpoint").stderr
    assert f"listed as such in {source}: <|eot_id|> ({end}).\n" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    assert model.generation_config.eos_token_id == [0, end]
    expected = whole[: whole.index(end) + 1]
    out = shards_of(tmp_path / "checkpoint", tmp_path / "out")
    assert new_tokens(out)[0] == expected
    invoke(convert, "--source", out, "--out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [0, end]
    # shards made when config.json still lacked it
    edit_json(out / "config.json", lambda fields: fields.update(eos_token_id=0))
    ids, table = new_tokens(out)
    assert ids == expected
    assert f"end tokens               0 <0>, {end} <|eot_id|>\n" in table


def test_texts_that_the_vocabulary_means_otherwise() -> None:
    assert ends_by_text({1: "</s>", 2: "<|tool_response>"}) == (2,)
    assert ends_by_text({3: "<|end|>", 1: "<|calls|>", 2: "<|flush|>"}) == (1, 2)
    assert ends_by_text({}) == ()


def test_a_tokenizer_json_of_a_hugging_face_directory(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", eos=0)
    (tmp_path / "hf" / "generation_config.json").unlink()
    whole, _ = new_tokens(shards_of(tmp_path / "hf", tmp_path / "whole"))
    end, other = whole[4], next(i for i in whole[:4] if i != whole[4])
    tokenizer(tmp_path / "hf", {end: "<|im_end|>"}, {other: "</s>"}, 211)  # the latter is no control token there
    assert new_tokens(shards_of(tmp_path / "hf", tmp_path / "out"))[0] == whole[: whole.index(end) + 1]
