"""Reading GGUF files: values against transformers and the gguf library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    random_tensors,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.console.errors import InputError
from converters.files.row_blocks import row_blocks
from converters.model.config import ModelConfig
from converters.model.families.hf_config import to_hf
from converters.model.parameters import parameters
from converters.sources.fingerprint import sample_files
from converters.sources.gguf.source import open_gguf
from converters.sources.interleaved_rows import interleaved_rows


def unpermuted(values: np.ndarray, heads: int) -> torch.Tensor:
    """GGUF's rows of Q or K in rotate-half order, by reshaping the whole tensor."""
    rows, columns = values.shape
    view = torch.from_numpy(values.copy()).view(heads, rows // heads // 2, 2, columns)
    return view.transpose(1, 2).reshape(rows, columns)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    assert got.dtype == expected.dtype == torch.float32
    return torch.equal(got.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


def transformers_reading(path: Path, config: ModelConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """transformers' own reading of a GGUF file, its configuration and weights; ``config`` only gives it the names.

    This is what AutoModelForCausalLM.from_pretrained(..., gguf_file=...) calls; that needs the package accelerate too.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**to_hf(config)))
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    return read["config"], read["tensors"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf")


# --- a real model


@pytest.mark.slow
def test_smollm2_is_bit_equal_to_transformers(smollm2_gguf: Path) -> None:
    source = open_gguf(smollm2_gguf)
    theirs, expected = transformers_reading(smollm2_gguf, source.config)
    assert {p.name for p in parameters(source.config)} == set(expected)
    for parameter in parameters(source.config):
        blocks = row_blocks(0, parameter.shape[0], parameter.width)
        got = torch.cat([source.rows(parameter.name, start, stop) for start, stop in blocks])
        assert tuple(got.shape) == parameter.shape
        assert same_bits(got, expected[parameter.name]), parameter.name
    for name in ("model.embed_tokens", *(f"model.layers.7.self_attn.{p}_proj" for p in "qkvo"), "model.norm"):
        whole = expected[f"{name}.weight"]
        for start, stop in ((0, 1), (1, 4), (31, 33), (63, 129), (whole.shape[0] - 3, whole.shape[0])):
            assert same_bits(source.rows(f"{name}.weight", start, stop), whole[start:stop]), (name, start, stop)
    ours = to_hf(source.config)
    shared = {key for key in theirs if key in ours and key != "rms_norm_eps"}
    assert len(shared) >= 11
    ends = ours["eos_token_id"]  # with <|endoftext|>, which no key of the file names
    assert ends == [theirs.pop("eos_token_id"), 0]
    shared.remove("eos_token_id")
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
    assert source.config.norm_eps == 1e-5


# --- small files


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS, 1])
def test_small_file_is_bit_equal_to_transformers(tmp_path: Path, tied: bool, kv_heads: int) -> None:
    path = tmp_path / "model.gguf"
    write(path, random_tensors(Type.Q8_0, tied=tied, kv_heads=kv_heads), {"llama.attention.head_count_kv": kv_heads})
    source = open_gguf(path)
    _, expected = transformers_reading(path, source.config)
    assert source.config.tie_word_embeddings is tied
    assert source.config.num_kv_heads == kv_heads
    assert {p.name for p in parameters(source.config)} == set(expected)
    for name, tensor in expected.items():
        assert same_bits(source.rows(name, 0, tensor.shape[0]), tensor), name


def test_transformers_computes_the_same_from_our_weights_as_before_the_gguf(tmp_path: Path) -> None:
    """A transformers model, its weights put into a GGUF file by llama.cpp's rule, comes back as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
    }
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    renamed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for i in range(LAYERS):
        renamed |= {f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight" for ours, theirs in parts.items()}
    stored = {}
    for name, values in weights.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
        if heads:
            values = values.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        stored[renamed[name]] = (np.ascontiguousarray(values), Type.F32)
    source = open_gguf(write(tmp_path / "model.gguf", stored))
    for name, values in weights.items():
        assert same_bits(source.rows(name, 0, len(values)), torch.from_numpy(values)), name


DEQUANTIZABLE = []
for _kind in Type:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[_kind][1]), np.uint8), _kind)
        DEQUANTIZABLE.append(_kind)
    except NotImplementedError:
        pass


def test_the_usual_types_are_among_those_tested() -> None:
    names = {kind.name for kind in DEQUANTIZABLE}
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"} <= names
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"} <= names


