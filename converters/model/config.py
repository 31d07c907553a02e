"""The architecture and dimensions of a model, held against what a decoder can be."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

from converters.console.errors import InputError, shown
from converters.model.architecture import Architecture, Positions
from converters.model.dtypes import DTYPES
from converters.model.rope import RopeScaling

# Far above any model, low enough that a damaged config.json can't ask for endless work.
_MAX_DIMENSION = 1 << 24
_MAX_NAME = 100
_MAX_NUMBER = 10**15
_MAX_COUNT = {"num_layers": 1 << 12, "num_heads": 1 << 14, "num_kv_heads": 1 << 14, "head_dim": 1 << 14}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's architecture and dimensions, under names that Hugging Face's config.json uses.

    ``eos_token_ids`` lists every id that config.json has for the end of a generation (end_tokens.py knows of more); it
    may be empty. ``word_embed_proj_dim`` is the width of the embedding and of the output head where it is another than
    the layers'; linears lead from one to the other. The RoPE fields mean nothing where positions are learned.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = 32000
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    dtype: str = "bfloat16"
    word_embed_proj_dim: int | None = None
    _: KW_ONLY
    architecture: Architecture

    def __post_init__(self) -> None:
        # The name is shown and written to files; it may come from a file or a path that holds anything.
        plain = "".join(character for character in self.name if character.isprintable())[:_MAX_NAME].strip()
        object.__setattr__(self, "name", plain or self.architecture.model_type)
        if self.word_embed_proj_dim == self.hidden_size:
            object.__setattr__(self, "word_embed_proj_dim", None)
        sizes = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        if self.word_embed_proj_dim is not None:
            sizes += ("word_embed_proj_dim",)
        for field in (*sizes, "num_layers", "max_position_embeddings"):
            value = getattr(self, field)
            limit = _MAX_COUNT.get(field, _MAX_DIMENSION)
            if type(value) is not int or not 1 <= value <= limit:
                raise InputError(f"{field} is {shown(value)}; it must be a whole number from 1 to {limit}.")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads {self.num_heads} is no multiple of num_key_value_heads {self.num_kv_heads}."
            )
        if self.head_dim % 2 and self.architecture.positions is Positions.ROTARY:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs of dimensions.")
        for field, least in (("norm_eps", 1e-30), ("rope_theta", 1)):
            value = getattr(self, field)
            if type(value) not in (int, float) or not least <= value <= _MAX_NUMBER:  # neither is true of NaN
                raise InputError(f"{field} is {shown(value)}; it must be a number from {least} to {_MAX_NUMBER}.")
        if type(self.tie_word_embeddings) is not bool:
            raise InputError(f"tie_word_embeddings is {shown(self.tie_word_embeddings)}; it must be true or false.")
        if self.dtype not in DTYPES:
            raise InputError(f"The weights' dtype is {shown(self.dtype)}; valid: {', '.join(DTYPES)}.")

    def cut(self, layers: int | None) -> ModelConfig:
        """The same model with only its first ``layers`` blocks (None keeps all)."""
        if layers is None:
            return self
        if not 1 <= layers <= self.num_layers:
            raise InputError(f"--layers {layers} does not fit {self.name}; give 1 to {self.num_layers}.")
        return replace(self, num_layers=layers)

    def with_dtype(self, dtype: str) -> ModelConfig:
        return replace(self, dtype=dtype)

    @property
    def word_size(self) -> int:
        """The width of the embedding and of the output head."""
        return self.hidden_size if self.word_embed_proj_dim is None else self.word_embed_proj_dim

    def holds_context(self, tokens: int) -> bool:
        """Whether ``tokens`` have positions: learned ones end, RoPE's don't."""
        return self.architecture.positions is not Positions.LEARNED or tokens <= self.max_position_embeddings

    def check_context(self, tokens: int) -> None:
        """Raise InputError where a context of so many ``tokens`` has no positions."""
        if not self.holds_context(tokens):
            raise InputError(
                f"{self.name} has learned {self.max_position_embeddings} positions, and --max-seq-len is {tokens}. "
                f"Lower --max-seq-len to {self.max_position_embeddings} or less."
            )
