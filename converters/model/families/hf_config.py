"""Hugging Face's config.json of any family, read and written, with what it may not ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.files.json_file import read_json
from converters.model.config import ModelConfig
from converters.model.dtypes import said_dtype
from converters.model.end_tokens import token_ids
from converters.model.families.family import NOT_IMPLEMENTED, Family, Fields
from converters.model.families.registry import UNNAMED, family_of, find_family, known_model_types
from converters.model.hf_fields import MAX_POSITIONS, optional
from converters.model.model_name import name_in_path, name_of_directory

_QUANTIZATION = ("quantization_config", "compression_config")
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # of every family


def to_hf(config: ModelConfig) -> Fields:
    """config.json as the configuration classes of transformers read it."""
    eos = list(config.eos_token_ids)
    return {
        **family_of(config.architecture).write(config),
        "model_type": config.architecture.model_type,
        "_name_or_path": config.name,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        **({} if config.pad_token_id is None else {"pad_token_id": config.pad_token_id}),
        "torch_dtype": config.dtype,
    }


def from_hf(fields: Any, name: str = "") -> ModelConfig:
    """A ModelConfig from the fields of a Hugging Face config.json; ``name`` is used where they hold none.

    Raises InputError for a model type of no family, for a feature that the decoder does not have, and for sizes that
    contradict each other.
    """
    if not isinstance(fields, dict):
        raise InputError("config.json does not hold a JSON object; it is no Hugging Face configuration.")
    family, fields = _completed(fields)
    absent = [field for field in (_REQUIRED[0], *family.required, *_REQUIRED[1:]) if field not in fields]
    if absent:
        raise InputError(f"config.json lacks {', '.join(absent)}; it is no {family.title} configuration.")
    return ModelConfig(
        name=_name(fields) or name,
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        head_dim=_head_dim(fields),
        vocab_size=fields["vocab_size"],
        max_position_embeddings=optional(fields, "max_position_embeddings", MAX_POSITIONS),
        tie_word_embeddings=optional(fields, "tie_word_embeddings", False),
        bos_token_id=_bos_token_id(fields),
        pad_token_id=_pad_token_id(fields),
        eos_token_ids=token_ids(fields.get("eos_token_id", 2), "eos_token_id in config.json"),
        dtype=said_dtype(fields) or "bfloat16",
        **family.read(fields),
    )


def _completed(fields: Fields) -> tuple[Family, Fields]:
    """The family of a config.json, and its fields with the defaults of its model type.

    Raises InputError for another model type, for a feature that the decoder lacks, by name, and for quantized weights.
    """
    kind = fields.get("model_type", UNNAMED)
    family = find_family(kind)
    for field, feature in family.not_implemented if family else NOT_IMPLEMENTED:
        if fields.get(field):
            raise InputError(f"config.json asks for {feature} ({field}), which the decoder does not implement.")
    if family is None:
        known = ", ".join(map(repr, known_model_types()))
        feature = " (mixture of experts)" if kind == "mixtral" else ""
        raise InputError(f"config.json is of model type {shown(kind)}{feature}; this tool converts {known}.")
    fields = {**family.model_types[kind], **fields}
    _check_unquantized(fields)
    fields = {field: value for field, value in fields.items() if field not in family.ignored}
    family.check(fields)
    return family, fields


def _check_unquantized(fields: dict[str, Any]) -> None:
    quantized = next((fields[field] for field in _QUANTIZATION if fields.get(field)), None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        by = f" by {shown(method)}" if method else ""
        raise InputError(
            f"config.json describes a model that is already quantized{by}; convert its unquantized original."
        )


def _head_dim(fields: dict[str, Any]) -> Any:
    """It may be any; where config.json is silent, the heads share the hidden size."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if fields.get("head_dim") is not None:
        return fields["head_dim"]
    if type(hidden) is not int or type(heads) is not int or heads < 1 or hidden % heads:
        raise InputError(
            f"hidden_size {shown(hidden)} is no multiple of num_attention_heads {shown(heads)}, "
            "and there is no head_dim."
        )
    return hidden // heads


def read_config(path: Path, quantized: bool = False) -> ModelConfig:
    """The configuration in a config.json. Raises InputError where it can't be read or is of no known model.

    With ``quantized`` it may say that its model is quantized, as ours beside shards do.
    """
    fields = read_json(path)
    if quantized and isinstance(fields, dict):
        fields = {key: value for key, value in fields.items() if key not in _QUANTIZATION}
    try:
        return from_hf(fields, name=name_of_directory(path.parent))
    except InputError as error:
        raise InputError(f"{path.parent}: {error}") from None


def _name(fields: dict[str, Any]) -> str:
    """The model's name without the folders or owner that it was loaded from."""
    name = fields.get("_name_or_path")
    return name_in_path(name) if isinstance(name, str) else ""


def _token_id(fields: dict[str, Any], field: str, default: int | None) -> int | None:
    """The id of one token, or none."""
    found = token_ids([fields.get(field, default)], f"{field} in config.json")
    return found[0] if found else None


def _bos_token_id(fields: dict[str, Any]) -> int | None:
    """The first of a list."""
    value = fields.get("bos_token_id", 1)
    if not isinstance(value, list):
        return _token_id(fields, "bos_token_id", 1)
    first = _token_id({"bos_token_id": value[0]} if value else {}, "bos_token_id", None)
    note(f"config.json has a list as bos_token_id, {shown(value)}: {first} is taken.")
    return first


def _pad_token_id(fields: dict[str, Any]) -> int | None:
    """None also for an id without a row of the embedding, with which transformers can't load a model."""
    found, rows = _token_id(fields, "pad_token_id", None), fields["vocab_size"]
    if found is not None and type(rows) is int and found >= rows:
        note(f"pad_token_id in config.json is {found}, and the vocabulary has {rows} tokens: it is left out.")
        return None
    return found
