"""Lines about what a command dropped, guessed or changed by itself: on stderr, each once."""

from __future__ import annotations

from functools import cache

import click


@cache
def note(text: str) -> None:
    """Print ``Note: text`` on stderr; a text that was printed already is not repeated."""
    click.echo("Note: " + " ".join(text.split()), err=True)
