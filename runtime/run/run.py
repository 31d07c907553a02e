"""One run of llama-run: the prompts made ready, the decoder loaded and compiled, the generation and its figures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converters.console.errors import InputError
from converters.console.notes import note
from converters.console.progress import progress, spinner
from converters.model.config import ModelConfig
from converters.model.end_tokens import all_ends
from converters.tokenizers.auxiliary_files import read_auxiliary_files
from quantize.shards.reading import Shards
from quantize.shards.stored import padding_bytes, stored_tensors
from runtime.devices.backend import Backend
from runtime.model.decoder_tensors import DecoderParameters
from runtime.model.kv_cache import scale_bytes
from runtime.model.sampling import Sampling
from runtime.model.sizing import cache_bytes_per_chip, decode_bytes_per_chip
from runtime.run.generate import Generator, check_prompts
from runtime.run.later import Measurements, reason
from runtime.run.load import load_tensors, make_cache, make_decoder
from runtime.run.metrics import Formulas, LogitError, Measured, Run, Sizes, host_peak_rss_bytes
from runtime.run.text import TextCodec, find_codec


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    shards: Path
    prompts: tuple[str, ...]
    prompt_ids: tuple[int, ...] | None
    prompt_len: int
    max_new_tokens: int
    batch_size: int
    max_seq_len: int
    buckets: tuple[int, ...]
    sampling: Sampling
    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    backend: str
    layers: int | None
    compile_cache: Path | None


Tell = Callable[[list[list[int]], list[str] | None], None]


def run(request: Request, tell: Tell) -> Run | None:
    """Generate from the shards. Returns None in the processes of a multi-host slice that don't speak for it.

    ``tell`` is given every row's tokens, and their text where there is a tokenizer, as soon as they are there: what is
    measured after that may fail, or end the process. All that can be wrong with the input is found out before the
    device is brought up, but for missing chips' files: which of them this host needs, the device tells.
    """
    shards = Shards(request.shards)
    config = shards.config.cut(request.layers)
    config.check_context(request.max_seq_len)
    codec = find_codec(request.shards, config.vocab_size)
    stated = config.eos_token_ids
    config = replace(config, eos_token_ids=_end_tokens(request, config, codec))
    prompts = _prompts(request, config, codec)
    check_prompts(config, prompts, request.max_seq_len)
    prompt_tokens = max(map(len, prompts))
    room = request.max_seq_len - prompt_tokens + 1  # the last new token is never fed back
    backend = _backend(request, shards)
    begin = time.perf_counter()
    with torch.no_grad():
        tensors, parameter_bytes = _load(shards, config, backend)
        decoder = make_decoder(config, request.dtype, backend, tensors)
        cache = make_cache(config, backend, len(prompts), request.max_seq_len, request.kv_cache_dtype)
        backend.wait()
        loaded = time.perf_counter()
        sizes = _sizes(request, shards, config, backend, len(prompts), parameter_bytes)
        generator = Generator(config, decoder, cache, backend, request.buckets, not request.sampling.greedy)
        del cache  # its first tensors are to go as soon as a graph has written over them
        with spinner("Compiling"):
            generator.warm_up(longest_prompt=prompt_tokens)
        compiled = time.perf_counter()
        cache_use = backend.cache_use() if request.compile_cache else None
        before = backend.compilations()
        generation = generator.generate(prompts, min(room, request.max_new_tokens), request.sampling)
        recompilations = backend.compilations() - before
        text = _text(codec, prompts, generation.token_ids)
        if backend.leader:
            tell(generation.token_ids, text)
        del generator, decoder  # and the cache: what is measured from here on may need the room
        measured = _measure(request, config, backend, tensors, prompts)
    if not backend.leader:
        return None
    return Run(
        model=shards.manifest.model,
        platform=backend.platform,
        chips=backend.chips,
        batch_size=len(prompts),
        prompt_tokens=prompt_tokens,
        load_s=loaded - begin,
        compile_s=compiled - loaded,
        recompilations=recompilations,
        sizes=sizes,
        measured=measured,
        formulas=Formulas.of(config, len(prompts), request.max_seq_len),
        compile_cache=cache_use,
        generation=generation,
        end_tokens=_shown_ends(config, stated, codec),
        text=text,
    )


def _end_tokens(request: Request, config: ModelConfig, codec: TextCodec | None) -> tuple[int, ...]:
    """All ids that end a row: those of config.json, and what the files beside the shards name further."""
    control = codec.control_tokens() if codec else {}
    return all_ends(config.eos_token_ids, read_auxiliary_files(request.shards), control, str(request.shards))


def _shown_ends(config: ModelConfig, stated: tuple[int, ...], codec: TextCodec | None) -> str | None:
    """Ids and texts of the end tokens, where there are more than config.json has."""
    if not set(config.eos_token_ids) - set(stated):
        return None
    return ", ".join(f"{i} {codec.token(i) if codec else ''}".rstrip() for i in config.eos_token_ids)


def _load(shards: Shards, config: ModelConfig, backend: Backend) -> tuple[DecoderParameters, int]:
    """The decoder's tensors, and the bytes of parameters that each chip holds."""
    total = sum(stored.spec(config, backend.chips).nbytes for stored in stored_tensors(config, shards.manifest.scheme))
    with progress("Loading", total * backend.chips) as advance:
        return load_tensors(shards, config, backend, advance)


