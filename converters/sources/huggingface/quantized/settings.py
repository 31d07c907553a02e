"""The settings of a ``quantization_config``, each held against what is read; all else is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from converters.console.errors import InputError, shown


@dataclass(frozen=True)
class Settings:
    """The ``fields`` of a method; ``where`` is the checkpoint, ``reads`` says what is read of the method."""

    where: str
    method: str
    fields: dict[str, Any]
    reads: str

    def refuse(self, what: str) -> NoReturn:
        """Raise InputError that names what isn't read."""
        raise InputError(
            f"{self.where}: config.json describes a model that is already quantized by {self.method!r} with {what}. "
            f"This tool reads {self.reads}. Convert the unquantized original."
        )

    def among(self, key: str, valid: Iterable[Any], default: Any = None) -> Any:
        """A field's value, which must be one of the ``valid`` ones, in type too; null and none are the default."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not any(value == each and type(value) is type(each) for each in valid):
            self.refuse(f"{key} {shown(value)}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of 1 or more, or -1."""
        value = self.fields.get(key, default)
        if type(value) is not int or (value < 1 and value != -1):
            self.refuse(f"{key} {shown(value)}")
        return value

    def names(self, key: str) -> list[str]:
        """A list of names; none where the field is null."""
        value = self.fields.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            self.refuse(f"{key} {shown(value)}")
        return value

    def rest(self, known: Iterable[str]) -> None:
        """Refuse a field that is not ``known`` and switches something on."""
        for key, value in self.fields.items():
            if key not in known and value not in (None, False, []):
                self.refuse(f"{key} {shown(value)}")


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether one of ``names`` is a module's name or a part of it between dots, as lists of exceptions have them."""
    return any(f".{name}." in f".{module}." for name in names if name)
