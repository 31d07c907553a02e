"""What a family of models is: its architecture, and its own part of config.json, of GGUF files and of the presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.model.architecture import Architecture

if TYPE_CHECKING:
    from converters.model.config import ModelConfig

Fields = dict[str, Any]
# Fields of config.json that, where true, switch on what the decoder does not implement; and what that is.
NOT_IMPLEMENTED = (
    ("attention_bias", "biases in the attention"),
    ("mlp_bias", "biases in the MLP"),
    ("num_local_experts", "mixture of experts"),
    ("num_experts", "mixture of experts"),
)


@dataclass(frozen=True)
class GGUFForm:
    """How GGUF files hold a family's models.

    ``model_names`` are the tensors outside the blocks, GGUF name -> Hugging Face name; ``block_names`` those of block N
    between ``blk.N.`` and ``.weight`` or ``.bias`` -> between ``layers.N.`` and the same.
    """

    architecture: str  # general.architecture, which is also how the keys of the metadata begin
    model_names: Mapping[str, str]
    block_names: Mapping[str, str]
    norm_eps: str  # its key, without the architecture
    interleaved: bool  # whether the rows of Q and K are in the order of interleaved rotary embeddings


def _nothing(fields: Fields) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models, whose variants share ``architecture.model_type``.

    ``architecture`` is that of the models that are no variant; it has every tensor that one of the family may have.
    ``model_types`` are those that it reads in config.json, each with what transformers assumes where config.json is
    silent.

    ``check`` raises InputError for what a config.json, completed by these, asks for and the decoder lacks. ``read``
    gives, from one that has the ``required`` fields, the arguments of ModelConfig that differ between families
    (architecture, intermediate_size, num_kv_heads and norm_eps at least), and may refuse as well. ``write`` gives the
    same fields of config.json back.
    """

    architecture: Architecture
    model_types: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...]  # of its own fields
    read: Callable[[Fields], Fields]
    write: Callable[[ModelConfig], Fields]
    check: Callable[[Fields], None] = _nothing
    not_implemented: tuple[tuple[str, str], ...] = NOT_IMPLEMENTED  # fields that are refused where true
    ignored: tuple[str, ...] = ()  # fields that transformers doesn't look at either
    gpt2_vocabulary: bool = False  # a vocab.json with a merges.txt is GPT-2's, also where no file says so
    gguf: GGUFForm | None = None  # None: GGUF files of the family are not read
    presets: tuple[ModelConfig, ...] = ()

    @property
    def model_type(self) -> str:
        return self.architecture.model_type

    @property
    def title(self) -> str:
        return self.architecture.title
