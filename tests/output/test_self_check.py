"""What a conversion says of its own result: names and shapes against config.json, and logits against the source's."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gguf_files import write as write_gguf
from invoke import invoke, invoke_error, refuse
from meta_format import write_meta
from models import edit_json, make_model, random_tensors, write_hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters import logits_check as logits
from converters.cli import command as convert
from converters.console.errors import InputError
from converters.self_check import check_configuration, check_files
from quantize.cli import command as quantize

WEIGHTS = "model-00001-of-00001.safetensors"


def digest_of(model: PreTrainedModel) -> str:
    """The digest, from what transformers holds."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    shapes = {name: "x".join(map(str, t.shape)) for name, t in model.state_dict().items() if name not in tied}
    text = "".join(sorted(f"{name} {shape}\n" for name, shape in shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [[], ["--dtype", "float32"], ["--max-shard-size", "20KB"]], ids=str)
def test_digest_is_that_of_the_model(options: list[str], tied: bool, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", tied=tied, kv_heads=2)
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", *options).stdout
    expected = digest_of(model)
    tensors = len(model.state_dict()) - tied
    assert f"Self-check: {tensors} tensors, {model.num_parameters():,} parameters" in said
    assert f"(sha256 {expected[:16]})" in said
    metadata = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["names_and_shapes_sha256"] == expected
    assert digest_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == expected


def test_a_seed_has_the_digest_of_its_files(tmp_path: Path) -> None:
    config = write_hf(tmp_path / "hf") / "config.json"
    lines = {}
    for storage in ("files", "seed"):
        said = invoke(convert, "--config", config, "--storage", storage, "--out", tmp_path / storage).stdout
        [lines[storage]] = re.findall("Self-check.*", said)
    assert lines["files"] == lines["seed"]
    record = json.loads((tmp_path / "seed" / "random_init.json").read_text())
    assert record["names_and_shapes_sha256"] == check_configuration(tmp_path / "files").sha256


def test_files_that_config_json_has_no_place_for(tmp_path: Path) -> None:
    """Each kind of difference between headers and config.json, put there by hand."""
    write_hf(tmp_path)
    tensors, config = random_tensors(), (tmp_path / "config.json").read_text()
    name = "model.layers.1.mlp.up_proj.weight"
    check_files(tmp_path, ["model.safetensors"])
    for changed, says in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, "lacks the tensor"),
        (tensors | {"model.layers.9.input_layernorm.weight": torch.ones(16)}, "no place for"),
        (tensors | {name: tensors[name].T.contiguous()}, r"shape \(16, 24\)"),
        (tensors | {name: tensors[name].to(torch.int8)}, f"{name} as I8"),
        (tensors | {f"{name}_scale": torch.ones(24, 1)}, f"{name}_scale.* no place for"),
    ):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=says):
            check_files(tmp_path, ["model.safetensors"])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_json(tmp_path / "config.json", lambda fields: fields.update(intermediate_size=32))
    with pytest.raises(InputError, match=r"\(16, 24\).*\(16, 32\)"):
        check_files(tmp_path, ["model.safetensors"])
    (tmp_path / "config.json").write_text(config)
    check_files(tmp_path, ["model.safetensors"])


# --- --check-logits

BY_TRANSFORMERS, BY_US = "as read by transformers:", "as read by this tool (transformers doesn't read its layout):"


@pytest.mark.parametrize(
    "options",
    [[], ["--dtype", "float32"], ["--layers", "1"], ["--dtype", "float16", "--max-shard-size", "20KB"]],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_a_hugging_face_directory(tied: bool, options: list[str], tmp_path: Path) -> None:
    make_model(tmp_path / "hf", tied=tied, kv_heads=2)
    arguments = ("--source", tmp_path / "hf", "--out", tmp_path / "out", "--check-logits", *options)
    said = invoke(convert, *arguments)
    assert BY_TRANSFORMERS in said.stdout
    assert "after 16 of 16 tokens" in said.stdout
    assert len(said.stderr.splitlines()) == 1  # that there is no tokenizer; nothing of transformers' own
    assert said.stderr.startswith("Note: ")


def test_logits_of_a_gguf_file(tmp_path: Path) -> None:
    """Which transformers, given accelerate, dequantizes and permutes with code of its own."""
    source = write_gguf(tmp_path / "model.gguf")
    said = invoke(convert, "--source", source, "--out", tmp_path / "out", "--check-logits").stdout
    by_us = "as read by this tool (transformers: accelerate is required"
    assert (BY_TRANSFORMERS if find_spec("accelerate") else by_us) in said


def test_logits_of_what_transformers_does_not_read(tmp_path: Path) -> None:
    """Meta's parts, shards, an int8 export, random weights: their rows as this tool reads them."""
    model = make_model(tmp_path / "same", heads=8, kv_heads=4, hidden=64, ffn=172, vocab=516)
    write_meta(tmp_path / "meta", model, parts=2)
    invoke(quantize, tmp_path / "same", "--int8", "--chips", 3, "--out", tmp_path / "shards")
    runs = [
        ("--source", tmp_path / "meta"),
        ("--source", tmp_path / "shards"),
        ("--source", tmp_path / "shards", "--keep-int8"),
        ("--config", tmp_path / "same" / "config.json"),
        ("--source", tmp_path / "out2"),  # the int8 export
    ]
    for number, run in enumerate(runs):
        assert BY_US in invoke(convert, *run, "--out", tmp_path / f"out{number}", "--check-logits").stdout


@pytest.mark.parametrize("flags", [[], ["--keep-int8"]], ids=str)
def test_a_result_with_another_weight_is_found_out(flags: list[str], tmp_path: Path) -> None:
    """Changed on the disk between two runs, where no digest tells: names and shapes are as before, logits are not."""
    make_model(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "shards")
    source = tmp_path / "shards" if flags else tmp_path / "hf"
    arguments = ("--source", source, "--out", tmp_path / "out", "--check-logits", *flags)
    invoke(convert, *arguments)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors["model.layers.1.self_attn.v_proj.weight"][3] += 1
    save_file(tensors, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    (tmp_path / "out" / ".written.json").unlink()
    edit_json(tmp_path / "out" / "model.safetensors.index.json", lambda index: index["metadata"].pop("files"))
    assert "other logits than its source" in invoke(convert, *arguments, exit_code=2).stderr
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    assert "transformers can't load" in invoke(convert, *arguments, exit_code=2).stderr


def test_refusals_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "shards")
    run = ("--source", tmp_path / "hf", "--out", tmp_path / "out", "--check-logits")
    seed = ("--config", tmp_path / "hf" / "config.json", "--storage", "seed", "--out", tmp_path / "out")
    refuse(tmp_path, convert, *seed, "--check-logits", says=["is a seed", "--storage files"])
    with monkeypatch.context() as patch:
        patch.setattr(logits, "available_memory", lambda: 10**9)
        refuse(tmp_path, convert, *run, says=["1.00 GB are available", "--layers"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        refuse(tmp_path, convert, *run, says=["pip install 'transformers"])
        assert "transformers" in invoke_error(convert, *run, "--dry-run")
    kept = ("--source", tmp_path / "shards", "--keep-int8", "--out", tmp_path / "out", "--check-logits")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "compressed_tensors", None)
        refuse(tmp_path, convert, *kept, says=["compressed-tensors"])
    invoke(convert, *run, "--dry-run")
    assert not (tmp_path / "out").exists()
