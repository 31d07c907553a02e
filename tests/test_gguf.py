"""Reading GGUF files: values against transformers and the gguf library, and every way to refuse a file."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.config import ModelConfig
from converters.errors import DuplicateTensor, InputError, MissingTensor, UnexpectedTensor, UnmappedTensor
from converters.fingerprint import sample_files
from converters.gguf import open_gguf
from converters.interleaved import interleaved_rows
from converters.layout import parameters
from converters.source import row_blocks

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 256, 512, 8, 2, 32, 24, 2
METADATA: dict[str, Any] = {
    "general.name": "small test",
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FFN,
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 20000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": VOCAB,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 5,
}


def shapes(layers: int = LAYERS, tied: bool = False, heads: int = HEADS, kv_heads: int = KV_HEADS) -> dict:
    """GGUF name -> shape in torch's order of axes."""
    block = {
        "attn_norm": (HIDDEN,),
        "attn_q": (heads * HEAD_DIM, HIDDEN),
        "attn_k": (kv_heads * HEAD_DIM, HIDDEN),
        "attn_v": (kv_heads * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, heads * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    named = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    named |= {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    return named if tied else {**named, "output.weight": (VOCAB, HIDDEN)}


def random_tensors(kind: Type = Type.F32, seed: int = 0, **sizes: Any) -> dict[str, tuple[np.ndarray, Type]]:
    """A tensor for each shape: matrices in type ``kind`` (raw), vectors in float32."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(**sizes).items():
        values = (generator.standard_normal(shape) * 0.05).astype(np.float32)
        tensors[name] = (values, Type.F32) if len(shape) == 1 else (raw(values, kind, generator), kind)
    return tensors


def raw(values: np.ndarray, kind: Type, generator: np.random.Generator) -> np.ndarray:
    """Values in a type, or random bytes of that type where the gguf library can't write it."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return generator.integers(0, 256, (values.shape[0], values.shape[1] // block * size), np.uint8)


def write(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, Type]] | None = None,
    change: dict[str, Any] | None = None,
    architecture: str = "llama",
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file of METADATA with ``change`` (None leaves a key out)."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    for key, value in {**METADATA, **(change or {})}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kind = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}[type(value)]
            getattr(writer, kind)(key, value)
    for name, (values, kind) in (random_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
        model = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    return read["config"], read["tensors"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf")


def refused(path: Path, kind: type[InputError], *words: str) -> None:
    """Opening raises exactly this class, in one line that has these words."""
    with pytest.raises(InputError) as caught:
        open_gguf(path)
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message.replace(str(path), "")  # the path holds the test's name


# --- a real model


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
    ours = source.config.to_hf()
    shared = {key for key in theirs if key in ours and key != "rms_norm_eps"}
    assert len(shared) >= 11
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
    assert source.config.rms_norm_eps == 1e-5


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
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-5, 20000.0, 128)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 5))
    assert (config.dtype, config.tie_word_embeddings) == ("float32", False)
    assert open_gguf(small).companions() == {}


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
    code = "import sys, converters.gguf; print({'torch', 'numpy', 'gguf', 'tokenizers'} & set(sys.modules))"
    root = Path(__file__).parent.parent
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


# --- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, ["RoPE scaling of type 'yarn'"]),
        ({"llama.rope.scaling.type": "longrope"}, ["RoPE scaling of type 'longrope'"]),
        ({"llama.rope.scaling.type": 2}, ["rope.scaling.type", "a text"]),
        ({"llama.rope.scaling.factor": 0.25}, ["RoPE scaling has factor 0.25"]),
        ({"llama.rope.scaling.factor": float("nan")}, ["RoPE scaling has factor nan"]),
        ({"llama.rope.scale_linear": "4"}, ["rope.scale_linear", "a number"]),
        ({"llama.expert_count": 8}, ["mixture of experts"]),
        ({"llama.attention.sliding_window": 127}, ["a sliding window of 127 tokens", "128 positions"]),
        ({"llama.attention.causal": False}, ["later tokens"]),
        ({"llama.logit_scale": 0.5}, ["scaled logits"]),
        ({"llama.rope.dimension_count": 16}, ["rope.dimension_count 16", "heads of 32"]),
        ({"llama.attention.value_length": 16}, ["value_length 16"]),
        ({"llama.block_count": None}, ["lacks the metadata key llama.block_count"]),
        ({"llama.feed_forward_length": [512, 512]}, ["[512, 512]", "feed_forward_length", "whole number"]),
        ({"llama.attention.head_count": "eight"}, ["'eight'", "head_count"]),
        ({"llama.attention.head_count": 0}, ["0 attention heads"]),
        ({"llama.context_length": 7.5}, ["7.5", "context_length"]),
        ({"llama.rope.freq_base": "big"}, ["freq_base", "a number"]),
        ({"tokenizer.ggml.eos_token_id": VOCAB}, ["eos_token_id", str(VOCAB)]),
        ({"tokenizer.ggml.model": "bert"}, ["'bert'", "'gpt2' and 'llama'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_that_is_refused(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    refused(write(tmp_path / "model.gguf", change=change), InputError, *words)


def test_values_that_leave_a_feature_off(tmp_path: Path) -> None:
    change = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "split.count": 1, "llama.logit_scale": 1.0}
    change |= {"llama.rope.scaling.factor": 4.0, "llama.attention.sliding_window": 128}
    assert open_gguf(write(tmp_path / "model.gguf", change=change)).config.num_layers == LAYERS


def test_impossible_sizes_are_refused_by_the_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_layers is 0"):
        open_gguf(write(tmp_path / "model.gguf", change={"llama.block_count": 0}))
    with pytest.raises(InputError, match=r"rope_theta is 0\.0"):
        open_gguf(write(tmp_path / "model.gguf", change={"llama.rope.freq_base": 0.0}))


@pytest.mark.parametrize("architecture", ["qwen2", "llama4", "gpt2"])
def test_another_architecture(tmp_path: Path, architecture: str) -> None:
    refused(write(tmp_path / "model.gguf", architecture=architecture), InputError, f"'{architecture}'", "'llama'")


def test_big_endian(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", endian=gguf.GGUFEndian.BIG)
    refused(path, InputError, "big-endian", "gguf-convert-endian")


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.bias",
        "blk.00.attn_q.weight",
        "blk.0.attn_q.weight2",
        "xblk.0.attn_q.weight",
        "blk.٣.attn_q.weight",
        "blk.0.attn_rot.weight",
        "line\nbreak",
    ],
)
def test_unmapped_tensor(tmp_path: Path, name: str) -> None:
    tensors = random_tensors() | {name: (np.ones((32, 32), np.float32), Type.F32)}
    refused(write(tmp_path / "model.gguf", tensors), UnmappedTensor, repr(name))


def test_unexpected_tensor(tmp_path: Path) -> None:
    refused(write(tmp_path / "model.gguf", random_tensors(layers=3)), UnexpectedTensor, "model.layers.2.")


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight", "token_embd.weight"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    tensors = random_tensors()
    del tensors[name]
    word = {"blk": "model.layers.1.mlp.up_proj.weight", "output_norm": "model.norm.weight"}
    refused(write(tmp_path / "model.gguf", tensors), MissingTensor, word.get(name.split(".")[0], name))


def test_duplicate_tensor(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"))
    refused(path, DuplicateTensor, "'blk.0.attn_v.weight'")


@pytest.mark.parametrize("shape", [(KV_HEADS * HEAD_DIM, HIDDEN + 32), (HIDDEN, KV_HEADS * HEAD_DIM), (HIDDEN,)])
def test_shape_that_contradicts_the_metadata(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = random_tensors() | {"blk.1.attn_k.weight": (np.zeros(shape, np.float32), Type.F32)}
    path = write(tmp_path / "model.gguf", tensors)
    refused(path, InputError, "blk.1.attn_k.weight", str(list(shape)), str([KV_HEADS * HEAD_DIM, HIDDEN]))


@pytest.mark.parametrize("kind", [Type.I8, Type.F64, Type.Q8_1])
def test_type_that_cannot_be_dequantized(tmp_path: Path, kind: Type) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    dtypes = {Type.I8: np.int8, Type.F64: np.float64}
    values = np.zeros((FFN, HIDDEN // block * (size if kind not in dtypes else 1)), dtypes.get(kind, np.uint8))
    tensors = random_tensors() | {"blk.0.ffn_up.weight": (values, kind)}
    refused(write(tmp_path / "model.gguf", tensors), InputError, "blk.0.ffn_up.weight", kind.name)


def test_unknown_type(small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    assert content[at] == Type.F32
    content[at] = 250
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(path, InputError, "output_norm.weight", "type 250")


# --- files that are no GGUF, or damaged


def test_not_a_gguf_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent.gguf", InputError, "does not exist")
    refused(tmp_path, InputError, "can't be read")
    path = tmp_path / "model.gguf"
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        refused(path, InputError, "is not a GGUF file")
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    refused(path, InputError, "version 1")


def test_truncation_at_many_offsets(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    path = tmp_path / "model.gguf"
    header = content.index(b"blk.1.ffn_down.weight")
    for end in [*range(4, header, 41), *range(header, len(content), len(content) // 50), len(content) - 1]:
        path.write_bytes(content[:end])
        refused(path, InputError, "not a readable GGUF file", "it ends", "fetch it again")


def counts_at(content: bytes) -> dict[str, int]:
    """Where the header keeps its counts and lengths."""
    name = content.index(b"general.name")
    tensor = content.index(b"token_embd.weight")
    return {
        "tensors": 8,
        "pairs": 16,
        "key length": name - 8,
        "text length": name + len("general.name") + 4,
        "array length": content.index(b"test.array") + len("test.array") + 4 + 4,
        "tensor name length": tensor - 8,
        "dimension": tensor + len("token_embd.weight") + 4,
        "offset": content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4,
    }


@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 2**40, 1 << 20, 1 << 33])
@pytest.mark.parametrize("array", [[1, 2, 3], [True], ["a", "b"], [1.5]], ids=["int", "bool", "text", "float"])
def test_absurd_counts_are_refused_at_once(tmp_path: Path, value: int, array: list[Any]) -> None:
    tensors = random_tensors(layers=1, tied=True)
    path = write(tmp_path / "model.gguf", tensors, {"llama.block_count": 1, "test.array": array})
    content = path.read_bytes()
    for at in counts_at(content).values():
        path.write_bytes(content[:at] + value.to_bytes(8, "little") + content[at + 8 :])
        began = time.monotonic()
        refused(path, InputError, "not a readable GGUF file")
        assert time.monotonic() - began < 5


def test_more_axes_than_the_format_has(small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    content[content.index(b"output_norm.weight") + len("output_norm.weight") + 3] = 0x7F
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(path, InputError, "has 2130706433 axes")


@pytest.mark.parametrize(
    ("value", "count", "size", "words"),
    [
        ("array of bytes", 1 << 30, 4 << 30, "holds more than"),
        ("array of texts", 1 << 30, 16 << 30, "holds more than"),
        ("text", 1 << 30, 4 << 30, "takes more than 256 MiB"),
    ],
)
def test_counts_that_a_large_file_could_hold(tmp_path: Path, value: str, count: int, size: int, words: str) -> None:
    """A file with room for its header's claims, though without data: it would take minutes and all memory to read."""
    kinds = {"array of bytes": (9, 0), "array of texts": (9, 8), "text": (8,)}
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 3) + b"key"
    path = tmp_path / "model.gguf"
    path.write_bytes(header + b"".join(struct.pack("<I", kind) for kind in kinds[value]) + struct.pack("<Q", count))
    os.truncate(path, size)  # a hole: it takes no room on the disk
    began = time.monotonic()
    refused(path, InputError, "not a readable GGUF file", words)
    assert time.monotonic() - began < 5


def test_damage_to_texts(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = small.read_bytes()
    for old, new, words in (
        (b"general.name", b"general.nam\xff", ["not a readable GGUF file", "UTF-8"]),
        (b"small test", b"small \xff\xfest", ["not a readable GGUF file", "utf-8"]),
        (b"llama.rope.freq_base", b"llama.context_length", ["not a readable GGUF file", "Duplicate"]),
        (b"llama.context_length", b"llama.context_lengtH", ["lacks the metadata key llama.context_length"]),
    ):
        assert len(old) == len(new)
        path.write_bytes(content.replace(old, new))
        refused(path, InputError, *words)


@pytest.mark.parametrize(
    "error",
    [ValueError("a\nb"), KeyError("key"), IndexError(), OverflowError("big"), MemoryError(), RecursionError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_the_library_raises_is_one_line(
    small: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(gguf, "GGUFReader", fail)
    refused(small, InputError, "not a readable GGUF file", "fetch it again")


def open_or_refuse(path: Path) -> str:
    """What opening and reading says: nothing, or the message of the InputError; any other exception escapes."""
    try:
        source = open_gguf(path)
        for parameter in parameters(source.config):
            source.rows(parameter.name, 0, 1)
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """A file whose header is most of it, tokenizer included, and a path to write damaged copies to."""
    folder = tmp_path_factory.mktemp("fragile")
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(VOCAB - 3))]
    change = {
        "llama.block_count": 1,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1.0] * VOCAB,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (VOCAB - 3),
    }
    path = write(folder / "whole.gguf", random_tensors(Type.Q4_0, layers=1, tied=True), change)
    return path.read_bytes(), folder / "damaged.gguf"


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
FLIPS = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4)


def damage(fragile: tuple[bytes, Path], flips: list[tuple[int, int]], end: int | None) -> None:
    content, path = fragile
    changed = bytearray(content)
    for at, value in flips:
        changed[at] = value
    path.write_bytes(changed[:end])
    assert "\n" not in open_or_refuse(path)


@settings(max_examples=150, **FUZZ)
@given(flips=FLIPS, end=st.one_of(st.none(), st.none(), st.integers(4, 4000)))
def test_changed_bytes_are_refused_or_harmless(fragile: Any, flips: list, end: int | None) -> None:
    damage(fragile, flips, end)


@pytest.mark.slow
@settings(max_examples=1000, **FUZZ)
@given(flips=FLIPS, end=st.one_of(st.none(), st.none(), st.integers(4, 4000)))
def test_changed_bytes_are_refused_or_harmless_at_length(fragile: Any, flips: list, end: int | None) -> None:
    damage(fragile, flips, end)


@pytest.mark.slow
def test_every_byte_of_the_header_changed(fragile: Any) -> None:
    content, _ = fragile
    header = content.index(b"blk.0.attn_v.weight") + 60
    for at in range(4, header):
        for mask in (0x01, 0x80):
            damage(fragile, [(at, content[at] ^ mask)], None)
