"""One run of llama-run: read the prompts, open a session, generate, report the tokens, measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from converters.console.notes import note
from quantize.shards.stored import padding_bytes
from runtime.devices.processes import guarded
from runtime.model.sampling import Sampling
from runtime.model.sizing import cache_bytes_per_chip, decode_bytes_per_chip
from runtime.run.later import reason
from runtime.run.measure import measure
from runtime.run.metrics import Formulas, Run, Sizes
from runtime.run.prompts import PromptChoice, read_prompts
from runtime.run.session import Session, SessionOptions
from runtime.run.stored_model import open_model
from runtime.run.text import TextCodec

Tell = Callable[[list[list[int]], list[str] | None], None]


def run(
    shards: Path, choice: PromptChoice, options: SessionOptions, max_new_tokens: int, sampling: Sampling, tell: Tell
) -> Run | None:
    """Generate from the shards. Returns None in those processes of a multi-host slice that write no output.

    ``tell`` is given every row's tokens, and their text if there is a tokenizer, as soon as they are generated, because
    later measurements may fail or end the process. Raises InputError for bad input before the device is started, except
    for missing chips' files: only the device can tell which of them this host needs. Of several processes all raise it
    where one lacks a file, or they were not given the same.
    """
    model = open_model(shards, options.max_seq_len, options.layers)
    prompts = read_prompts(choice, model, options.max_seq_len)
    prompt_tokens = max(map(len, prompts))
    options = replace(options, batch_size=len(prompts), sampled=not sampling.greedy)
    plans = {"prompts": prompts, "max_new_tokens": max_new_tokens, "sampling": sampling}
    with guarded(), Session(model, options, plans) as session:
        session.warm_up(longest_prompt=prompt_tokens)
        backend = session.backend
        cache_use = backend.cache_use() if options.compile_cache else None
        before = backend.compilations()
        generation = session.generate(prompts, max_new_tokens, sampling)
        recompilations = backend.compilations() - before
        text = _text(model.codec, prompts, generation.token_ids)
        if backend.leader:
            tell(generation.token_ids, text)
        session.release()  # the measurements may need the memory
        measured = measure(session, prompts[0])
    if not backend.leader:
        return None
    return Run(
        model=model.shards.manifest.model,
        platform=backend.platform,
        chips=backend.chips,
        batch_size=len(prompts),
        prompt_tokens=prompt_tokens,
        load_s=session.load_s,
        compile_s=session.compile_s,
        recompilations=recompilations,
        sizes=_sizes(session),
        measured=measured,
        formulas=Formulas.of(model.config, len(prompts), options.max_seq_len),
        compile_cache=cache_use,
        generation=generation,
        end_tokens=model.further_ends(),
        text=text,
    )


def _text(codec: TextCodec | None, prompts: list[list[int]], token_ids: list[list[int]]) -> list[str] | None:
    """The text of every row's tokens; None without a tokenizer, or, with a note, where it fails."""
    if codec is None:
        return None
    try:
        return [codec.continuation(*row) for row in zip(prompts, token_ids, strict=True)]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are not Exceptions
        note(f"The tokenizer can't turn these tokens into text ({reason(error)}); their ids stand in its place.")
        return None


def _sizes(session: Session) -> Sizes:
    config, scheme, chips = session.config, session.model.shards.manifest.scheme, session.backend.chips
    options, dtype = session.options, str(session.options.cache_dtype).removeprefix("torch.")
    cache = (options.batch_size, options.max_seq_len, dtype)
    return Sizes(
        parameter_bytes_per_chip=session.parameter_bytes_per_chip,
        padding_bytes_per_chip=padding_bytes(config, scheme, chips) // chips,
        kv_cache_bytes_per_chip=cache_bytes_per_chip(config, chips, *cache),
        kv_cache_dtype=dtype,
        step_bytes=decode_bytes_per_chip(config, scheme, chips, *cache) * chips,
    )
