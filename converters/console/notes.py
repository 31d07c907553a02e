"""Lines about what a command dropped, guessed or changed by itself: on stderr, each once, and none beside an error.

They wait until the command's work begins, or until its end where it has none to show, so that input that is refused
gives its one line alone.
"""

from __future__ import annotations

import click

_noted: dict[str, bool] = {}  # text -> whether it was printed, in the order of the notes


def note(text: str) -> None:
    """Keep a sentence for ``print_notes``; one that is there already is not repeated."""
    _noted.setdefault(" ".join(text.split()), False)


def print_notes() -> None:
    """Print ``Note: ...`` on stderr for every sentence that hasn't been printed."""
    for text, printed in list(_noted.items()):  # other threads may add some meanwhile
        if not printed:
            click.echo(f"Note: {text}", err=True)
            _noted[text] = True


def forget_notes() -> None:
    """Begin anew, with nothing noted: a process may run several commands."""
    _noted.clear()
