"""Notes on stderr about what a command dropped, guessed or changed by itself; each is printed once.

They are held back until the command's work begins, or ends if it shows no progress, so that refused input gives its
one error line alone.
"""

from __future__ import annotations

import click

_noted: dict[str, bool] = {}  # text -> whether it was printed, in the order of the notes


def note(text: str) -> None:
    """Keep a sentence for ``print_notes``; the same sentence is kept only once."""
    _noted.setdefault(" ".join(text.split()), False)


def print_notes() -> None:
    """Print ``Note: ...`` on stderr for every sentence that hasn't been printed."""
    for text, printed in list(_noted.items()):  # a copy: other threads may add notes meanwhile
        if not printed:
            click.echo(f"Note: {text}", err=True)
            _noted[text] = True


def forget_notes() -> None:
    """Forget all notes: a process may run several commands."""
    _noted.clear()
