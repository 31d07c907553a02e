"""Every way to refuse a GGUF file: what it asks for, names and shapes, and any damage."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import (
    FFN,
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    random_tensors,
    refused,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.console.errors import DuplicateTensor, InputError, MissingTensor, UnexpectedTensor, UnmappedTensor
from converters.model.parameters import parameters
from converters.sources.gguf.source import open_gguf


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf")


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
        ({"tokenizer.ggml.eos_token_id": 2.0}, ["eos_token_id", "whole number"]),
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
