"""Files damaged at random, in every place where a command reads one: it does its work or refuses in one line."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import click
import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invoke import error_line, invoke, run_command
from meta_format import write_meta
from models import SMALL, make_model, make_opt, random_tensors, renew, snapshot, write_hf
from mutate import Mutation, damage_bytes, damage_header, damage_json
from tokenizer_models import tiktoken_file, train_byte_level, train_sentencepiece

from converters.cli import command as convert
from converters.model.families.llama import GGUF
from converters.model.rope import Llama3Scaling, scaling_to_hf
from converters.sources.random_init import FILE_NAME as SEED
from quantize.cli import command as quantize
from runtime.cli import command as run

SECONDS = 10  # far more than any case takes; a command that takes longer counts as hanging
INDEX = "model.safetensors.index.json"
Arguments = Callable[[Path, Path], tuple[object, ...]]  # (input, output) -> the command's arguments


class Command(NamedTuple):
    command: click.Command
    arguments: Arguments


CONVERT = Command(convert, lambda source, out: ("--source", source, "--out", out, "--max-shard-size", "4KB"))
QUANTIZE = Command(quantize, lambda source, out: (source, "--int8", "--chips", 3, "--out", out, "--verify"))
VERIFY = Command(quantize, lambda source, out: ("--verify", "--out", source))
RUN = Command(run, lambda source, out: ("--shards", source, "--backend", "eager", *RUN_SIZES))
ROPE_SCALING = Llama3Scaling(8.0, 1.0, 4.0, 64)
RUN_SIZES = ("--prompt", "some text", "--max-new-tokens", 1, "--max-seq-len", 16, "--buckets", 8)


class Target(NamedTuple):
    """A file of one of the inputs below, how it is damaged, and the commands that read it."""

    folder: str
    file: str
    damage: Mutation
    commands: tuple[Command, ...]
    recorded: bool = False  # the manifest is made to agree with the damage, so that it is not found by that alone


SMALL_FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
TARGETS = (
    Target("hf", "model.safetensors", damage_header, (CONVERT,)),
    Target("hf", "model.safetensors", damage_bytes, (CONVERT,)),
    Target("hf", "config.json", damage_json, (CONVERT,)),
    Target("indexed", INDEX, damage_json, (CONVERT,)),
    Target("indexed", "model-00002-of-00003.safetensors", damage_header, (CONVERT,)),
    Target("bin", "pytorch_model.bin", damage_bytes, (CONVERT,)),
    Target("bin", "config.json", damage_json, (CONVERT,)),
    Target("gguf", "m.gguf", damage_bytes, (CONVERT,)),
    Target("gguf-parts", "m-00002-of-00003.gguf", damage_bytes, (CONVERT,)),
    Target("meta", "params.json", damage_json, (CONVERT,)),
    Target("meta", "consolidated.01.pth", damage_bytes, (CONVERT,)),
    Target("opt", "config.json", damage_json, (CONVERT,)),
    *(Target("opt", name, damage_json, (CONVERT,)) for name in SMALL_FILES),
    Target("opt", "vocab.json", damage_json, (CONVERT,)),
    Target("opt", "merges.txt", damage_bytes, (CONVERT,)),
    *(Target(name, "tokenizer.model", damage_bytes, (CONVERT,)) for name in ("bpe", "unigram", "tiktoken")),
    Target("checkpoint", "config.json", damage_json, (QUANTIZE,)),
    Target("checkpoint", INDEX, damage_json, (QUANTIZE,)),
    Target("seed", "config.json", damage_json, (QUANTIZE,)),
    Target("seed", SEED, damage_json, (QUANTIZE,)),
    Target("shards", "shards.json", damage_json, (VERIFY, QUANTIZE, RUN)),
    Target("shards", "config.json", damage_json, (VERIFY, QUANTIZE, RUN)),
    Target("shards", "chip-01-of-02.safetensors", damage_header, (VERIFY, QUANTIZE, RUN)),
    Target("shards", "chip-01-of-02.safetensors", damage_bytes, (VERIFY, QUANTIZE, RUN)),
    Target("shards", "chip-00-of-02.safetensors", damage_header, (VERIFY, QUANTIZE, RUN), recorded=True),
    Target("shards", "chip-00-of-02.safetensors", damage_bytes, (VERIFY, QUANTIZE, RUN), recorded=True),
)
NAMES = [f"{target.folder}-{target.file}-{target.damage.__name__[7:]}" for target in TARGETS]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model in every form that a command reads."""
    root = tmp_path_factory.mktemp("inputs")
    write_hf(root / "hf")
    write_hf(root / "indexed", files=3)
    write_hf(root / "bin", model_type="mistral", sliding_window=None, rope_scaling=scaling_to_hf(ROPE_SCALING))
    (root / "bin" / "model.safetensors").unlink()
    torch.save(random_tensors(), root / "bin" / "pytorch_model.bin")
    for name, per_part in (("gguf", 0), ("gguf-parts", 8)):
        (root / name).mkdir()
        write_gguf(root / name / "m.gguf", per_part)
    write_meta(root / "meta", make_model(root / "same", hidden=16, ffn=44, vocab=50))
    make_opt(root / "opt", hidden=16, ffn=24, vocab=300)
    write_gpt2(root / "opt")
    larger = replace(SMALL, vocab_size=600)
    for name, content in tokenizer_models().items():
        (write_hf(root / name, random_tensors(larger), larger) / "tokenizer.model").write_bytes(content)
    invoke(convert, *CONVERT.arguments(root / "indexed", root / "checkpoint"))
    invoke(convert, "--config", root / "hf", "--storage", "seed", "--out", root / "seed")
    write_tokenizer(root / "hf" / "tokenizer.json")
    invoke(quantize, root / "hf", "--int8", "--chips", 2, "--out", root / "shards")
    return root


