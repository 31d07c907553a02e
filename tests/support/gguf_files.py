"""Small GGUF files for tests, written by the gguf library, and the refusal of a damaged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from converters.console.errors import InputError
from converters.sources.gguf.source import open_gguf

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


def finish(writer: gguf.GGUFWriter, tensors: dict[str, tuple[np.ndarray, Type]] | None) -> None:
    """Add the tensors (random ones for None) and write the file."""
    for name, (values, kind) in (random_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    finish(writer, tensors)
    return path


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
