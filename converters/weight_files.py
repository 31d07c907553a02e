"""Writing a file of weights block by block, going on where an interrupted run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from converters.console.progress import Advance
from converters.contents import Contents, block_tasks
from converters.files.parallel import in_order
from converters.formats.safetensors import TensorSpec
from converters.formats.tensor_writer import TensorWriter
from converters.output.claim import Output
from converters.output.journal import Journal


class WeightFile(Protocol):
    """A file to write: its name, its size, and the tensors in it as their values are written."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def specs(self) -> tuple[TensorSpec, ...]: ...

    def tensors_before(self, position: int) -> int | None:
        """How many of its tensors end at byte ``position`` or before; None where none ends just there."""
        ...

    def writer(self, directory: Path, resume_at: int) -> TensorWriter:
        """What writes it, from byte ``resume_at`` on."""
        ...


def write_weight_file(contents: Contents, output: Output, file: WeightFile, journal: Journal, advance: Advance) -> None:
    """Write ``file``, or the rest of it; one that has its name is whole and stays.

    ``advance`` is called with the number of bytes done. Raises InputError for values that can't be read or are not
    finite.
    """
    if output.take_whole(file.name):
        advance(file.nbytes)
        return
    position, _ = journal.read([file.name])
    done = file.tensors_before(position)
    writer = file.writer(output.directory, position if done else 0)
    advance(writer.nbytes)
    try:
        for spec, stop, values in in_order(block_tasks(contents, file.specs[done or 0 :])):
            writer.append(values)
            advance(values.nbytes, spec.name)
            if stop == spec.shape[0]:
                writer.end_tensor()
                journal.note({file.name: writer})
        output.add({file.name: writer.finish()})
        writer.publish()
    finally:
        writer.stop()
