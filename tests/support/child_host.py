"""One of several processes of llama-run that generates again and again, so that a test finds it at work.

Run with a path to write when it begins, then llama-run's arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runtime.cli import main
from runtime.run.generate import Generation, Generator

_REPEATS = 100_000  # for minutes: a test ends it before


def work_on(begun: Path) -> None:
    """Have ``generate`` write ``begun`` after its first time, and go on for minutes."""
    once = Generator.generate

    def generate(self: Generator, *args: Any) -> Generation:
        once(self, *args)
        begun.touch()
        for _ in range(_REPEATS):
            once(self, *args)
        raise AssertionError("no test has ended this process")

    Generator.generate = generate


if __name__ == "__main__":
    work_on(Path(sys.argv.pop(1)))
    main()
