"""A model's auxiliary files: the tokenizer and what else goes with the weights.

llama-run reads tokenizer.json. A tokenizer in another format is converted to one here, and its own files are kept too.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from converters.console.errors import InputError, advising
from converters.console.notes import note
from converters.files.stand_ins import stand_in
from converters.model.config import ModelConfig
from converters.model.end_tokens import GENERATION
from converters.model.families.registry import family_of
from converters.model.rope import Llama3Scaling
from converters.tokenizers.gpt2 import read_gpt2
from converters.tokenizers.reader import LLAMA_KINDS, MODEL, TOKENIZER, note_beyond
from converters.tokenizers.sentencepiece import read_sentencepiece
from converters.tokenizers.settings import CONFIG, Settings, read_settings
from converters.tokenizers.tiktoken import is_tiktoken, read_tiktoken
from converters.tokenizers.tokenizer_json import Vocabulary, add_template, add_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB, MERGES = "vocab.json", "merges.txt"
NAMES = (
    TOKENIZER,
    CONFIG,
    MODEL,
    "special_tokens_map.json",
    "added_tokens.json",
    VOCAB,
    MERGES,
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
# A folder with further templates, by name. Files of other folders are not taken.
TEMPLATES = "additional_chat_templates"
_TEMPLATE = re.compile(r"\w[\w.-]*\.jinja")
_GPT2_KINDS = ("GPT2Tokenizer", "GPT2TokenizerFast")


def read_auxiliary_files(directory: Path) -> dict[str, bytes]:
    """A directory's auxiliary files: file name -> content; a further template's name has its folder before it.

    Raises InputError where a large file is a stand-in for the real one.
    """
    folder = directory / TEMPLATES
    templates = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = (*NAMES, *(f"{TEMPLATES}/{name}" for name in templates if _TEMPLATE.fullmatch(name)))
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    for name in (TOKENIZER, MODEL):  # large enough to be stored with Git LFS
        if what := stand_in(files.get(name, b"")):
            raise InputError(f"{directory / name} is {what}")
    return files


def note_without_tokenizer(files: dict[str, bytes], source: str) -> None:
    """Note where a model's auxiliary files hold no tokenizer for llama-run."""
    if TOKENIZER in files:
        return
    kept = [name for name in (MODEL, VOCAB, MERGES) if name in files]
    why = f"{' and '.join(kept)} alone don't say how text is cut" if kept else "there is none that this tool reads"
    note(f"{source} gives no tokenizer.json ({why}): llama-run takes --prompt-ids with this model, and no --prompt.")


def with_tokenizer(directory: Path, config: ModelConfig, above: bool = False) -> dict[str, bytes]:
    """A directory's auxiliary files, with a tokenizer.json and a tokenizer_config.json made where they are missing.

    They are made from a tokenizer.model (SentencePiece's, or Meta's for LLaMA 3) or from GPT-2's vocab.json and
    merges.txt. With ``above``, a tokenizer.model may also be in the parent folder, as in Meta's downloads. Raises
    InputError for a tokenizer that is damaged, of a kind that is not converted, or not this model's.
    """
    files = read_auxiliary_files(directory)
    place = directory
    if above and not {TOKENIZER, MODEL} & files.keys() and (folder := _folder_above(directory)):
        place = folder
        note(f"{directory} has no {MODEL}: the one of the folder above it, {folder / MODEL}, goes along.")
        files[MODEL] = (folder / MODEL).read_bytes()
    if TOKENIZER in files:
        note_beyond(files[TOKENIZER], str(directory), config.vocab_size)
        return files
    if not (MODEL in files or {VOCAB, MERGES} <= files.keys()):
        return files
    with advising("Correct or replace it, or take it away: without a tokenizer, llama-run takes --prompt-ids."):
        return files | _make(files, directory, place, config)


def _make(files: dict[str, bytes], directory: Path, place: Path, config: ModelConfig) -> dict[str, bytes]:
    """The files made from a tokenizer.model, which is in ``place``, or from GPT-2's files."""
    settings = read_settings(files, str(directory))
    if MODEL in files:
        tokenizer, vocabulary = _read_model(files[MODEL], str(place / MODEL), config, settings)
        bos = "bos" in vocabulary.ids if settings.add_bos is None else settings.add_bos
    elif settings.kind in _GPT2_KINDS or (not settings.kind and family_of(config.architecture).gpt2_vocabulary):
        tokenizer, vocabulary = read_gpt2(files[VOCAB], files[MERGES], str(directory), settings.add_prefix_space)
        bos = bool(settings.add_bos)
    else:
        return {}  # the two files alone don't say how text is split
    vocabulary.check_size(config.vocab_size)
    vocabulary = settings.complete(vocabulary, config.vocab_size)
    add_tokens(tokenizer, vocabulary)
    add_template(tokenizer, vocabulary, bos, bool(settings.add_eos))
    made = {TOKENIZER: tokenizer.to_str().encode()}
    if CONFIG not in files:
        fields = vocabulary.config() | {"model_max_length": config.max_position_embeddings}
        made[CONFIG] = json.dumps(fields, indent=2, ensure_ascii=False).encode()
    return made


def _folder_above(directory: Path) -> Path | None:
    """The parent of a directory, or of what it links to, that holds a tokenizer.model; None without one."""
    folders = (Path(os.path.abspath(directory)).parent, directory.resolve().parent)
    return next((folder for folder in folders if (folder / MODEL).is_file()), None)


def _read_model(content: bytes, where: str, config: ModelConfig, settings: Settings) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer of a tokenizer.model, SentencePiece's or Meta's."""
    if not is_tiktoken(content):
        return read_sentencepiece(content, where, settings.add_prefix_space, _scheme(settings))
    return read_tiktoken(content, where, since_3_1=isinstance(config.rope_scaling, Llama3Scaling))


def _scheme(settings: Settings) -> str:
    """Where a space is put before the pieces of text between added tokens (Normalization.scheme).

    ``legacy`` decides; without it, LLaMA's class in transformers 5 is not legacy, and all others are.
    """
    if settings.kind in LLAMA_KINDS:
        return "always" if settings.legacy else "first"
    return "first" if settings.legacy is False else ""
