"""Notes about what a command did by itself: each once, before its work, and none beside an error."""

from __future__ import annotations

import click
from invoke import invoke

from converters.console.errors import InputError
from converters.console.notes import note
from converters.console.progress import progress


@click.command()
@click.option("--fails", is_flag=True)
@click.option("--works", is_flag=True)
def command(fails: bool, works: bool) -> None:
    note("a tensor\nwas dropped")
    note("a tensor was dropped")
    note("an id was guessed")
    if works:
        with progress("Working", 1):
            click.echo("work", err=True)
    if fails:
        raise InputError("The file is damaged.")


def test_notes_come_once_each_at_the_end_or_before_the_work() -> None:
    said = "Note: a tensor was dropped\nNote: an id was guessed\n"
    assert invoke(command).stderr == said
    assert invoke(command, "--works").stderr == said + "work\n"


def test_refused_input_gives_its_one_line_alone() -> None:
    assert invoke(command, "--fails", exit_code=2).stderr == "Error: The file is damaged.\n"
