"""--check-logits: a short prompt through a conversion's source and through its result, both run by transformers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.console.errors import InputError
from converters.console.units import format_bytes
from converters.convert import Conversion
from converters.exports.compressed_tensors import INT8_ACTIVATED
from converters.files.row_blocks import row_blocks
from converters.files.text_path import text_path
from converters.model.families.hf_config import to_hf
from converters.model.parameters import parameters
from converters.output.preflight import available_memory
from converters.sources.codes import CodedSource
from converters.sources.gguf.source import GGUFSource
from converters.sources.huggingface.plain_source import HFSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TOKENS = 16
_TOLERANCE = 1e-4  # relative to the norm, in float32: both sides have the same weights
_COPIES = 1.5  # a model in float32, and what loading it takes besides
_COPIES_GGUF = 2.5  # transformers has all of a GGUF file in float32 before it fills the model
_PROGRAM_BYTES = 1_000_000_000  # the interpreter with torch and transformers


def check_ready(conversion: Conversion) -> None:
    """Raise InputError where the logits of this conversion couldn't be checked; called before the conversion."""
    if find_spec("transformers") is None:
        raise InputError(
            "--check-logits needs transformers, which is not installed: pip install 'transformers>=4.57'. Or leave "
            "--check-logits out."
        )
    if conversion.gguf:
        raise InputError("--check-logits can't be combined with --format gguf. Leave one of them out.")
    if conversion.target.int8_layout == INT8_ACTIVATED:
        raise InputError(
            f"--check-logits can't be combined with --int8-layout {INT8_ACTIVATED}: the result's activations are int8, "
            "so its logits are others. Leave one of them out."
        )
    if conversion.kept_names:
        try:
            with _quiet():
                import compressed_tensors  # noqa: F401 (transformers needs it to load the result)
        except ImportError as error:
            raise InputError(
                f"--check-logits of quantized weights needs compressed-tensors ({error}): pip install "
                "'compressed-tensors>=0.15,<0.16' psutil. Or leave --check-logits out."
            ) from None
    if conversion.choose_storage()[0] == "seed":
        raise InputError(
            "--check-logits runs files of weights, and this output is a seed. Add --storage files, or leave it out."
        )
    gguf = isinstance(conversion.source, GGUFSource)
    count = sum(p.elements for p in parameters(conversion.source.config if gguf else conversion.config))
    needed, available = int(4 * count * (_COPIES_GGUF if gguf else _COPIES)) + _PROGRAM_BYTES, available_memory()
    if available is not None and available < needed:
        raise InputError(
            f"--check-logits runs the model in float32, which takes about {format_bytes(needed)} of memory, and "
            f"{format_bytes(available)} are available. Leave it out, or check a few layers with --layers."
        )


def check_logits(conversion: Conversion) -> str:
    """Run the prompt through source and result. Returns the line to show the user.

    Raises InputError where transformers can't load the result, or gets other logits from it than from the source.
    """
    import torch

    out, vocab = conversion.out, conversion.config.vocab_size
    length = min(_TOKENS, conversion.config.max_position_embeddings)
    prompt = torch.tensor([[(1 + place * vocab // length) % vocab for place in range(length)]])
    with _quiet(), torch.no_grad():
        reference = _reference(conversion)
        expected = reference.model(prompt, use_cache=False).logits[0]  # [T, V]
        said = reference.read_by
        del reference  # one model in memory at a time
        try:
            result = _load(out)
        except Exception as error:  # transformers raises anything
            raise InputError(
                f"transformers can't load {out} ({_reason(error)}). Don't use it; "
                "convert again with --force, and report it if that changes nothing."
            ) from None
        logits = result(prompt, use_cache=False).logits[0].float()
    difference = ((logits - expected).norm() / expected.norm()).item()
    same = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    if not difference <= _TOLERANCE:  # NaN neither
        raise InputError(
            f"{out} gives other logits than its source, {said}: relative difference {difference:.1e} over {length} "
            "tokens. Don't use it; convert again with --force, and report it if that changes nothing."
        )
    return (
        f"Logits: {out} gives those of its source, {said}: relative difference {difference:.1e}, the same greedy "
        f"choice after {same} of {length} tokens"
    )


class _Reference(NamedTuple):
    """The source as a model of transformers, in float32 rounded as in the result, and in words, who has read it."""

    model: PreTrainedModel
    read_by: str


def _reference(conversion: Conversion) -> _Reference:
    """The source as transformers reads it, or where it can't, as this tool reads it."""
    source = conversion.source
    load: Callable[[], PreTrainedModel] | None = None
    if isinstance(source, HFSource) and not isinstance(source, CodedSource):
        load = partial(_load, source.directory, num_hidden_layers=conversion.config.num_layers)
    elif isinstance(source, GGUFSource) and len(source.files()) == 1:
        [path] = source.files()
        # With the configuration as read here: transformers doesn't know GGUF's RoPE scaling.
        load = partial(_load, path.parent, gguf_file=path.name, config=_configuration(conversion))
    if load is None:
        return _Reference(_filled(conversion), "as read by this tool (transformers doesn't read its layout)")
    try:
        model = load()
    except Exception as error:  # transformers raises anything
        return _Reference(_filled(conversion), f"as read by this tool (transformers: {_reason(error)})")
    for parameter in model.parameters():
        parameter.data = _rounded(parameter.data, conversion.config.dtype)
    return _Reference(model, "as read by transformers")


def _filled(conversion: Conversion) -> PreTrainedModel:
    """A model of transformers, filled with the values of the source's ``rows``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_configuration(conversion)).float().eval()
    quantized = conversion.kept_names
    weights = dict(model.named_parameters())
    for parameter in parameters(conversion.config):
        name = parameter.name
        for start, stop in row_blocks(0, parameter.shape[0], parameter.width):
            block = conversion.source.rows(name, start, stop)
            weights[name][start:stop] = block.float() if name in quantized else _rounded(block, conversion.config.dtype)
    return model


def _configuration(conversion: Conversion) -> Any:
    from transformers import AutoConfig

    fields = to_hf(conversion.config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _load(path: Path, **options: Any) -> PreTrainedModel:
    """The model that transformers loads, in float32. Raises ValueError where it lacks weights and made them up."""
    import torch
    from transformers import AutoModelForCausalLM

    with text_path(path) as readable:
        model, found = AutoModelForCausalLM.from_pretrained(
            readable, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found.get(problem):
            raise ValueError(f"{problem.replace('_', ' ')}: {', '.join(map(str, found[problem]))}")
    return model.eval()


def _rounded(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return weight.to(getattr(torch, dtype)).float()


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep other libraries' progress bars and warnings off stderr, which is for errors."""
    with redirect_stderr(io.StringIO()):
        yield
