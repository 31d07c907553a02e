"""A model in a directory of shards: its configuration, tokenizer and end tokens, without a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from converters.model.config import ModelConfig
from converters.model.end_tokens import all_ends
from converters.tokenizers.auxiliary_files import read_auxiliary_files
from quantize.shards.reading import Shards
from runtime.run.text import TextCodec, find_codec


@dataclass(frozen=True)
class StoredModel:
    """What is known before any tensor is read. ``config`` has the end tokens from all files."""

    path: Path
    shards: Shards
    config: ModelConfig  # cut to the number of layers asked for
    codec: TextCodec | None  # None where there is no tokenizer.json
    stated_ends: tuple[int, ...]  # the end tokens of config.json alone

    def further_ends(self) -> str | None:
        """Ids and texts of all end tokens; None where config.json has them all."""
        if not set(self.config.eos_token_ids) - set(self.stated_ends):
            return None
        texts = ((i, self.codec.token(i) if self.codec else "") for i in self.config.eos_token_ids)
        return ", ".join(f"{i} {text}".rstrip() for i, text in texts)


def open_model(path: Path, max_seq_len: int, layers: int | None = None) -> StoredModel:
    """Read the files beside the weights in ``path``, a directory that llama-quantize wrote.

    Raises InputError for a directory without shards, for more ``layers`` than it has, for a context of ``max_seq_len``
    tokens for which the model has no positions, and for a tokenizer that can't be read.
    """
    shards = Shards(path)
    config = shards.config.cut(layers)
    config.check_context(max_seq_len)
    codec = find_codec(path, config.vocab_size)
    control = codec.control_tokens() if codec else {}
    ends = all_ends(config.eos_token_ids, read_auxiliary_files(path), control, str(path))
    return StoredModel(path, shards, replace(config, eos_token_ids=ends), codec, config.eos_token_ids)
