"""The models that ``--config`` knows by name: those of all families."""

from __future__ import annotations

from pathlib import Path

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from converters.model.families.registry import FAMILIES

PRESETS: dict[str, ModelConfig] = {preset.name: preset for family in FAMILIES for preset in family.presets}


def find_config(name_or_path: str) -> ModelConfig | Path:
    """What ``--config`` names: a preset, in any case, or the path of a config.json (or of its directory)."""
    for name, preset in PRESETS.items():
        if name.lower() == name_or_path.lower():
            return preset
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise InputError(
            f"Unknown configuration {name_or_path!r}; give one of {', '.join(PRESETS)}, or the path of a config.json."
        )
    return path
