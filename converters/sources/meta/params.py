"""params.json of Meta's own LLaMA checkpoints: the dimensions, and what has to be inferred from them."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.files.json_file import read_json
from converters.model.config import ModelConfig
from converters.model.families.llama import LLAMA
from converters.model.rope import Llama3Scaling

FILE_NAME = "params.json"
_MAX_SIZE = 1 << 24
_MAX_MULTIPLIER = 1 << 10
_LLAMA_3_VOCAB = 128256
_CODE_LLAMA_THETA = 1e6
# LLaMA 3.1's RoPE scaling is a switch in params.json. Without a factor beside it, the factor is that of the model's own
# code: 32 for LLaMA 3.2's 1B and 3B, recognized by (dim, n_layers), and 8 for the others.
_ROPE_FACTOR = 8.0
_ROPE_FACTORS = {
    (4096, 32): _ROPE_FACTOR,
    (8192, 80): _ROPE_FACTOR,
    (16384, 126): _ROPE_FACTOR,
    (2048, 16): 32.0,
    (3072, 28): 32.0,
}
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_POSITIONS = 1.0, 4.0, 8192
_SCALING_FIELDS = ("rope_scaling_factor", "rope_high_freq_factor")
_IGNORED = ("max_seq_len", "max_batch_size")  # limits of a run, not of the model


@dataclass(frozen=True)
class Params:
    """The fields of params.json, with the defaults of Meta's reference code for LLaMA 1 and 2.

    Raises InputError for a value out of range.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    vocab_size: int = -1  # unknown: taken from the embedding
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "vocab_size"):
            value = getattr(self, name)
            unsaid = (name == "vocab_size" and value == -1) or (name == "n_kv_heads" and value is None)
            if not unsaid and (type(value) is not int or not 1 <= value <= _MAX_SIZE):
                raise InputError(f"{name} is {shown(value)}; it must be a whole number from 1 to {_MAX_SIZE}.")
        if self.dim % self.n_heads:
            raise InputError(f"dim {self.dim} is no multiple of n_heads {self.n_heads}.")
        multiplier = self.ffn_dim_multiplier
        if multiplier is not None and (type(multiplier) not in (int, float) or not 0 < multiplier <= _MAX_MULTIPLIER):
            raise InputError(f"ffn_dim_multiplier is {shown(multiplier)}; it must be a positive number.")
        for name in _SCALING_FIELDS:
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 1 <= value <= _MAX_MULTIPLIER):
                raise InputError(f"{name} is {shown(value)}; it must be a number from 1 to {_MAX_MULTIPLIER}.")
        if type(self.use_scaled_rope) is not bool:
            raise InputError(f"use_scaled_rope is {shown(self.use_scaled_rope)}; it must be true or false.")

    @property
    def intermediate_size(self) -> int:
        """The feed-forward size as in Meta's reference code: 2/3 of 4 * dim, times the multiplier, rounded up."""
        size = 8 * self.dim // 3
        if self.ffn_dim_multiplier is not None:
            size = int(self.ffn_dim_multiplier * size)
        return -(-size // self.multiple_of) * self.multiple_of

    def config(self, name: str, vocab_size: int) -> ModelConfig:
        """The model's configuration, without its dtype; ``vocab_size`` is the number of the embedding's rows.

        params.json gives neither the longest context nor the tokens that end a text. Both follow from the generation:
        3.1 scales RoPE, 3 has its own vocabulary, Code Llama its own RoPE base. LLaMA 1 and 2 can't be told apart and
        get LLaMA 1's context length. Raises InputError where params.json states another vocabulary.
        """
        if self.vocab_size not in (-1, vocab_size):
            raise InputError(f"vocab_size is {self.vocab_size} and the embedding has {vocab_size} rows.")
        scaling = self._rope_scaling()
        third = vocab_size == _LLAMA_3_VOCAB
        unscaled = 8192 if third else 16384 if self.rope_theta == _CODE_LLAMA_THETA else 2048
        return ModelConfig(
            name=name,
            architecture=LLAMA.architecture,
            hidden_size=self.dim,
            intermediate_size=self.intermediate_size,
            num_layers=self.n_layers,
            num_heads=self.n_heads,
            num_kv_heads=self.n_kv_heads or self.n_heads,
            head_dim=self.dim // self.n_heads,
            vocab_size=vocab_size,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rope_scaling=scaling,
            max_position_embeddings=131072 if scaling else unscaled,
            tie_word_embeddings=False,  # LLaMA 3.2's files hold the tied head as a tensor of its own
            bos_token_id=128000 if third else 1,
            eos_token_ids=_end_tokens(third, scaled=scaling is not None),
        )

    def _rope_scaling(self) -> Llama3Scaling | None:
        """From params.json itself, or else from the model's size; notes what is ignored or guessed."""
        factor, high = self.rope_scaling_factor, self.rope_high_freq_factor
        if not self.use_scaled_rope:
            for name in _SCALING_FIELDS:
                if getattr(self, name) is not None:
                    note(f"{FILE_NAME} has {name} without use_scaled_rope; it is ignored, as by Meta's code.")
            return None
        if factor is None:
            factor = _ROPE_FACTORS.get((self.dim, self.n_layers))
        if factor is None:
            factor = _ROPE_FACTOR
            note(
                f"{FILE_NAME} has use_scaled_rope without rope_scaling_factor, and no LLaMA is known with dim "
                f"{self.dim} and n_layers {self.n_layers}: RoPE is scaled by {factor:g}, as in LLaMA 3.1. If the model "
                f"was trained with another factor, put rope_scaling_factor into {FILE_NAME}."
            )
        return Llama3Scaling(factor, _LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR if high is None else high, _ORIGINAL_POSITIONS)


def _end_tokens(third: bool, scaled: bool) -> tuple[int, ...]:
    """LLaMA 1 and 2: </s>. LLaMA 3: end of text and of turn; from 3.1 on (which scales RoPE) also of message."""
    if not third:
        return (2,)
    return (128001, 128008, 128009) if scaled else (128001, 128009)


def read_params(path: Path) -> Params:
    """The content of a params.json. Raises InputError for a field that is missing, wrong or unknown."""
    content: Any = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object; fetch it again.")
    known = {field.name: field for field in fields(Params)}
    for name, value in content.items():
        # A field that switches something on may change the arithmetic.
        if name not in known and name not in _IGNORED and value not in (None, False):
            raise InputError(
                f"{path} has the field {shown(name)}, which no LLaMA that this tool converts has. Convert the model's "
                "Hugging Face form."
            )
    absent = [name for name, field in known.items() if field.default is MISSING and name not in content]
    if absent:
        raise InputError(f"{path} lacks {', '.join(absent)}; fetch it again.")
    try:
        return Params(**{name: content[name] for name in known if name in content})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
