"""The tokens to evaluate over, from files of text or of token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.console.units import plural
from runtime.run.stored_model import StoredModel

SUFFIXES = (".txt", ".json", ".npy")
# What is said to who gives no text.
WANTED = (
    "Give --text: text that the model was not calibrated on, of the kind that it will be used for, of 8,192 tokens or "
    "more (.txt, or token ids as .json or .npy). There is no built-in text."
)


def check_text_paths(paths: Sequence[Path]) -> None:
    """Raise InputError where there is none, or one is no file of a known kind."""
    if not paths:
        raise InputError(WANTED)
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise InputError(
                f"--text {path}: give text as .txt, or token ids as .json (a list) or .npy (one dimension)."
            )
        if not path.is_file():
            raise InputError(f"--text {path} is no file. Check the path.")


def read_tokens(paths: Sequence[Path], model: StoredModel, count: int) -> list[int]:
    """The first ``count`` token ids of these files, one after the other; fewer, with a note, where they hold fewer.

    Raises InputError for a file that can't be read, and for ids outside the vocabulary.
    """
    tokens: list[int] = []
    for path in paths:
        if len(tokens) >= count:
            note(f"{path} is not reached: the files before it hold the {count} tokens of --tokens.")
            continue
        found = _read(path, model)
        _check_ids(path, found, model.config.vocab_size)
        tokens += found[: count - len(tokens)]
    if len(tokens) < count:
        note(f"The text holds {plural(len(tokens), 'token')}, fewer than the {count} of --tokens: all are taken.")
    return tokens


def _read(path: Path, model: StoredModel) -> list[int]:
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix == ".npy":
        return _from_npy(path)
    if model.codec is None:
        raise InputError(
            f"{model.path} has no tokenizer.json to read {path} with; give token ids, as a .json or .npy file."
        )
    try:
        return model.codec.tokens(path.read_text(encoding="utf-8"), str(path))
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
