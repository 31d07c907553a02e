"""Weights keep the dtype that their source has: of every kind of source, and on through quantizing and running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import random_tensors as gguf_tensors
from gguf_files import write as write_gguf
from invoke import Result, invoke, notes
from meta_format import edit_part, write_meta
from models import edit_json, make_model, make_opt, random_tensors, stored, write_hf
from parity import count_greedy, decode, logits_after, reference, relative
from safetensors.torch import load_file

from converters.cli import command as convert
from converters.sources.opening import open_source
from quantize.cli import command as quantize
from quantize.shards.reading import Shards

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def converted(root: Path, source: Path, *options: object) -> tuple[set[torch.dtype], str, Result]:
    """The dtypes of what is written, the one that its config.json says, and what was printed."""
    said = invoke(convert, "--source", source, "--out", root / "out", *options)
    fields = json.loads((root / "out" / "config.json").read_text())
    return {tensor.dtype for tensor in stored(root / "out").values()}, fields["torch_dtype"], said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("make", [make_model, make_opt])
def test_no_value_changes_by_default(make: Any, form: str, dtype: str, tmp_path: Path) -> None:
    model = make(tmp_path / "hf", dtype=dtype, form=form, tied=False)
    found, said, printed = converted(tmp_path, tmp_path / "hf")
    assert (found, said, notes(printed)) == ({DTYPES[dtype]}, dtype, [])
    assert f"parameters, {dtype}, 1 file" in printed.stdout
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_what_is_asked_for_is_written(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", dtype="float16")
    assert converted(tmp_path, tmp_path / "hf", "--dtype", "bfloat16")[:2] == ({torch.bfloat16}, "bfloat16")


@pytest.mark.parametrize("config_says", ["bfloat16", "float32", None, "auto"])
def test_the_tensors_dtype_counts_before_the_configurations(config_says: str | None, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", {name: tensor.half() for name, tensor in random_tensors().items()})
    edit_json(tmp_path / "hf" / "config.json", lambda fields: fields.update(torch_dtype=config_says))
    found, said, printed = converted(tmp_path, tmp_path / "hf")
    assert (found, said) == ({torch.float16}, "float16")
    words = {None: "", "auto": "'auto', which is none of"}.get(config_says, f"config.json says {config_says}")
    assert words in printed.stderr
    assert len(notes(printed)) == (config_says is not None)


@pytest.mark.parametrize(
    ("of_norm", "config_says", "expected"),
    [
        ("float32", "bfloat16", "bfloat16"),  # as transformers with dtype="auto"
        ("float32", "float32", "float32"),
        ("float32", None, "float32"),
        ("float32", "float16", "float32"),
        ("float16", None, "float32"),  # neither holds the other
        ("float16", "float16", "float16"),
        ("float64", "bfloat16", "bfloat16"),
        ("float64", None, "float32"),
    ],
)
def test_mixed_dtypes(of_norm: str, config_says: str | None, expected: str, tmp_path: Path) -> None:
    """Beside weights of bfloat16."""
    tensors = random_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(getattr(torch, of_norm))
    write_hf(tmp_path / "hf", tensors)
    edit_json(tmp_path / "hf" / "config.json", lambda fields: fields.update(torch_dtype=config_says))
    found, said, printed = converted(tmp_path, tmp_path / "hf")
    assert (found, said) == ({DTYPES[expected]}, expected)
    other = "float32" if of_norm == "float64" else of_norm
    assert f"Note: The tensors are bfloat16 and {other}: all are written as {expected}" in printed.stderr
    explicit = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "asked", "--dtype", "float32")
    assert "The tensors are" not in explicit.stderr


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_float64_is_read_as_float32(form: str, tmp_path: Path) -> None:
    tensors = {name: tensor.double() * (1 + 1e-12) for name, tensor in random_tensors().items()}
    write_hf(tmp_path / "hf", tensors)
    if form == "bin":
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    found, said, printed = converted(tmp_path, tmp_path / "hf")
    assert (found, said) == ({torch.float32}, "float32")
    assert "float64, which are read as float32" in printed.stderr
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, tensors[name].float()), name
    assert open_source(tmp_path / "hf").rows(Q_PROJ, 1, 3).dtype == torch.float32
    for number, checkpoint in enumerate(("hf", "out")):
        invoke(quantize, tmp_path / checkpoint, "--int8", "--out", tmp_path / f"shards{number}")
    name = "chip-00-of-01.safetensors"
    assert (tmp_path / "shards0" / name).read_bytes() == (tmp_path / "shards1" / name).read_bytes()


def test_float64_beyond_float32(tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in random_tensors().items()}
    tensors[Q_PROJ][0, 0] = 1e300
    write_hf(tmp_path / "hf", tensors)
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", exit_code=2).stderr
    assert f"Error: The tensor {Q_PROJ} holds NaN or infinite values" in said
    assert not (tmp_path / "out").exists()


# --- other sources


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta(dtype: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", dtype=dtype, ffn=128, vocab=208)
    source = write_meta(tmp_path / "meta", model, 2)
    assert converted(tmp_path, source)[:2] == ({DTYPES[dtype]}, dtype)


def test_meta_of_mixed_dtypes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", dtype="bfloat16", ffn=128, vocab=208)
    source = write_meta(tmp_path / "meta", model, 2)
    for number in range(2):
        edit_part(source, number, norm__weight=model.model.norm.weight.data.float())
    found, said, printed = converted(tmp_path, source)
    assert (found, said) == ({torch.float32}, "float32")
    assert "bfloat16 and float32: all are written as float32" in printed.stderr


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Type.F16, "float16"),
        (Type.BF16, "bfloat16"),
        (Type.F32, "float32"),
        (Type.Q4_1, "bfloat16"),
        (Type.Q8_0, "bfloat16"),
    ],
)
def test_gguf(kind: Type, expected: str, tmp_path: Path) -> None:
    """Norms are float32 in all of them, which says nothing of the weights."""
    source = write_gguf(tmp_path / "m.gguf", gguf_tensors(kind))
    assert converted(tmp_path, source)[:2] == ({DTYPES[expected]}, expected)


def test_gguf_of_mixed_types(tmp_path: Path) -> None:
    half, quantized = gguf_tensors(Type.F16), gguf_tensors(Type.Q8_0)
    source = write_gguf(tmp_path / "q.gguf", half | {"blk.0.attn_q.weight": quantized["blk.0.attn_q.weight"]})
    assert converted(tmp_path / "q", source)[1] == "bfloat16"
    source = write_gguf(tmp_path / "f.gguf", half | {"output.weight": gguf_tensors(Type.F32)["output.weight"]})
    _, said, printed = converted(tmp_path / "f", source)
    assert said == "float32"
    assert "float16 and float32: all are written as float32" in printed.stderr


@pytest.mark.parametrize("storage", ["files", "seed"])
@pytest.mark.parametrize(("says", "expected"), [("float16", "float16"), ("float32", "float32"), (None, "bfloat16")])
def test_random_weights_of_a_configuration(says: str | None, expected: str, storage: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    edit_json(config, lambda fields: fields.pop("torch_dtype") if says is None else fields.update(torch_dtype=says))
    invoke(convert, "--config", config, "--out", tmp_path / "checkpoint", "--storage", storage)
    assert open_source(tmp_path / "checkpoint").config.dtype == expected
    assert converted(tmp_path, tmp_path / "checkpoint")[:2] == ({DTYPES[expected]}, expected)


def test_random_weights_of_a_preset(tmp_path: Path) -> None:
    assert "bfloat16" in invoke(convert, "--config", "tiny", "--out", tmp_path / "out", "--storage", "seed").stdout


@pytest.mark.parametrize("options", [[], ["--keep-int8"]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards(dtype: str, options: list[str], tmp_path: Path) -> None:
    """What isn't quantized comes back as it was, and so does it from the compressed-tensors directory."""
    model = make_model(tmp_path / "hf", dtype=dtype)
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", 2, "--out", tmp_path / "shards")
    source = tmp_path / "shards"
    for number in range(2):
        found, said, _ = converted(tmp_path / str(number), source, *options)
        assert said == dtype
        assert found == {DTYPES[dtype]} | ({torch.int8, torch.float32} if options else set())
        source = tmp_path / str(number) / "out"
        assert torch.equal(stored(source)["model.embed_tokens.weight"], model.model.embed_tokens.weight)


