"""The model to compare with: shards, or any source of weights, split for as many chips as it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from converters.sources.opening import open_source
from converters.tokenizers.reader import TOKENIZER
from quantize.shards.chip_weights import ChipWeights, SplitSource
from quantize.shards.manifest import FILE_NAME
from quantize.shards.reading import Shards
from quantize.shards.source import ShardsSource
from runtime.run.stored_model import StoredModel


@dataclass(frozen=True)
class Reference:
    """A model that is opened, and none of its tensors read."""

    name: str
    weights: ChipWeights
    config: ModelConfig  # cut to the number of layers asked for

    def head(self, int8_activations: bool) -> ChipWeights:
        """Where its output head is loaded from.

        With ``int8_activations`` the device would round those of a quantized head too, which are to be only the
        model's: then it is dequantized.
        """
        if int8_activations and self.weights.scheme.quantize_lm_head and isinstance(self.weights, Shards):
            return SplitSource(_Dequantized(self.weights), self.weights.chips)
        return self.weights


class _Dequantized(ShardsSource):
    """Shards whose tensors are all float32."""

    def __init__(self, shards: Shards) -> None:
        super().__init__(shards)
        self.config = self.config.with_dtype("float32")


def open_reference(path: Path, model: StoredModel, chips: int | None, layers: int | None) -> Reference:
    """Open ``path`` to compare ``model`` with it on ``chips`` chips (None: on a device that takes tensors whole).

    Raises InputError where it can't be opened, or is of another vocabulary, tokenizer or number of chips.
    """
    own = model.shards
    if (path / FILE_NAME).exists():
        shards = Shards(path)
        if chips is not None and shards.chips != chips:
            raise InputError(
                f"{path} is for {shards.chips} chips and {model.path} for {chips}. Re-shard one of them: "
                f"llama-quantize {path} {shards.scheme.flags} --chips {chips} --out OTHER."
            )
        name, weights, files = shards.manifest.model, shards, shards.auxiliary_files()
    else:
        source = open_source(path)
        name, weights, files = source.config.name, SplitSource(source, own.chips), source.auxiliary_files()
    vocab_size = weights.config.vocab_size
    if vocab_size != own.config.vocab_size:
        raise InputError(
            f"{path} has a vocabulary of {vocab_size} and {model.path} one of {own.config.vocab_size}: their "
            "predictions can't be compared. Give two forms of one model."
        )
    ours = own.auxiliary_files().get(TOKENIZER)
    if ours is not None and files.get(TOKENIZER, ours) != ours:
        raise InputError(
            f"{path} and {model.path} have different files {TOKENIZER}: their token ids may mean different text. Give "
            "two forms of one model, or take one of the files away."
        )
    return Reference(name, weights, weights.config.cut(layers))
