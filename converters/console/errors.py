"""Errors that the user can fix: each of these classes ends a command with one line and exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# From torch on the CPU, torch on CUDA and XLA: there is no exception class for this that all devices share.
_NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "RESOURCE_EXHAUSTED")


class InputError(Exception):
    """Something the user gave is wrong. The message says what it is and what to do about it."""


class UnmappedTensor(InputError):
    """A tensor of the source that its name table does not know."""


class UnexpectedTensor(InputError):
    """A tensor of a known kind that this configuration has no place for."""


class MissingTensor(InputError):
    """A tensor that the configuration needs and the source does not hold."""


class DuplicateTensor(InputError):
    """A tensor that the source holds twice."""


class BadTokenizer(InputError):
    """A tokenizer that can't be read. What to do about it depends on its source: see ``advising``."""


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Turn BadTokenizer into InputError, with ``advice`` added to its message."""
    try:
        yield
    except BadTokenizer as error:
        raise InputError(f"{error} {advice}") from None


def shown(value: Any) -> str:
    """A value from a file, cut short for an error line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )
