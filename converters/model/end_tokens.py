"""Which tokens end a text: all the places that name them, in one.

config.json and generation_config.json name ids, each one or several; GGUF has keys for them (eos, eot, eom). None of
these is sure to be whole: of a model for chat they often name the end of a text and leave out the end of a turn. So
control tokens count too whose text says that they are ends, as in llama.cpp (src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from converters.console.errors import InputError, shown
from converters.console.notes import note

GENERATION = "generation_config.json"
_LARGEST_ID = 1 << 24
_UNSIGNED_NONE = (1 << 32) - 1  # a -1 that was kept in 32 bits without a sign
_TEXTS = frozenset(
    (
        *("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>"),
        *("<EOT>", "_<EOT>", "\u2581<EOT>", "[EOT]"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
    )
)
# Where all of these are in a vocabulary, that one only parts a message, or means nothing.
_NO_ENDS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|flush|>", "<|call|>"}, "<|end|>"),
    ({"<|flush|>", "<|calls|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)


def token_ids(value: Any, field: str) -> tuple[int, ...]:
    """The ids that a field of config.json has: one, a list, or none (null, with a note a negative number).

    Raises InputError for another value.
    """
    values = value if isinstance(value, list) else [value]
    for each in values:
        if each is not None and (type(each) is not int or (each > _LARGEST_ID and each != _UNSIGNED_NONE)):
            raise InputError(f"{field} is {shown(each)}; it must be a token id.")
        if each is not None and not 0 <= each <= _LARGEST_ID:
            note(f"{field} is {shown(each)}, which is no token: the model is taken to have none there.")
    return tuple(each for each in values if each is not None and 0 <= each <= _LARGEST_ID)


def is_surely_control(text: str) -> bool:
    """Whether an end of a text is written as no text is, so that a vocabulary can't mean it for one."""
    return text in _TEXTS and text.startswith("<|")


def ends_by_text(control: Mapping[int, str]) -> tuple[int, ...]:
    """The ids, in order, of control tokens that end a text by what they say."""
    found = {text: i for i, text in control.items() if text in _TEXTS}
    for together, text in _NO_ENDS:
        if together <= found.keys():
            found.pop(text, None)
    return tuple(sorted(found.values()))


def _generation_ends(files: Mapping[str, bytes], where: str) -> tuple[int, ...]:
    """The ids in generation_config.json among the files of a folder ``where``. Raises InputError for a damaged one."""
    if GENERATION not in files:
        return ()
    try:
        content = json.loads(files[GENERATION])
    except (UnicodeDecodeError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{where}/{GENERATION} holds no JSON object; correct it, or take it away.")
    return token_ids(content.get("eos_token_id"), f"eos_token_id in {where}/{GENERATION}")


def all_ends(
    config_ends: Iterable[int], files: Mapping[str, bytes], control: Mapping[int, str], where: str
) -> tuple[int, ...]:
    """What ends a text by config.json, by the other files of a folder ``where`` and by control tokens' texts."""
    return union(config_ends, _generation_ends(files, where), ends_by_text(control))


def union(*sources: Iterable[int]) -> tuple[int, ...]:
    """All ids, each once, in the order of the sources."""
    return tuple(dict.fromkeys(i for source in sources for i in source))
