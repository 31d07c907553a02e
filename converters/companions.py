"""The files that go with a model's weights, the tokenizer first of all: as they are, and as a tokenizer.json.

llama-run reads tokenizer.json. Where a directory has another form of tokenizer, that becomes one here; what it was
made from goes along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from converters.architecture import OPT
from converters.config import ModelConfig
from converters.gpt2_files import read_gpt2
from converters.rope import Llama3Scaling
from converters.sentencepiece_model import read_sentencepiece
from converters.tiktoken_model import is_tiktoken, read_tiktoken
from converters.tokenizer_json import Vocabulary, add_template, add_tokens
from converters.tokenizer_reader import TOKENIZER
from converters.tokenizer_settings import CONFIG, Settings, read_settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL, VOCAB, MERGES = "tokenizer.model", "vocab.json", "merges.txt"
COMPANIONS = (
    TOKENIZER,
    CONFIG,
    MODEL,
    "special_tokens_map.json",
    "added_tokens.json",
    VOCAB,
    MERGES,
    "chat_template.jinja",
    "generation_config.json",
)
_LLAMA_KINDS = ("LlamaTokenizer", "LlamaTokenizerFast")
_GPT2_KINDS = ("GPT2Tokenizer", "GPT2TokenizerFast")


def read_companions(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files and the like in a directory: file name -> content."""
    present = (directory / name for name in COMPANIONS)
    return {path.name: path.read_bytes() for path in present if path.is_file()}


def with_tokenizer(directory: Path, config: ModelConfig) -> dict[str, bytes]:
    """The files of ``read_companions``, with a tokenizer.json and a tokenizer_config.json where there were none.

    They are made of a tokenizer.model (SentencePiece's, or LLaMA 3's of Meta) or of GPT-2's vocab.json and merges.txt.
    Raises InputError for a tokenizer that is damaged, of a kind that is not converted, or not this model's.
    """
    files = read_companions(directory)
    if TOKENIZER in files or not (MODEL in files or {VOCAB, MERGES} <= files.keys()):
        return files
    settings = read_settings(files, str(directory))
    if MODEL in files:
        tokenizer, vocabulary = _read_model(files[MODEL], str(directory / MODEL), config, settings)
        bos = "bos" in vocabulary.ids if settings.add_bos is None else settings.add_bos
    elif settings.kind in _GPT2_KINDS or (not settings.kind and config.architecture.model_type == OPT.model_type):
        tokenizer, vocabulary = read_gpt2(files[VOCAB], files[MERGES], str(directory), settings.add_prefix_space)
        bos = bool(settings.add_bos)
    else:
        return files  # the two files alone don't say how text is cut
    vocabulary.check_size(config.vocab_size)
    vocabulary = settings.complete(vocabulary, config.vocab_size)
    add_tokens(tokenizer, vocabulary)
    add_template(tokenizer, vocabulary, bos, bool(settings.add_eos))
    made = {TOKENIZER: tokenizer.to_str().encode()}
    if CONFIG not in files:
        fields = vocabulary.config() | {"model_max_length": config.max_position_embeddings}
        made[CONFIG] = json.dumps(fields, indent=2, ensure_ascii=False).encode()
    return files | made


def _read_model(content: bytes, where: str, config: ModelConfig, settings: Settings) -> tuple[Tokenizer, Vocabulary]:
    """A tokenizer.model, whichever of the two it is."""
    if not is_tiktoken(content):
        return read_sentencepiece(content, where, settings.add_prefix_space, _scheme(settings))
    return read_tiktoken(content, where, since_3_1=isinstance(config.rope_scaling, Llama3Scaling))


def _scheme(settings: Settings) -> str:
    """How a space comes before the stretches between added tokens (Normalization.scheme).

    ``legacy`` says it; where it isn't said, LLaMA's class in transformers 5 is not legacy, and all others are.
    """
    if settings.kind in _LLAMA_KINDS:
        return "always" if settings.legacy else "first"
    return "first" if settings.legacy is False else ""
