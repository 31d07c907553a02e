"""The dimensions of a model: presets, and Hugging Face's config.json in both directions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.files.json_file import read_json
from converters.model.architecture import LLAMA, OPT, OPT_POST_NORM, Architecture, Positions
from converters.model.dtypes import DTYPES, said_dtype
from converters.model.end_tokens import token_ids
from converters.model.families.llama import REQUIRED as LLAMA_REQUIRED
from converters.model.families.llama import llama_from_hf, llama_to_hf, optional
from converters.model.families.opt import LAYER_NORM_EPS, opt_from_hf, opt_to_hf
from converters.model.families.opt import REQUIRED as OPT_REQUIRED
from converters.model.model_name import name_in_path, name_of_directory
from converters.model.refusals import MAX_POSITIONS, check_features
from converters.model.rope import Llama3Scaling, RopeScaling

# Far above any model, low enough that a damaged config.json can't ask for endless work.
_MAX_DIMENSION = 1 << 24
_MAX_NAME = 100
_MAX_NUMBER = 10**15
# What each family's config.json must have, and how it is read and written where the families differ.
_FROM_HF = {LLAMA.model_type: (LLAMA_REQUIRED, llama_from_hf), OPT.model_type: (OPT_REQUIRED, opt_from_hf)}
_TO_HF = {LLAMA.model_type: llama_to_hf, OPT.model_type: opt_to_hf}
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
    architecture: Architecture = LLAMA
    word_embed_proj_dim: int | None = None

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

    def to_hf(self) -> dict[str, Any]:
        """config.json as the configuration classes of transformers read it."""
        eos = list(self.eos_token_ids)
        return {
            **_TO_HF[self.architecture.model_type](self),
            "model_type": self.architecture.model_type,
            "_name_or_path": self.name,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            **({} if self.pad_token_id is None else {"pad_token_id": self.pad_token_id}),
            "torch_dtype": self.dtype,
        }


def from_hf(fields: Any, name: str = "llama") -> ModelConfig:
    """A ModelConfig from the fields of a Hugging Face config.json; ``name`` is used where they hold none.

    Raises InputError for another architecture, for a feature that the decoder does not have, and for sizes that
    contradict each other.
    """
    if not isinstance(fields, dict):
        raise InputError("config.json does not hold a JSON object; it is no Hugging Face configuration.")
    fields = check_features(fields)
    family = OPT if fields.get("model_type") == OPT.model_type else LLAMA
    needed, read = _FROM_HF[family.model_type]
    absent = [field for field in needed if field not in fields]
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
        **read(fields),
    )


def _head_dim(fields: dict[str, Any]) -> Any:
    """LLaMA's may be any; where config.json is silent, the heads share the hidden size."""
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
        fields.pop("quantization_config", None)
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


def _ffn_size(hidden_size: int) -> int:
    """LLaMA's rule (Touvron et al. 2023, section 2.2): 2/3 of 4 * dim, rounded up to a multiple of 256."""
    return -(-(2 * 4 * hidden_size // 3) // 256) * 256


def _preset(name: str, hidden_size: int, heads: int, layers: int, **fields: Any) -> ModelConfig:
    """LLaMA 1 of these dimensions, or with other ``fields`` a later model."""
    sizes = {
        "intermediate_size": _ffn_size(hidden_size),
        "num_kv_heads": heads,
        "head_dim": hidden_size // heads,
        "norm_eps": 1e-6,
    }
    return ModelConfig(name=name, hidden_size=hidden_size, num_heads=heads, num_layers=layers, **sizes | fields)


_LLAMA_2 = {"norm_eps": 1e-5, "max_position_embeddings": 4096}
_CODE_LLAMA = {"norm_eps": 1e-5, "max_position_embeddings": 16384, "rope_theta": 1e6}
_LLAMA_3 = {
    "norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_ids": (128001, 128009),  # <|end_of_text|>, <|eot_id|>
    "num_kv_heads": 8,
}
_LLAMA_3_1 = _LLAMA_3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192),
    "eos_token_ids": (128001, 128008, 128009),  # and <|eom_id|>
}


def _opt(name: str, hidden_size: int, heads: int, layers: int, **fields: Any) -> ModelConfig:
    """OPT of these dimensions (Zhang et al. 2022, table 1), its feed-forward size always 4 * dim."""
    sizes = {
        "intermediate_size": 4 * hidden_size,
        "vocab_size": 50272,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "norm_eps": LAYER_NORM_EPS,
        "architecture": OPT,
    }
    return _preset(name, hidden_size, heads, layers, **sizes | fields)


# Table 1 of "The Path to Achieve Ultra-Low Inference Latency With LLaMA 65B on PyTorch/XLA", with 13B and a small
# one for demos and tests. 175B is OPT-175B's dimensions on the LLaMA architecture. Below them the models of Touvron
# et al. 2023 (LLaMA 2), Roziere et al. 2023 (Code Llama), Grattafiori et al. 2024 (LLaMA 3, and 3.1 405B) and OPT.
PRESETS: dict[str, ModelConfig] = {
    preset.name: preset
    for preset in (
        _preset("tiny", 256, 8, 4),
        _preset("7B", 4096, 32, 32),
        _preset("13B", 5120, 40, 40),
        _preset("33B", 6656, 52, 60),
        _preset("65B", 8192, 64, 80),
        _preset("175B", 12288, 96, 96),
        _preset("llama-2-7b", 4096, 32, 32, **_LLAMA_2),
        _preset("llama-2-13b", 5120, 40, 40, **_LLAMA_2),
        _preset("llama-2-70b", 8192, 64, 80, intermediate_size=28672, num_kv_heads=8, **_LLAMA_2),
        _preset("code-llama-34b", 8192, 64, 48, intermediate_size=22016, num_kv_heads=8, **_CODE_LLAMA),
        _preset("llama-3-8b", 4096, 32, 32, intermediate_size=14336, **_LLAMA_3),
        _preset("llama-3-70b", 8192, 64, 80, intermediate_size=28672, **_LLAMA_3),
        _preset("llama-3-405b", 16384, 128, 126, intermediate_size=53248, **_LLAMA_3_1),
        _opt("opt-125m", 768, 12, 12),
        _opt("opt-350m", 1024, 16, 24, word_embed_proj_dim=512, architecture=OPT_POST_NORM),
        _opt("opt-1.3b", 2048, 32, 24),
        _opt("opt-2.7b", 2560, 32, 32),
        _opt("opt-6.7b", 4096, 32, 32),
        _opt("opt-13b", 5120, 40, 40),
        _opt("opt-30b", 7168, 56, 48),
        _opt("opt-66b", 9216, 72, 64),
        _opt("opt-175b", 12288, 96, 96),
    )
}


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
