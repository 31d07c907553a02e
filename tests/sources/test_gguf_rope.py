"""RoPE scaling in GGUF files: by a factor, and LLaMA 3.1's as the table that llama.cpp's converter writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import HEAD_DIM, random_tensors, refused, write
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from converters.console.errors import InputError
from converters.model.rope import LinearScaling, Llama3Scaling, RopeScaling, inverse_frequencies
from converters.sources.gguf.source import open_gguf

THETA = 500000.0
TABLE = "rope_freqs.weight"


def llama3_config(theta: float = THETA, factor: float = 8.0, low: float = 1.0, positions: int = 8192) -> LlamaConfig:
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": 4.0,
        "original_max_position_embeddings": positions, "rope_theta": theta,
    }  # fmt: skip
    return LlamaConfig(hidden_size=256, num_attention_heads=8, rope_parameters=scaling)


def table_of(config: LlamaConfig) -> np.ndarray:
    """What each unscaled frequency is divided by: the form in which llama.cpp keeps the rule."""
    plain = LlamaConfig(
        hidden_size=256, num_attention_heads=8, rope_theta=config.rope_parameters["rope_theta"]
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (LlamaRotaryEmbedding(plain).inv_freq / scaled).numpy()


def write_table(path: Path, table: np.ndarray, kind: Type = Type.F32, **change: Any) -> Path:
    metadata = {"llama.rope.freq_base": THETA} | {f"llama.rope.{key}": value for key, value in change.items()}
    return write(path / "model.gguf", random_tensors() | {TABLE: (table, kind)}, metadata)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_table_of_llama_3(factor: float, theta: float, tmp_path: Path) -> None:
    """LLaMA 3.1 and 3.2: the rule's parameters come back, and give the frequencies of transformers."""
    theirs = llama3_config(theta, factor)
    config = open_gguf(write_table(tmp_path, table_of(theirs), freq_base=theta)).config
    assert config.rope_scaling == Llama3Scaling(factor, 1.0, 4.0, 8192)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    got = torch.tensor(inverse_frequencies(config), dtype=torch.float64)
    torch.testing.assert_close(got, expected.double(), rtol=1e-6, atol=0)


def test_table_of_ones_is_no_scaling(tmp_path: Path) -> None:
    assert open_gguf(write_table(tmp_path, np.ones(HEAD_DIM // 2, np.float32))).config.rope_scaling is None


@pytest.mark.parametrize(
    "other", [llama3_config(positions=4096), llama3_config(low=2.0), llama3_config(theta=20000.0)], ids=str
)
def test_table_of_another_rule(other: LlamaConfig, tmp_path: Path) -> None:
    refused(write_table(tmp_path, table_of(other)), InputError, TABLE, "not LLaMA 3.1's")


@pytest.mark.parametrize("pair", [0, 7, 9, 15])
def test_table_with_one_value_changed(pair: int, tmp_path: Path) -> None:
    table = table_of(llama3_config())
    table[pair] *= 1.01
    refused(write_table(tmp_path, table), InputError, TABLE, "not LLaMA 3.1's")


@pytest.mark.parametrize(
    ("table", "kind", "says"),
    [
        (np.ones(8, np.float32), Type.F32, "shape [8]"),
        (np.ones((16, 32), np.float32), Type.F32, "shape [16, 32]"),
        (np.ones(16, np.float16), Type.F16, "type F16"),
        (np.zeros(16, np.float32), Type.F32, "below 1"),
        (np.full(16, np.nan, np.float32), Type.F32, "below 1"),
        (np.full(16, np.inf, np.float32), Type.F32, "below 1"),
        (np.full(16, 3e38, np.float32), Type.F32, "RoPE scaling has factor"),
    ],
    ids=str,
)
def test_table_that_is_none(table: np.ndarray, kind: Type, says: str, tmp_path: Path) -> None:
    refused(write_table(tmp_path, table, kind), InputError, says)


@pytest.mark.parametrize("name", ["rope_factors_long.weight", "rope_factors_short.weight"])
def test_tables_of_longrope(name: str, tmp_path: Path) -> None:
    tensors = random_tensors() | {name: (np.ones(16, np.float32), Type.F32)}
    refused(write(tmp_path / "model.gguf", tensors), InputError, "'longrope'", name)


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, LinearScaling(4.0)),
        ({"scaling.factor": 4.0}, LinearScaling(4.0)),  # llama.cpp takes linear for the type that isn't there
        ({"scale_linear": 2.5}, LinearScaling(2.5)),  # the key's older name
        ({"scaling.type": "linear"}, None),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.factor": 0.0}, None),
    ],
    ids=str,
)
def test_scaling_by_a_factor(change: dict[str, Any], scaling: RopeScaling | None, tmp_path: Path) -> None:
    metadata = {f"llama.rope.{key}": value for key, value in change.items()}
    assert open_gguf(write(tmp_path / "model.gguf", change=metadata)).config.rope_scaling == scaling


def test_factor_and_table_at_once(tmp_path: Path) -> None:
    path = write_table(tmp_path, table_of(llama3_config()), **{"scaling.factor": 2.0})
    refused(path, InputError, "at once")