def write_gguf(path: Path, per_part: int = 0) -> None:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_part)
    writer.add_embedding_length(SMALL.hidden_size)
    writer.add_feed_forward_length(SMALL.intermediate_size)
    writer.add_block_count(SMALL.num_layers)
    writer.add_context_length(SMALL.max_position_embeddings)
    writer.add_head_count(SMALL.num_heads)
    writer.add_head_count_kv(SMALL.num_kv_heads)
    writer.add_layer_norm_rms_eps(SMALL.norm_eps)
    tensors = {name: tensor.float().numpy() for name, tensor in random_tensors().items()}
    for name, hf_name in GGUF.model_names.items():
        writer.add_tensor(name, tensors[hf_name])
    for layer in range(SMALL.num_layers):
        for name, hf_name in GGUF.block_names.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", tensors[f"model.layers.{layer}.{hf_name}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gpt2(directory: Path) -> None:
    """vocab.json, merges.txt and what may stand beside them."""
    tokens, merges = train_byte_level(r"\S+|\s+", 280)
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in merges), "utf-8")
    added = {"280": {"content": "</s>", "special": True}, "281": {"content": "<pad>"}}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "added_tokens_decoder": added}
    contents = (config, {"<mask>": 282, "</s>": 280}, {"bos_token": "</s>", "unk_token": {"content": "</s>"}})
    for name, content in zip(SMALL_FILES, contents, strict=True):
        (directory / name).write_text(json.dumps(content))


def tokenizer_models() -> dict[str, bytes]:
    """tokenizer.model of every kind, small."""
    normalized = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    return {
        "bpe": train_sentencepiece(400),
        "unigram": train_sentencepiece(400, model_type="unigram", **normalized),
        "tiktoken": tiktoken_file(train_byte_level(r"\S+|\s+", 280)[0]),
    }


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {chr(97 + number): number for number in range(26)} | {"s o": 26, "so": 27, "▁": 28, "<unk>": 29}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("s", "o")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(path))


class Hang(BaseException):
    """Not an Exception, so that no command can take it for one of its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(inputs: Path, target: Target, random: Random) -> None:
    """Damage a copy of the input and run the commands on it; success or one line, and no trace of a failure."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        shutil.copytree(inputs / target.folder, source)
        path = source / target.file
        path.write_bytes(target.damage(path.read_bytes(), random))
        if target.recorded:
            renew(source, target.file)
        before = snapshot(source)
        for command, arguments in target.commands:
            given = path if target.folder.startswith("gguf") else source
            with at_most(SECONDS):
                status, result = run_command(command, *arguments(given, out))
            assert snapshot(source) == before
            if status != 0:
                assert status == 2
                # Where the work had begun, its notes have been said.
                lines = [line for line in result.stderr.splitlines(True) if not line.startswith("Note: ")]
                error_line(result._replace(stderr="".join(lines)))
                assert not out.exists()
            elif out.exists():
                left = snapshot(out)
                assert "config.json" in left
                assert not [name for name in left if name.endswith((".partial", ".lock", ".in-progress.json"))]
                shutil.rmtree(out)


def fuzz(examples: int) -> settings:
    """So many examples, the same at every run."""
    unchecked = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=unchecked)


RANDOM = st.randoms(use_true_random=False)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
@fuzz(5)
@given(random=RANDOM)
def test_damaged_file(inputs: Path, target: Target, random: Random) -> None:
    check(inputs, target, random)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
@fuzz(100)
@given(random=RANDOM)
def test_damaged_file_at_length(inputs: Path, target: Target, random: Random) -> None:
    check(inputs, target, random)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_undamaged_file(inputs: Path, target: Target) -> None:
    """Every command takes its input as it was: the refusals above are of the damage."""
    for command, arguments in target.commands:
        source = inputs / target.folder / (target.file if target.folder.startswith("gguf") else "")
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            invoke(command, *arguments(source, Path(folder, "out")))
            assert time.perf_counter() - begin < SECONDS / 2
