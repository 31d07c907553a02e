"""Text to token ids and back, with the tokenizer beside the shards."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from converters.console.errors import InputError, advising, shown
from converters.console.notes import note
from converters.tokenizers.auxiliary_files import read_auxiliary_files
from converters.tokenizers.reader import TOKENIZER, read_tokenizer


class TextCodec:
    """The tokenizer of a model."""

    def __init__(self, files: Mapping[str, bytes], where: Path, vocab_size: int, instead: str = "--prompt-ids") -> None:
        """From the auxiliary files of a model in ``where``; ``instead`` is what may be given without a tokenizer.

        Raises InputError for one that can't be read.
        """
        self._vocab_size = vocab_size
        with advising(f"Put the model's own there, or take it away and give {instead}."):
            self._tokenizer, self._left_out = read_tokenizer(files, str(where), vocab_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the begin token if the model's tokenizer adds one. Raises InputError if there are
        none, if one has no row in the model, and if the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(_not_text(text[error.start])) from None
        ids = self.tokens(text, "The prompt")
        if not ids:
            raise InputError("The prompt holds no token; give some text.")
        beyond = next((i for i in ids if i >= self._vocab_size), None)
        if beyond is not None:
            text = f" ({shown(self.token(beyond))})" if self.token(beyond) else ""
            raise InputError(
                f"The tokenizer gives the prompt token {beyond}{text}, and the model has {self._vocab_size} rows of "
                "embeddings. Give another text, or --prompt-ids."
            )
        return ids

    def tokens(self, text: str, name: str) -> list[int]:
        """Token ids of valid Unicode, with the begin token if the tokenizer adds one: maybe none, and unchecked.

        ``name`` is that of the text in notes.
        """
        for token in self._left_out:
            if token in text:
                note(f"{name} holds {shown(token)}, a token without a row in the model: it is cut as any text.")
        return self._tokenizer.encode(text).ids

    def control_tokens(self) -> dict[int, str]:
        """The texts of control tokens, by id."""
        return {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def token(self, i: int) -> str:
        """A token's text; empty for an id that the tokenizer doesn't know."""
        return self._tokenizer.id_to_token(i) or ""

    def continuation(self, prompt: list[int], ids: list[int]) -> str:
        """The text that ``ids`` add after a prompt's text, without special tokens.

        Decoded alone, they would lose the space before their first word if the tokenizer strips a text's first space.
        """
        before, whole = (self._tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, prompt + ids))
        before = before.rstrip("\ufffd")  # half a character, which ``ids`` complete
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(ids)


def find_codec(directory: Path, vocab_size: int) -> TextCodec | None:
    """The tokenizer in a directory of shards; None for a model without one."""
    return codec_of(read_auxiliary_files(directory), directory, vocab_size)


def codec_of(
    files: Mapping[str, bytes], where: Path, vocab_size: int, instead: str = "--prompt-ids"
) -> TextCodec | None:
    """The tokenizer among the auxiliary files of a model in ``where``, as TextCodec takes them; None without one."""
    return TextCodec(files, where, vocab_size, instead) if TOKENIZER in files else None


def _not_text(surrogate: str) -> str:
    """The message for a prompt with a surrogate, as which Python represents a byte invalid in the locale's encoding."""
    byte = ord(surrogate) - 0xDC00
    found = f"the byte 0x{byte:02X}, which is no character of" if 0x80 <= byte <= 0xFF else "half a character in"
    return (
        f"The prompt is not text: it holds {found} {sys.getfilesystemencoding().upper()}. Convert it, for example "
        "with: iconv -f LATIN1 -t UTF-8."
    )
