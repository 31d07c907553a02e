"""Configurations that are refused, and odd ones that must do no harm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from invoke import invoke, invoke_error, refuse, refuse_source
from models import write_hf

from converters.cli import command as convert
from quantize.cli import command as quantize

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "qwen2"}, "'qwen2'; this tool converts 'llama', 'mistral', 'opt'"),
        ({"model_type": 7}, "7"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "'yarn'; implemented: 'default', 'linear', 'llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "['linear']"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_parameters": [1]}, "RoPE"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' without factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor nan"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor True"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "without low_freq_factor, high_freq_factor",
        ),
        ({"rope_scaling": LLAMA3 | {"factor": 10**400}}, "factor 1000"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "below the high one"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": -1.0}}, "low_freq_factor -1.0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": []}}, "high_freq_factor []"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192.0}}, "8192.0"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "yarn"}, "rope_parameters": {"rope_theta": 1e4}}, "'yarn'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 127}, "a sliding window of 127 tokens (sliding_window) within 128 positions"),
        ({"sliding_window": "127"}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 64}, "a sliding window of 64 tokens"),
        ({"model_type": "mistral", "max_position_embeddings": 4097}, "a sliding window of 4096 tokens"),
        ({"model_type": "mixtral"}, "'mixtral' (mixture of experts)"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized by 'gptq'"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized by 'awq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized by "),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "by 'compressed-tensors'"),
        ({"quantization_config": {"load_in_8bit": True}}, "already quantized"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "already quantized"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"num_key_value_heads": 0}, "num_kv_heads"),
        ({"head_dim": 3}, "odd"),
        ({"head_dim": None, "num_attention_heads": 3}, "no multiple"),
        ({"hidden_size": -16}, "hidden_size"),
        ({"hidden_size": 16.0}, "16.0"),
        ({"hidden_size": "16"}, "'16'"),
        ({"hidden_size": True}, "True"),
        ({"vocab_size": 10**300}, "vocab_size"),
        ({"num_hidden_layers": 10**6}, "num_layers"),
        ({"rms_norm_eps": 0}, "norm_eps"),
        ({"rms_norm_eps": 10**400}, "norm_eps"),
        ({"rope_theta": 10**40}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"pad_token_id": "0"}, "pad_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"bos_token_id": 1.5}, "bos_token_id"),
        ({"bos_token_id": ["1"]}, "bos_token_id"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_config_that_asks_for_something_else(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", **fields)
    refuse_source(tmp_path, says)
    alone = tmp_path / "hf" / "config.json"
    refuse(tmp_path, convert, "--config", alone, "--out", tmp_path / "out", says=[says])


def test_values_nested_to_the_limit_of_the_parser(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    text = path.read_text().replace('"hidden_size": 16', '"hidden_size": %s')
    for depth in (*range(850, 1000, 3), 10**4):
        path.write_text(text % ("[" * depth + "]" * depth))
        refuse_source(tmp_path)


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[31mred", "x" * 100_000, "", "/", 7])
def test_odd_names_of_models_do_no_harm(name: Any, tmp_path: Path) -> None:
    """The name is shown and written again, so it must be plain text by then."""
    write_hf(tmp_path / "hf", _name_or_path=name)
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out").stdout
    assert len(said.splitlines()) == 2  # and the self-check's
    assert said.replace("\n", "").isprintable()
    assert len(said) < 1000
    invoke(quantize, tmp_path / "out", "--int8", "--out", tmp_path / "shards")


def test_gigantic_config_beside_a_small_file(tmp_path: Path) -> None:
    """Refused for what the file lacks: nothing of the promised size is allocated."""
    sizes = {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 4096, "vocab_size": 1 << 24}
    write_hf(tmp_path / "hf", **sizes)
    refuse_source(tmp_path, "lacks the tensor model.layers.2.")
    write_hf(tmp_path / "hf", **sizes | {"num_hidden_layers": 2})
    refuse_source(tmp_path, "model.embed_tokens.weight", "[50, 16]", "[16777216, 1048576]")


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    """A file system takes any bytes for a name; a terminal shows them escaped."""
    source, out = (tmp_path / os.fsdecode(name) for name in (b"in\xff", b"out\xff"))
    write_hf(source, _name_or_path=None)
    assert "out\\udcff: in, 2 layers" in invoke(convert, "--source", source, "--out", out).stdout
    assert "shards\\udcff" in invoke(quantize, out, "--int8", "--out", tmp_path / os.fsdecode(b"shards\xff")).stdout
    assert "none\\udcff does not exist" in invoke_error(convert, "--source", tmp_path / os.fsdecode(b"none\xff"))
