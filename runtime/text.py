"""Text to token ids and back, by the tokenizer.json beside the shards."""

from __future__ import annotations

import sys
from pathlib import Path

from converters.errors import InputError


class TextCodec:
    """The tokenizer of a model."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_buffer(path.read_bytes())  # its path need not be text
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # plain Exception for what the library can't read; a panic is not even that
            raise InputError(f"{path} is no tokenizer that can be read ({error}). Fetch it again.") from None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the begin token where the model's tokenizer adds one. Raises InputError for none at all,
        and for text that isn't any.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(_not_text(text[error.start])) from None
        ids = self._tokenizer.encode(text).ids
        if not ids:
            raise InputError("The prompt holds no token; give some text.")
        return ids

    def continuation(self, prompt: list[int], ids: list[int]) -> str:
        """The text that ``ids`` add behind a prompt's, without special tokens.

        Decoded alone they would lose the space before their first word, where a tokenizer strips the text's first.
        """
        before, whole = (self._tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, prompt + ids))
        before = before.rstrip("\ufffd")  # half a character, which the ids complete
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(ids)


def find_codec(directory: Path) -> TextCodec | None:
    """The tokenizer in a directory of shards; None for a model without one."""
    path = directory / "tokenizer.json"
    return TextCodec(path) if path.is_file() else None


def _not_text(surrogate: str) -> str:
    """What is wrong with a prompt that holds a surrogate, as Python has bytes that the locale's encoding lacks."""
    byte = ord(surrogate) - 0xDC00
    found = f"the byte 0x{byte:02X}, which is no character of" if 0x80 <= byte <= 0xFF else "half a character in"
    return (
        f"The prompt is not text: it holds {found} {sys.getfilesystemencoding().upper()}. Convert it, for example "
        "with: iconv -f LATIN1 -t UTF-8."
    )
