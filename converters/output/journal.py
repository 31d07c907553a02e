"""How much of an unfinished output is known to be on the disk, so that a rerun continues there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.files.file_system import sync_file
from converters.files.json_file import read_json
from converters.files.whole import partial_path, write_json
from converters.formats.tensor_writer import TensorWriter

FILE_NAME = ".journal.json"
SYNC_BYTES = 1 << 30  # at most about this many bytes are written again after a crash


class Journal:
    """The positions up to which unfinished files have been flushed, with the caller's state at that point.

    ``note`` is called at the end of a tensor. Once enough has been written since the last time, a thread flushes the
    files while writing goes on, and then saves the positions.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._noted = 0

    def read(self, files: Sequence[str]) -> tuple[int, Any]:
        """The position in bytes that all of these unfinished files have reached, and the state noted with it.

        (0, None) where that isn't known, or they have reached different positions.
        """
        try:
            record = read_json(self._path)
        except InputError:
            return 0, None
        positions = record.get("positions") if isinstance(record, dict) else None
        if not isinstance(positions, dict) or sorted(positions) != sorted(files) or len(set(positions.values())) != 1:
            return 0, None
        position = next(iter(positions.values()))
        partials = [partial_path(self._path.with_name(name)) for name in files]
        if type(position) is not int or not all(p.is_file() and p.stat().st_size >= position for p in partials):
            return 0, None
        return position, record.get("state")

    def note(self, writers: dict[str, TensorWriter], state: Any = None, at_once: bool = False) -> None:
        """Note that these files, by name, are at the end of a tensor. Raises the OSError of an earlier flush.

        With ``at_once`` even a little is noted, unless an earlier note is still being saved.
        """
        written = sum(writer.nbytes for writer in writers.values())
        busy = self._running is not None and not self._running.done()
        if busy or abs(written - self._noted) < (1 if at_once else SYNC_BYTES):
            return
        self.wait()
        self._noted = written
        positions = {name: writer.nbytes for name, writer in writers.items()}
        flushed = [writer.flush() for writer in writers.values()]  # all first: a failure later would leave copies open
        descriptors = [os.dup(descriptor) for descriptor in flushed]
        self._running = self._pool.submit(self._save, descriptors, {"positions": positions, "state": state})

    def wait(self) -> None:
        """Wait until what was noted is saved. Raises the OSError of flushing or saving it."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def close(self) -> None:
        """Stop noting, once what was noted is saved. The file is removed when the output is finished (claim.py)."""
        self._pool.shutdown()

    def _save(self, descriptors: list[int], record: dict[str, Any]) -> None:
        try:
            for descriptor in descriptors:
                sync_file(descriptor)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        write_json(self._path, record)
