"""A directory with one GGUF file: written, resumed and checked as a checkpoint's files are."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from converters.console.errors import InputError
from converters.console.progress import Advance
from converters.contents import Contents
from converters.formats.gguf_file import GGUFFile
from converters.formats.gguf_parts import open_parts
from converters.model.parameters import parameters
from converters.output.claim import Output
from converters.output.journal import Journal
from converters.self_check import SelfCheck, names_and_shapes
from converters.weight_files import write_weight_file


def write_gguf(contents: Contents, file: GGUFFile, output: Output, advance: Advance) -> SelfCheck:
    """Write the file, going on where an interrupted run stopped. Returns what it was found to hold.

    ``advance`` is called with the number of bytes done. Raises InputError for values that can't be read or are not
    finite, and where the source changed meanwhile.
    """
    with closing(Journal(output.directory)) as journal:
        write_weight_file(contents, output, file, journal, advance)
        journal.wait()
        check = _check(output.directory / file.name, file, contents)
        output.check_sources()
    return check


def _check(path: Path, file: GGUFFile, contents: Contents) -> SelfCheck:
    """Hold the header on the disk, as the gguf library reads it, against what was to be written."""
    found = [(tensor.name, tensor.type.name, tensor.shape) for tensor in open_parts(path).tensors]
    if found != [(tensor.name, tensor.type, tensor.shape) for tensor in file.tensors]:
        raise InputError(f"{path} holds other tensors than were written to it. Convert again with --force.")
    count = sum(parameter.elements for parameter in parameters(contents.config))
    return SelfCheck(len(found), count, names_and_shapes((name, shape) for name, _, shape in found))