def _text(codec: TextCodec | None, prompts: list[list[int]], token_ids: list[list[int]]) -> list[str] | None:
    """What the tokens of every row stand for; None, with a note, where the tokenizer can't say."""
    if codec is None:
        return None
    try:
        return [codec.continuation(*row) for row in zip(prompts, token_ids, strict=True)]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exception
        note(f"The tokenizer can't turn these tokens into text ({reason(error)}); their ids stand in its place.")
        return None


def _sizes(
    request: Request, shards: Shards, config: ModelConfig, backend: Backend, batch_size: int, parameter_bytes: int
) -> Sizes:
    scheme, cache_dtype = shards.manifest.scheme, request.kv_cache_dtype
    cache = (batch_size, request.max_seq_len, cache_dtype.itemsize, scale_bytes(cache_dtype))
    return Sizes(
        parameter_bytes_per_chip=parameter_bytes,
        padding_bytes_per_chip=padding_bytes(config, scheme, backend.chips) // backend.chips,
        kv_cache_bytes_per_chip=cache_bytes_per_chip(config, backend.chips, *cache),
        kv_cache_dtype=str(cache_dtype).removeprefix("torch."),
        step_bytes=decode_bytes_per_chip(config, scheme, backend.chips, *cache) * backend.chips,
    )


def _measure(
    request: Request,
    config: ModelConfig,
    backend: Backend,
    tensors: DecoderParameters,
    prompts: list[list[int]],
) -> Measured:
    """What is measured when the generation is over: first the peaks, which the rest may raise."""
    later = Measurements()
    device_peak = later.attempt(Measured.DEVICE_PEAK, backend.peak_bytes)
    host_peak = later.attempt(Measured.HOST_PEAK, host_peak_rss_bytes)
    bandwidth = later.attempt(Measured.BANDWIDTH, backend.read_bandwidth)
    error = None
    if request.kv_cache_dtype not in (request.dtype, torch.float32):
        error = later.attempt(
            Measured.CACHE_ERROR, lambda: _cache_error(request, config, backend, tensors, prompts[:1])
        )
    return Measured(device_peak, host_peak, bandwidth, error, later.failures, later.interrupted)


def _cache_error(
    request: Request,
    config: ModelConfig,
    backend: Backend,
    tensors: DecoderParameters,
    prompts: list[list[int]],
) -> LogitError:
    """What the cache's dtype costs: logits [B, V] through it against those through one of float32.

    Both are computed in float32, of the same weights, so that they differ by nothing but the cache: in bfloat16 the
    rounding of activations, which the difference carries along, would be larger than what is looked for. Compiles
    graphs of its own.
    """
    decoder = make_decoder(config, torch.float32, backend, tensors)

    def logits(dtype: torch.dtype) -> torch.Tensor:
        cache = make_cache(config, backend, len(prompts), request.max_seq_len, dtype)
        return Generator(config, decoder, cache, backend, request.buckets).logits(prompts)

    with spinner("Measuring the cache's error: compiling in float32"):
        exact = logits(torch.float32)
        error = logits(request.kv_cache_dtype) - exact
    found = LogitError(error.abs().max().item(), (error.norm() / exact.norm()).item())
    if not math.isfinite(found.max_abs + found.relative):
        raise ArithmeticError("the logits are not all finite")
    return found


def _prompts(request: Request, config: ModelConfig, codec: TextCodec | None) -> list[list[int]]:
    """The token ids of every row: from text, from ids, or drawn by the seed."""
    if request.prompts:
        if codec is None:
            raise InputError(f"{request.shards} has no tokenizer.json to read --prompt with; give --prompt-ids.")
        prompts = [codec.encode(text) for text in request.prompts]
    elif request.prompt_ids is not None:
        prompts = [list(request.prompt_ids)]
    else:
        if request.prompt_len > request.max_seq_len:
            raise InputError(
                f"The prompt would be {request.prompt_len} tokens long and --max-seq-len is {request.max_seq_len}. "
                "Raise --max-seq-len, or lower --prompt-len."
            )
        generator = torch.Generator().manual_seed(request.sampling.seed)
        drawn = torch.randint(config.vocab_size, (request.batch_size, request.prompt_len), generator=generator)
        return drawn.tolist()
    if len(prompts) > 1 and request.batch_size not in (1, len(prompts)):
        raise InputError(f"--batch-size {request.batch_size} contradicts {len(prompts)} prompts; leave it out.")
    return prompts if len(prompts) > 1 else prompts * request.batch_size


def _backend(request: Request, shards: Shards) -> Backend:
    if request.backend == "xla":
        from runtime.devices.xla import XLABackend

        return XLABackend(shards.chips, request.compile_cache)
    from runtime.devices.host import HostBackend

    return HostBackend(request.backend, request.compile_cache)
