"""Measurements made after the generation: if one fails, the tokens and the other figures are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from converters.console.errors import is_out_of_memory
from converters.console.notes import note

T = TypeVar("T")
_REASON_LENGTH = 200


class Measurements:
    """Makes measurements one by one, and keeps the reason for each that failed, by name."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self.interrupted = False

    def attempt(self, name: str, measure: Callable[[], T]) -> T | None:
        """What ``measure`` returns; None, with a note, where it fails. Once interrupted, nothing more is measured."""
        if not self.interrupted:
            try:
                return measure()
            except KeyboardInterrupt:
                self.interrupted = True
            except Exception as error:  # from any library: torch, XLA, the operating system
                self._failed(name, reason(error))
                return None
        self._failed(name, "interrupted")
        return None

    def _failed(self, name: str, why: str) -> None:
        self.failures[name] = why
        note(f"Not measured: {name} ({why}). The tokens and the other figures stand.")


def reason(error: BaseException) -> str:
    """Why something failed, short enough for part of a line."""
    if is_out_of_memory(error):
        return "out of memory"
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= _REASON_LENGTH else words[: _REASON_LENGTH - 3] + "..."
