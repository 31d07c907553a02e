"""A source that is a single file: GGUF by its first bytes, whatever its name; other files are refused with advice.

Also finds the GGUF file of a directory without other weights.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from converters.console.errors import InputError
from converters.console.notes import note
from converters.files.stand_ins import stand_in
from converters.formats.gguf_parts import first_parts
from converters.sources.source import TensorSource

_MAGIC = b"GGUF"
_HEAD_BYTES = 512
_PICKLE = re.compile(rb"\x80[\x02-\x05]")  # the beginning of torch.save's older format
_GIVE = "Give a .gguf file, or a directory of Hugging Face's or Meta's."
_UNPACK = "Unpack it, and give the .gguf file or the directory that comes out."
# Other files that are given for a model: their first bytes, what they are, and what to do.
_KINDS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"lmgg", b"fmgg", b"tjgg"),
        "in GGML's format, which came before GGUF. Make a GGUF file from it with llama.cpp's "
        "convert_llama_ggml_to_gguf.py, or give another file of the model.",
    ),
    (
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!"),
        f"compressed. {_UNPACK}",
    ),
    (
        (b"\x89HDF",),
        "in TensorFlow's format (HDF5). Give a directory with the model as safetensors; save_pretrained of "
        "transformers writes one.",
    ),
)
# Weights in other formats: a directory with such files is Hugging Face's or Meta's, complete or not.
_OTHER_FORMS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "consolidated.*")


def open_file(path: Path) -> TensorSource:
    """Open a GGUF file. Raises InputError for any other file, saying what it is and what to give instead."""
    try:
        head = _read_head(path)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from None
    if not head.startswith(_MAGIC):
        raise InputError(f"{path} is {stand_in(head) or _kind(path, head)}")
    from converters.sources.gguf.source import open_gguf

    return open_gguf(path)


def find_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory (of a split model, the first part); None where there is none or other weights are.

    Raises InputError, naming them, where there are several models.
    """
    if any(True for pattern in _OTHER_FORMS for _ in directory.glob(pattern)):
        return None
    models = first_parts(path for path in directory.iterdir() if path.is_file() and _is_gguf(path))
    if not models:
        return None
    if len(models) > 1:
        names = ", ".join(path.name for path in models[:8]) + (", ..." if len(models) > 8 else "")
        raise InputError(f"{directory} holds {len(models)} GGUF files: {names}. Give one of them as the source.")
    note(f"{directory} holds a GGUF file and no other weights: {models[0].name} is read, and no file beside it.")
    return models[0]


def _is_gguf(path: Path) -> bool:
    """By its name, even if the content is wrong; or by its first bytes, as in caches that name files by hash."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        return _read_head(path).startswith(_MAGIC)
    except OSError:
        return False


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _kind(path: Path, head: bytes) -> str:
    """In words, what a file is, and what to do about it."""
    for beginnings, what in _KINDS:
        if head.startswith(beginnings):
            return what
    directory = f"Give its directory, {path.absolute().parent}, with the model's other files"
    if _is_safetensors(path, head):
        return f"a safetensors file. {directory}, config.json first of all."
    if _PICKLE.match(head) or _is_torch_zip(path, head):
        return f"a file of torch.save. {directory}: config.json, or Meta's params.json."
    if head.startswith(b"PK") or head[257:262] == b"ustar":
        return f"an archive. {_UNPACK}"
    if head.lstrip().startswith((b"{", b"[")):
        return f"a JSON file. {directory}; for random weights of a config.json, give that with --config."
    return f"{'a file of no known kind' if head else 'empty'}. {_GIVE}"


def _is_safetensors(path: Path, head: bytes) -> bool:
    """By its name, or by its first bytes: the length of a JSON object, then the object's first character."""
    named = path.name.lower().endswith(".safetensors")
    return named or (head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= path.stat().st_size - 8)


def _is_torch_zip(path: Path, head: bytes) -> bool:
    if not head.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
