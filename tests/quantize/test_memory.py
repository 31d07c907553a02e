"""Peak memory by the operating system's own account, on a model whose largest tensor is most of the limit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from invoke import SUPPORT
from safetensors import safe_open
from safetensors.torch import save_file

LIMIT_BYTES = 1.5e9  # resident at the peak, mapped files and the interpreter with torch (about 0.5 GB) included
VOCAB, HIDDEN = 262_144, 2048  # an embedding of 1.07 GB in bfloat16
FIELDS = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": 1,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": VOCAB, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "max_position_embeddings": 256,
}  # fmt: skip


def _run(command: str, *arguments: object) -> None:
    """Run a console script and hold its peak against the limit."""
    script = Path(sys.executable).with_name(command)
    launcher = SUPPORT / "child_rusage.py"
    done = subprocess.run(
        [sys.executable, launcher, script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < LIMIT_BYTES, f"{command}: {int(done.stdout) / 1e9:.2f} GB"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as files, made from a seed within the limit."""
    root = tmp_path_factory.mktemp("memory")
    (root / "config.json").write_text(json.dumps(FIELDS))
    _run("llama-convert", "--config", root / "config.json", "--storage", "files", "--out", root / "checkpoint")
    return root / "checkpoint"


@pytest.mark.slow
def test_quantizing_resharding_and_the_way_back(checkpoint: Path, tmp_path: Path) -> None:
    _run("llama-quantize", checkpoint, "--int8", "--chips", 8, "--out", tmp_path / "eight")
    _run("llama-quantize", tmp_path / "eight", "--int8", "--chips", 3, "--out", tmp_path / "three")
    _run("llama-convert", "--source", tmp_path / "eight", "--out", tmp_path / "restored")
    _run("llama-convert", "--source", tmp_path / "three", "--keep-int8", "--out", tmp_path / "kept")
    to_vllm = ("--format", "compressed-tensors", "--out", tmp_path / "packed")
    _run("llama-convert", "--source", tmp_path / "three", *to_vllm)
    to_llama_cpp = ("--format", "gguf", "--out", tmp_path / "gguf")
    _run("llama-convert", "--source", tmp_path / "three", *to_llama_cpp)


@pytest.mark.slow
def test_exporting_layers_of_7b(tmp_path: Path) -> None:
    """In groups, packed and in blocks of GGUF's, from two chips; and dequantized and quantized anew."""
    _run("llama-quantize", _seed_of_7b(tmp_path), "--int4", "--group-size", 32, "--chips", 2, "--out", tmp_path / "out")
    for number, options in enumerate((["compressed-tensors"], ["gguf"], ["gguf", "--gguf-type", "Q8_0"])):
        out = tmp_path / f"export{number}"
        _run("llama-convert", "--source", tmp_path / "out", "--format", *options, "--out", out)
        for path in out.iterdir():
            path.unlink()


def _seed_of_7b(root: Path) -> Path:
    _run("llama-convert", "--config", "7B", "--layers", 2, "--storage", "seed", "--out", root / "7b")
    return root / "7b"


