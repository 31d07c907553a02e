"""One run of llama-run: the prompts made ready, the decoder loaded and compiled, the generation and its figures."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converters.companions import read_companions
from converters.config import ModelConfig
from converters.end_tokens import all_ends
from converters.errors import InputError
from converters.progress import progress, spinner
from quantize.scheme import padding_bytes, stored_tensors
from quantize.shards import Shards
from runtime.backend import Backend
from runtime.decoder import Decoder
from runtime.generate import Generator, check_prompts
from runtime.kv_cache import scale_bytes
from runtime.load import load_decoder, make_cache
from runtime.metrics import Bandwidth, Formulas, LogitError, Memory, Run, host_peak_rss_bytes
from runtime.sampling import Sampling
from runtime.sizing import cache_bytes_per_chip, decode_bytes_per_chip
from runtime.text import TextCodec, find_codec


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


def run(request: Request) -> Run | None:
    """Generate from the shards. Returns None in the processes of a multi-host slice that don't speak for it.

    All that can be wrong with the input is found out before the device is brought up, but for missing chips' files:
    which of them this host needs, the device tells.
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
        decoder, parameter_bytes = _load(request, shards, config, backend)
        cache = make_cache(config, backend, len(prompts), request.max_seq_len, request.kv_cache_dtype)
        backend.wait()
        loaded = time.perf_counter()
        generator = Generator(config, decoder, cache, backend, request.buckets, not request.sampling.greedy)
        del cache  # its first tensors are to go as soon as a graph has written over them
        with spinner("Compiling"):
            generator.warm_up(longest_prompt=prompt_tokens)
        compiled = time.perf_counter()
        cache_use = backend.cache_use() if request.compile_cache else None
        before = backend.compilations()
        generation = generator.generate(prompts, min(room, request.max_new_tokens), request.sampling)
        recompilations = backend.compilations() - before
        del generator  # and its cache: what is measured from here on may need the room
        memory = _memory(request, shards, config, backend, len(prompts), parameter_bytes)
        logit_error = None
        if request.kv_cache_dtype != request.dtype:
            logit_error = _cache_error(request, config, decoder, backend, prompts)
        bandwidth = Bandwidth(memory.step_bytes_per_chip * backend.chips, backend.read_bandwidth())
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
        memory=memory,
        bandwidth=bandwidth,
        formulas=Formulas.of(config, len(prompts), request.max_seq_len),
        compile_cache=cache_use,
        cache_logit_error=logit_error,
        generation=generation,
        end_tokens=_shown_ends(config, stated, codec),
        text=[codec.continuation(*row) for row in zip(prompts, generation.token_ids, strict=True)] if codec else None,
    )


def _end_tokens(request: Request, config: ModelConfig, codec: TextCodec | None) -> tuple[int, ...]:
    """All ids that end a row: those of config.json, and what the files beside the shards name further."""
    control = codec.control_tokens() if codec else {}
    return all_ends(config.eos_token_ids, read_companions(request.shards), control, str(request.shards))


def _shown_ends(config: ModelConfig, stated: tuple[int, ...], codec: TextCodec | None) -> str | None:
    """Ids and texts of the end tokens, where there are more than config.json has."""
    if not set(config.eos_token_ids) - set(stated):
        return None
    return ", ".join(f"{i} {codec.token(i) if codec else ''}".rstrip() for i in config.eos_token_ids)


def _load(request: Request, shards: Shards, config: ModelConfig, backend: Backend) -> tuple[Decoder, int]:
    """The decoder, and the bytes of parameters that each chip holds."""
    total = sum(stored.spec(config, backend.chips).nbytes for stored in stored_tensors(config, shards.manifest.scheme))
    with progress("Loading", total * backend.chips) as advance:
        return load_decoder(shards, config, request.dtype, backend, advance)


def _memory(
    request: Request, shards: Shards, config: ModelConfig, backend: Backend, batch_size: int, parameter_bytes: int
) -> Memory:
    scheme, cache_dtype = shards.manifest.scheme, request.kv_cache_dtype
    cache = (batch_size, request.max_seq_len, cache_dtype.itemsize, scale_bytes(cache_dtype))
    return Memory(
        parameter_bytes_per_chip=parameter_bytes,
        padding_bytes_per_chip=padding_bytes(config, scheme, backend.chips) // backend.chips,
        kv_cache_bytes_per_chip=cache_bytes_per_chip(config, backend.chips, *cache),
        kv_cache_dtype=str(cache_dtype).removeprefix("torch."),
        step_bytes_per_chip=decode_bytes_per_chip(config, scheme, backend.chips, *cache),
        device_peak_bytes=backend.peak_bytes(),
        host_peak_rss_bytes=host_peak_rss_bytes(),
    )


def _cache_error(
    request: Request, config: ModelConfig, decoder: Decoder, backend: Backend, prompts: list[list[int]]
) -> LogitError:
    """What the cache's dtype costs: the first prompt's logits against those through one of the activations' dtype."""

    def logits(dtype: torch.dtype) -> torch.Tensor:
        cache = make_cache(config, backend, 1, request.max_seq_len, dtype)
        return Generator(config, decoder, cache, backend, request.buckets).logits(prompts[:1]).float()

    with spinner("Measuring the cache's error"):
        exact = logits(request.dtype)
        error = logits(request.kv_cache_dtype) - exact
    return LogitError(error.abs().max().item(), (error.norm() / exact.norm()).item())


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
        from runtime.xla import XLABackend

        return XLABackend(shards.chips, request.compile_cache)
    from runtime.host import HostBackend

    return HostBackend(request.backend, request.compile_cache)