@pytest.mark.parametrize("kind", DEQUANTIZABLE, ids=lambda kind: kind.name)
def test_every_type_in_odd_ranges(tmp_path: Path, kind: Type) -> None:
    tensors = random_tensors(kind, seed=7, layers=1, tied=True)
    source = open_gguf(write(tmp_path / "model.gguf", tensors, {"llama.block_count": 1}))
    cases = {
        "model.layers.0.self_attn.q_proj.weight": ("blk.0.attn_q.weight", HEADS),
        "model.layers.0.self_attn.k_proj.weight": ("blk.0.attn_k.weight", KV_HEADS),
        "model.layers.0.self_attn.v_proj.weight": ("blk.0.attn_v.weight", 0),
        "model.layers.0.mlp.down_proj.weight": ("blk.0.ffn_down.weight", 0),
        "model.embed_tokens.weight": ("token_embd.weight", 0),
    }
    with np.errstate(all="ignore"):  # random bytes make NaN and infinities too
        for name, (stored, heads) in cases.items():
            values = gguf.dequantize(*tensors[stored])
            expected = unpermuted(values, heads) if heads else torch.from_numpy(values.copy())
            for start, stop in ((0, len(expected)), (0, 1), (3, 20), (17, 24), (len(expected) - 5, len(expected))):
                assert same_bits(source.rows(name, start, stop), expected[start:stop]), (name, start, stop)


def test_vectors_in_a_block_type_are_cut_by_element(tmp_path: Path) -> None:
    tensors = random_tensors()
    norm = gguf.quantize(tensors["output_norm.weight"][0], Type.Q8_0)
    tensors["output_norm.weight"] = (norm, Type.Q8_0)
    source = open_gguf(write(tmp_path / "model.gguf", tensors))
    expected = torch.from_numpy(gguf.dequantize(norm, Type.Q8_0))
    assert same_bits(source.rows("model.norm.weight", 5, 77), expected[5:77])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_interleaved_rows_are_the_reshape(heads: int, half: int, data: st.DataObject) -> None:
    rows = heads * 2 * half
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    expected = unpermuted(np.arange(rows)[:, None], heads)[start:stop, 0]
    assert interleaved_rows(start, stop, 2 * half).tolist() == expected.tolist()


def test_rows_are_a_writable_copy(small: Path) -> None:
    before = small.read_bytes()
    rows = open_gguf(small).rows("model.norm.weight", 0, HIDDEN)
    rows.fill_(1.0)
    assert small.read_bytes() == before


# --- the configuration


def test_config_comes_from_the_metadata(small: Path) -> None:
    config = open_gguf(small).config
    assert config.name == "small test"
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (HIDDEN, FFN, LAYERS)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 2, 32, VOCAB)
    assert (config.norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-5, 20000.0, 128)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 5))
    assert (config.dtype, config.tie_word_embeddings) == ("float32", False)
    assert open_gguf(small).auxiliary_files() == {}


def test_head_dim_other_than_hidden_by_heads(tmp_path: Path) -> None:
    change = {"llama.attention.key_length": 32, "llama.attention.value_length": 32, "llama.attention.head_count": 4}
    tensors = random_tensors(heads=4)
    config = open_gguf(write(tmp_path / "model.gguf", tensors, change)).config
    assert (config.num_heads, config.head_dim, config.hidden_size) == (4, 32, 256)


def test_defaults_for_what_a_file_may_leave_out(tmp_path: Path) -> None:
    optional = ("general.name", "llama.rope.freq_base", "llama.rope.dimension_count", "llama.attention.head_count_kv")
    ids = ("bos", "eos", "eot")
    change = dict.fromkeys((*optional, *(f"tokenizer.ggml.{name}_token_id" for name in ids)))
    config = open_gguf(write(tmp_path / "some-model.gguf", random_tensors(kv_heads=HEADS), change)).config
    assert (config.name, config.rope_theta, config.num_kv_heads) == ("some-model", 10000.0, HEADS)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_importing_the_module_is_cheap() -> None:
    code = (
        "import sys, converters.sources.gguf.source; print({'torch', 'numpy', 'gguf', 'tokenizers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"


# --- the fingerprint


def test_fingerprint_follows_header_and_data(small: Path, tmp_path: Path) -> None:
    first = open_gguf(small).fingerprint()
    assert first == open_gguf(small).fingerprint()
    copy = tmp_path / small.name
    copy.write_bytes(small.read_bytes())
    assert open_gguf(copy).fingerprint() == first
    for at in (small.read_bytes().index(b"small test"), -1, small.stat().st_size // 2 & ~4095):
        content = bytearray(small.read_bytes())
        content[at] ^= 1
        copy.write_bytes(content)
        assert open_gguf(copy).fingerprint() != first


def test_sample_files_sees_names_sizes_order_and_sampled_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(bytes(5 << 20))
    two.write_bytes(b"")
    digests = [sample_files([one, two]), sample_files([two, one]), sample_files([one]), sample_files([])]
    one.rename(tmp_path / "other")
    digests.append(sample_files([tmp_path / "other"]))
    for size, changed in (((5 << 20) + 1, None), (5 << 20, 0), (5 << 20, -1), (5 << 20, (5 << 20) * 40 // 64)):
        content = bytearray(size)
        if changed is not None:
            content[changed] = 1
        one.write_bytes(content)
        digests.append(sample_files([one]))
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)
    with pytest.raises(InputError, match="can't be read"):
        sample_files([tmp_path / "absent"])