@pytest.mark.slow
def test_quantizing_with_a_text(tmp_path: Path) -> None:
    """A layer of 65B from its seed; what is known of outputs is computed for every block of every weight."""
    _run("llama-convert", "--config", "65B", "--layers", 1, "--storage", "seed", "--out", tmp_path / "checkpoint")
    (tmp_path / "ids.json").write_text(json.dumps([37 * place % 32000 for place in range(256)]))
    options = ("--int4", "--calibrate", tmp_path / "ids.json", "--calibration-tokens", 256)
    _run("llama-quantize", tmp_path / "checkpoint", *options, "--out", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_converting_a_pickle(zipped: bool, checkpoint: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with safe_open(checkpoint / "model-00001-of-00001.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    torch.save(tensors, hf / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    del tensors
    _run("llama-convert", "--source", hf, "--out", tmp_path / "out")
    for part in ("out", "hf"):
        for path in (tmp_path / part).iterdir():
            path.unlink()


@pytest.mark.slow
def test_converting_parts_of_meta(tmp_path: Path) -> None:
    """A layer of 65B in 8 parts, each filled with its number, so that the result shows where its values came from."""
    width, ffn, vocab, parts = 8192, 22016, 32000, 8
    meta = tmp_path / "meta"
    meta.mkdir()
    params = {"dim": width, "multiple_of": 256, "n_heads": 64, "n_layers": 1, "norm_eps": 1e-5, "vocab_size": -1}
    (meta / "params.json").write_text(json.dumps(params))
    by_rows = {"wq": width, "wk": width, "wv": width, "w1": ffn, "w3": ffn}
    for number in range(parts):
        tensors = {"tok_embeddings.weight": (vocab, width // parts), "output.weight": (vocab // parts, width)}
        for name, rows in by_rows.items():
            kind = "feed_forward" if rows == ffn else "attention"
            tensors[f"layers.0.{kind}.{name}.weight"] = (rows // parts, width)
        tensors |= {"layers.0.attention.wo.weight": (width, width // parts)}
        tensors |= {"layers.0.feed_forward.w2.weight": (width, ffn // parts)}
        filled = {name: torch.full(shape, number, dtype=torch.bfloat16) for name, shape in tensors.items()}
        norms = ("norm", "layers.0.attention_norm", "layers.0.ffn_norm")
        filled |= {f"{name}.weight": torch.ones(width, dtype=torch.bfloat16) for name in norms}
        torch.save(filled, meta / f"consolidated.{number:02d}.pth")
        del filled
    _run("llama-convert", "--source", meta, "--out", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", "pt") as file:
        for name, length, axis in (
            ("model.embed_tokens", width, 1), ("lm_head", vocab, 0), ("model.layers.0.self_attn.q_proj", width, 0),
            ("model.layers.0.self_attn.o_proj", width, 1), ("model.layers.0.mlp.up_proj", ffn, 0),
            ("model.layers.0.mlp.down_proj", ffn, 1),
        ):  # fmt: skip
            rows = file.get_slice(f"{name}.weight")
            line = rows[:, 77:78].flatten() if axis == 0 else rows[77:78].flatten()
            assert torch.equal(line, torch.arange(parts).repeat_interleave(length // parts).bfloat16()), name
    for folder in (meta, tmp_path / "out"):
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.slow
def test_converting_gguf(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    for add, value in (
        (writer.add_embedding_length, HIDDEN), (writer.add_feed_forward_length, 512), (writer.add_block_count, 1),
        (writer.add_head_count, 16), (writer.add_head_count_kv, 4), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_context_length, 256),
    ):  # fmt: skip
        add(value)
    shapes = {
        "token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (512, HIDDEN), "blk.0.attn_v": (512, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN), "blk.0.ffn_norm": (HIDDEN,), "blk.0.ffn_gate": (512, HIDDEN),
        "blk.0.ffn_up": (512, HIDDEN), "blk.0.ffn_down": (HIDDEN, 512),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = np.ones(shape, dtype=np.float32 if len(shape) == 1 else np.float16)
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _run("llama-convert", "--source", tmp_path / "model.gguf", "--out", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantized_checkpoints_whose_outputs_are_columns(method: str, tmp_path: Path) -> None:
    """A layer whose largest weights take 0.54 GB in float32; every block is some columns of the file's tensors."""
    width, ffn, group = 8192, 16384, 128
    fields = FIELDS | {"hidden_size": width, "intermediate_size": ffn, "num_attention_heads": 64, "vocab_size": 512}
    settings = {"quant_method": method, "bits": 4, "group_size": group}
    settings |= {"desc_act": True, "checkpoint_format": "gptq_v2"} if method == "gptq" else {"version": "gemm"}
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(fields | {"quantization_config": settings}))
    shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (512, width), "self_attn.v_proj": (512, width)}
    shapes |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width)}
    norms = ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm")
    tensors = {f"model.{name}.weight": torch.ones(width, dtype=torch.float16) for name in norms}
    tensors["model.embed_tokens.weight"] = torch.ones(512, width, dtype=torch.float16)
    for name, (out, inputs) in (shapes | {"mlp.down_proj": (width, ffn)}).items():
        module, groups = f"model.layers.0.{name}", inputs // group
        words = (inputs // 8, out) if method == "gptq" else (inputs, out // 8)
        tensors[f"{module}.qweight"] = torch.randint(-(2**31), 2**31, words, dtype=torch.int32)
        tensors[f"{module}.qzeros"] = torch.full((groups, out // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.full((groups, out), 0.01, dtype=torch.float16)
        if method == "gptq":
            tensors[f"{module}.g_idx"] = (torch.arange(inputs) % groups).int()
    save_file(tensors, hf / "model.safetensors")
    del tensors
    if method == "gptq":
        _run("llama-convert", "--source", hf, "--out", tmp_path / "out")
    else:
        _run("llama-quantize", hf, "--keep", "--chips", 8, "--out", tmp_path / "out")
    for folder in (hf, tmp_path / "out"):
        for path in folder.iterdir():
            path.unlink()
