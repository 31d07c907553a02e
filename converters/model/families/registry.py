"""The table of all families, from which everything else knows them: a new one is a file beside this and a line here."""

from __future__ import annotations

from converters.model.architecture import Architecture
from converters.model.families.family import Family
from converters.model.families.llama import LLAMA
from converters.model.families.opt import OPT

FAMILIES: tuple[Family, ...] = (LLAMA, OPT)
UNNAMED = LLAMA.model_type  # of a config.json that names no model type, as some of LLaMA don't


def find_family(model_type: object) -> Family | None:
    """The family that reads this model type of config.json; None where none does."""
    # A list, because a file may hold something that can't be hashed.
    return next((family for family in FAMILIES if model_type in list(family.model_types)), None)


def known_model_types() -> list[str]:
    """All model types of config.json that are read."""
    return [name for family in FAMILIES for name in family.model_types]


def family_of(architecture: Architecture) -> Family:
    """The family that an architecture is of, or a variant of."""
    return next(family for family in FAMILIES if family.model_type == architecture.model_type)


def known_gguf_architectures() -> list[str]:
    """Every ``general.architecture`` of the GGUF files that are read."""
    return [family.gguf.architecture for family in FAMILIES if family.gguf]


def find_gguf_family(architecture: str) -> Family | None:
    """The family whose GGUF files are of this ``general.architecture``; None where none's are."""
    return next((family for family in FAMILIES if family.gguf and family.gguf.architecture == architecture), None)