# --- on through the later stages


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 checkpoint, and int8 shards of it for one chip and two."""
    root = tmp_path_factory.mktemp("half")
    make_model(root / "hf", heads=6, kv_heads=2, head_dim=16, ffn=172, vocab=515, dtype="float16")
    invoke(convert, "--source", root / "hf", "--out", root / "checkpoint")
    for chips in (1, 2):
        invoke(quantize, root / "checkpoint", "--int8", "--chips", chips, "--out", root / f"out{chips}", "--verify")
    return root


def test_shards_of_float16(half: Path) -> None:
    """Embeddings, norms and head as they are, in file and manifest."""
    tensors, original = load_file(half / "out1" / "chip-00-of-01.safetensors"), stored(half / "hf")
    manifest = json.loads((half / "out1" / "shards.json").read_text())["tensors"]
    plain = [name for name in original if f"{name}_scale" not in tensors]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(plain)
    for name in plain:
        assert manifest[name]["dtype"] == "float16"
        assert torch.equal(tensors[name], original[name]), name
    assert Shards(half / "out2").config.dtype == "float16"


@pytest.mark.parametrize(
    ("backend", "chips"), [("eager", 2), ("xla", 2), pytest.param("inductor", 1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_running_float16(backend: str, chips: int, dtype: str, tolerance: float, half: Path, tmp_path: Path) -> None:
    """llama-run's default, bfloat16, and float32, against transformers in float32 with the same int8 weights."""
    prompt = [3, 141, 59, 26, 5, 35, 89]
    job = {"shards": half / f"out{chips}", "dtype": dtype, "batches": [[prompt]], "new_tokens": 8, "backend": backend}
    [result] = decode([job | {"max_seq_len": 16, "buckets": [16]}])  # no later sections: a graph less to compile
    model = reference(half / "checkpoint", half / "out1")
    assert result["recompilations"] == 0
    assert relative(result["logits"][0][0], logits_after(model, prompt)[-1]) < tolerance
    if dtype == "float32":
        assert count_greedy(model, prompt, result["token_ids"][0][0]) > 4
