"""One run of llama-run: the prompts made ready, the decoder loaded and compiled, the generation and its figures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.config import ModelConfig
from converters.errors import InputError
from converters.progress import progress, spinner
from quantize.scheme import padding_bytes, stored_tensors
from quantize.shards import Shards
from runtime.backend import Backend
from runtime.generate import Generator, check_prompts
from runtime.load import load_decoder, make_cache
from runtime.metrics import Memory, Run, host_peak_rss_bytes
from runtime.sizing import cache_bytes_per_chip
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
    seed: int
    dtype: str
    backend: str
    layers: int | None


def run(request: Request) -> Run | None:
    """Generate from the shards. Returns None in the processes of a multi-host slice that don't speak for it.

    All that can be wrong with the input is found out before the device is brought up, but for missing chips' files:
    which of them this host needs, the device tells.
    """
    shards = Shards(request.shards)
    config = shards.config.cut(request.layers)
    codec = find_codec(request.shards)
    prompts = _prompts(request, config, codec)
    check_prompts(config, prompts, request.max_seq_len)
    prompt_tokens = max(map(len, prompts))
    room = request.max_seq_len - prompt_tokens + 1  # the last new token is never fed back
    backend = _backend(request.backend, shards)
    dtype = getattr(torch, request.dtype)
    begin = time.perf_counter()
    with torch.no_grad():
        total = sum(
            stored.spec(config, backend.chips).nbytes for stored in stored_tensors(config, shards.manifest.scheme)
        )
        with progress("Loading", total * backend.chips) as advance:
            decoder, parameter_bytes = load_decoder(shards, config, dtype, backend, advance)
            cache = make_cache(config, backend, len(prompts), request.max_seq_len, dtype)
            backend.wait()
        loaded = time.perf_counter()
        generator = Generator(config, decoder, cache, backend, request.buckets)
        with spinner("Compiling"):
            generator.warm_up([prompt_tokens])
        compiled = time.perf_counter()
        before = backend.compilations()
        generation = generator.generate(prompts, min(room, request.max_new_tokens))
        recompilations = backend.compilations() - before
    cache_bytes = cache_bytes_per_chip(config, backend.chips, len(prompts), request.max_seq_len, dtype.itemsize)
    padding = padding_bytes(config, shards.manifest.scheme, backend.chips) // backend.chips
    memory = Memory(parameter_bytes, padding, cache_bytes, backend.peak_bytes(), host_peak_rss_bytes())
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
        generation=generation,
        text=[codec.decode(ids) for ids in generation.token_ids] if codec else None,
    )


def _prompts(request: Request, config: ModelConfig, codec: TextCodec | None) -> list[list[int]]:
    """The token ids of every row: from text, from ids, or drawn by the seed."""
    if request.prompts:
        if codec is None:
            raise InputError(f"{request.shards} has no tokenizer.json to read --prompt with; give --prompt-ids.")
        prompts = [codec.encode(text) for text in request.prompts]
    elif request.prompt_ids is not None:
        prompts = [list(request.prompt_ids)]
    else:
        generator = torch.Generator().manual_seed(request.seed)
        drawn = torch.randint(config.vocab_size, (request.batch_size, request.prompt_len), generator=generator)
        return drawn.tolist()
    if len(prompts) > 1 and request.batch_size not in (1, len(prompts)):
        raise InputError(f"--batch-size {request.batch_size} contradicts {len(prompts)} prompts; leave it out.")
    return prompts if len(prompts) > 1 else prompts * request.batch_size


def _backend(name: str, shards: Shards) -> Backend:
    if name == "xla":
        from runtime.xla import XLABackend

        return XLABackend(shards.chips)
    from runtime.host import HostBackend

    return HostBackend(name)
