"""Tokens to evaluate over or to calibrate on, from files of text or of token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.console.units import plural
from runtime.run.text import TextCodec

SUFFIXES = (".txt", ".json", ".npy")


@dataclass(frozen=True)
class TokenFiles:
    """Files of tokens as a command was given them, by an ``option`` like --text, of which ``count_option`` says how
    many tokens are wanted. ``wanted`` is said to who gives none.
    """

    paths: Sequence[Path]
    option: str
    count_option: str
    wanted: str

    def check(self) -> None:
        """Raise InputError where there is none, or one is no file of a known kind."""
        if not self.paths:
            raise InputError(self.wanted)
        for path in self.paths:
            if path.suffix not in SUFFIXES:
                raise InputError(
                    f"{self.option} {path}: give text as .txt, or token ids as .json (a list) or .npy (one dimension)."
                )
            if not path.is_file():
                raise InputError(f"{self.option} {path} is no file. Check the path.")

    def read(self, count: int, codec: TextCodec | None, vocab_size: int, model: Path, after: int = 0) -> list[int]:
        """The first ``count`` token ids, one file after the other; fewer, with a note, where they hold fewer.

        Up to so many that come ``after`` them are returned as well, where there are some.
        ``codec`` is the tokenizer of ``model``, if it has one. Raises InputError for a file that can't be read, and for
        ids outside the vocabulary.
        """
        tokens: list[int] = []
        for path in self.paths:
            if len(tokens) >= count + after:
                note(f"{path} is not reached: the files before it hold the {count} tokens of {self.count_option}.")
                continue
            found = _read(path, codec, model)
            _check_ids(path, found, vocab_size)
            tokens += found[: count + after - len(tokens)]
        if len(tokens) < count:
            found = plural(len(tokens), "token")
            note(f"The text holds {found}, fewer than the {count} of {self.count_option}: all are taken.")
        return tokens


def _read(path: Path, codec: TextCodec | None, model: Path) -> list[int]:
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix == ".npy":
        return _from_npy(path)
    if codec is None:
        raise InputError(f"{model} has no tokenizer.json to read {path} with; give token ids, as a .json or .npy file.")
    try:
        return codec.tokens(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8. Convert it, for example with: iconv -f LATIN1 -t UTF-8.") from None


def _from_json(path: Path) -> list[int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no JSON; give a list of token ids like [1,2,3].") from None
    if not isinstance(found, list):
        raise InputError(f"{path} holds {shown(found)}; give a list of token ids like [1,2,3].")
    for each in found:
        if type(each) is not int:
            raise InputError(f"{path} holds {shown(each)} in its list; token ids are whole numbers.")
    return found


def _from_npy(path: Path) -> list[int]:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise InputError(f"{path} is no file that numpy.save wrote; give one, of integers in one dimension.") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "several arrays"
        raise InputError(f"{path} holds {what}; give token ids as integers in one dimension.")
    return found.tolist()


def _check_ids(path: Path, ids: Sequence[int], vocab_size: int) -> None:
    beyond = next((token for token in ids if not 0 <= token < vocab_size), None)
    if beyond is not None:
        raise InputError(
            f"{path} holds the token {shown(beyond)}, and the model's are 0 to {vocab_size - 1}. Give text for its "
            "own tokenizer, or ids of that."
        )
