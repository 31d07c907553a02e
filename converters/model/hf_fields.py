"""Fields of a Hugging Face config.json that may be missing or null."""

from __future__ import annotations

from typing import Any

MAX_POSITIONS = 2048  # transformers' max_position_embeddings for LLaMA, where config.json is silent


def optional(fields: dict[str, Any], field: str, default: Any) -> Any:
    """A field that may be missing, or null."""
    value = fields.get(field)
    return default if value is None else value
