"""One run of a peer, or of our decoder in a way that llama-run doesn't offer; writes JSON to stdout.

decode_cpu.py starts this in a separate process. Every peer uses the int8 shards' dequantized weights and the same drawn
prompt, and counts time as llama-run does: the prompt without its last token is prefill, every step after it gives a
token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.shards.reading import Shards
from runtime.devices.bandwidth import measure_read_bandwidth
from runtime.devices.cpu.process import available_cpus
from runtime.run.metrics import host_peak_rss_bytes

SETTLING_STEPS = 3


class GptFastLinear(nn.Module):
    """gpt-fast's weight-only int8 linear: converts the weight to the activations' dtype and scales the result."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.flatten().to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(dtype=x.dtype)) * self.scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--libraries", type=Path)
    parser.add_argument("--gguf", type=Path)
    for name in ("batch-size", "prompt-len", "new-tokens", "max-seq-len"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    with torch.no_grad():
        figures = PEERS[options.peer](options)
    figures["memory"] = {"host_peak_rss_bytes": host_peak_rss_bytes()}
    read = figures.setdefault("bandwidth", {})
    read["read_bytes_per_s"] = measure_read_bandwidth(torch.device("cpu"))
    print(json.dumps(figures))


def drawn_prompts(options: argparse.Namespace) -> torch.Tensor:
    """The prompt that llama-run draws: [B, T]."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.prompt_len)
    return torch.randint(Shards(options.shards).config.vocab_size, shape, generator=generator)


def transformers_peer(
    dtype: torch.dtype, compiled: bool, change: Callable[[Any, Shards], None] = lambda model, shards: None
) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """transformers' model, eager or with its forward compiled and a cache of fixed length; ``change`` alters it."""

    def run(options: argparse.Namespace) -> dict[str, Any]:
        from transformers import DynamicCache, StaticCache

        from runtime.bench.baseline import load_model

        torch.set_num_threads(available_cpus())
        model = load_model(options.shards, dtype, None)
        change(model, Shards(options.shards))
        static = StaticCache(config=model.config, max_cache_len=options.max_seq_len)
        caches = [static]
        forward = torch.compile(model.forward, fullgraph=True, dynamic=False) if compiled else model.forward
        step_bytes = sum(held_bytes(t) for t in (*model.parameters(), *model.buffers()))
        if not model.config.tie_word_embeddings:
            step_bytes -= model.model.embed_tokens.weight.nbytes

        def call(tokens: torch.Tensor) -> torch.Tensor:
            found = forward(tokens, past_key_values=caches[0], use_cache=True, logits_to_keep=1)
            return found.logits[:, -1:].argmax(-1)

        def fill(prompts: torch.Tensor) -> None:
            static.reset()
            caches[0] = static if compiled else DynamicCache()
            call(prompts[:, :-1])

        return timed(drawn_prompts(options), options.new_tokens, fill, call, step_bytes)

    return run


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes in memory. (``nbytes`` of torchao's quantized tensors is that of the dtype they represent.)"""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(held_bytes(getattr(tensor, name)) for name in names)


def timed(
    prompts: torch.Tensor,
    new_tokens: int,
    fill: Callable[[torch.Tensor], None],
    step: Callable[[torch.Tensor], torch.Tensor],
    step_bytes: int,
) -> dict[str, Any]:
    """Time a prompt and the steps after it, following a warm-up for compilers and memory."""
    begin = time.perf_counter()
    for _ in range(2):
        fill(prompts)
    tokens = prompts[:, -1:].clone()  # contiguous strides, like the steps' results
    for _ in range(SETTLING_STEPS):
        tokens = step(tokens)
    ready = time.perf_counter()
    fill(prompts)
    filled = time.perf_counter()
    tokens, produced = prompts[:, -1:].clone(), []
    for _ in range(new_tokens):
        tokens = step(tokens)
        produced.append(tokens)
    done = time.perf_counter()
    return {
        "compile_s": ready - begin,
        "prefill_ms": 1000 * (filled - ready),
        "per_token_latency_ms": 1000 * (done - filled) / new_tokens,
        "token_ids": torch.cat(produced, dim=1).tolist(),
        "bandwidth": {"step_bytes": step_bytes},
    }


def _int8_linears(model: nn.Module, shards: Shards) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.weight_scale" in shards.tensors:
            out = module.out_features
            weight, scale = (shards.rows(f"{name}.{part}", 0, out) for part in ("weight", "weight_scale"))
            model.set_submodule(name, GptFastLinear(weight, scale))


def _torchao(model: nn.Module, shards: Shards) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: f"{name}.weight_scale" in shards.tensors)


def llama_cpp(options: argparse.Namespace) -> dict[str, Any]:
    from llama_cpp import LlamaCpp, generate

    vocab_size = Shards(options.shards).config.vocab_size
    sizes = (vocab_size, options.batch_size, options.max_seq_len, available_cpus())
    figures = generate(
        LlamaCpp(options.libraries, options.gguf, *sizes), drawn_prompts(options).tolist(), options.new_tokens
    )
    return figures | {"bandwidth": {"step_bytes": int(options.gguf.with_suffix(".bytes").read_text("utf-8"))}}


def our_form(dtype: str, unprepared: bool) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """Our decoder on XLA with float32 activations and every weight converted to ``dtype`` ("int8": unchanged).

    ``unprepared`` leaves weights and process as they are by default: ``x @ w.to(x.dtype).T``.
    """

    def run(options: argparse.Namespace) -> dict[str, Any]:
        import runtime.devices.xla
        from runtime.model.device_form import Form
        from runtime.run.generate import Generator
        from runtime.run.load import load_decoder, make_cache

        class Converted(Shards):
            """One chip's shards with their int8 weights dequantized."""

            def local(self, name: str, chip: int) -> torch.Tensor:
                if name.endswith("_scale"):
                    return torch.ones_like(super().local(name, chip))
                whole = Shards(options.shards).dequantized(name, 0, self.tensors[name].parameter.shape[0])
                return whole.to(getattr(torch, dtype))

            def local_blocks(self, name: str, chip: int, nbytes: int) -> Iterator[torch.Tensor]:
                yield self.local(name, chip)

        if unprepared:
            runtime.devices.xla.prepare_cpu_process = lambda: None
            runtime.devices.xla.compiler_options = lambda chips: {}
        backend = runtime.devices.xla.XLABackend(1)
        if unprepared:
            backend.tiled, backend.form = False, Form()
        shards = (Shards if dtype == "int8" else Converted)(options.shards)
        decoder, parameter_bytes = load_decoder(shards, shards.config, torch.float32, backend, lambda *done: None)
        found = {t.dtype for t in (*decoder.layers.parameters(), *decoder.layers.buffers()) if t.dim() > 1}
        if found != {getattr(torch, dtype)}:
            raise RuntimeError(f"the weights are {found} and should be {dtype}")
        cache = make_cache(shards.config, backend, options.batch_size, options.max_seq_len, torch.float32)
        bucket = options.prompt_len - 1
        generator = Generator(shards.config, decoder, cache, backend, [bucket])
        begin = time.perf_counter()
        generator.warm_up()
        ready = time.perf_counter()
        done = generator.generate(drawn_prompts(options).tolist(), options.new_tokens)
        return {
            "compile_s": ready - begin,
            "prefill_ms": 1000 * done.prefill_s,
            "per_token_latency_ms": 1000 * done.decode_s / done.steps,
            "token_ids": done.token_ids,
            "bandwidth": {"step_bytes": parameter_bytes - _embedding_bytes(shards)},
        }

    return run


def _embedding_bytes(shards: Shards) -> int:
    """Bytes of the embedding, if a step reads only one row of it per token; else 0."""
    config = shards.config
    return 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size


def lazy_transformers(options: argparse.Namespace) -> dict[str, Any]:
    """transformers' model moved to XLA unchanged. Every new length is compiled, so lengths seen before are timed."""
    from transformers import DynamicCache

    from runtime.bench.baseline import load_model
    from runtime.devices.tracing import lazy_device, lazy_sync

    device = lazy_device("CPU")
    model = load_model(options.shards, torch.bfloat16, None).to(device)
    prompts = drawn_prompts(options).to(device)
    new_tokens, last = min(options.new_tokens, 4), prompts.shape[1] - 1
    caches = [DynamicCache()]

    def call(tokens: torch.Tensor) -> torch.Tensor:
        found = model(tokens, past_key_values=caches[0], use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        lazy_sync()
        return found

    def generate() -> tuple[list[float], float]:
        caches[0] = DynamicCache()
        begin = time.perf_counter()
        call(prompts[:, :last]).cpu()  # a sync may return before the device is done
        filled, tokens, seconds = time.perf_counter(), prompts[:, -1:], []
        for _ in range(new_tokens):
            start = time.perf_counter()
            tokens = call(tokens)
            tokens.cpu()
            seconds.append(time.perf_counter() - start)
        return seconds, filled - begin

    first, _ = generate()
    again, prefill_s = generate()
    return {
        "compile_s": 0.0,
        "prefill_ms": 1000 * prefill_s,
        "per_token_latency_ms": 1000 * statistics.mean(again),
        "new_lengths_per_token_latency_ms": 1000 * statistics.mean(first),
        "token_ids": [],
        "bandwidth": {"step_bytes": sum(p.nbytes for p in model.parameters())},
    }


PEERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "transformers-eager-float32": transformers_peer(torch.float32, compiled=False),
    "transformers-eager-bfloat16": transformers_peer(torch.bfloat16, compiled=False),
    "transformers-compile-float32": transformers_peer(torch.float32, compiled=True),
    "transformers-compile-bfloat16": transformers_peer(torch.bfloat16, compiled=True),
    "torchao-int8": transformers_peer(torch.bfloat16, compiled=True, change=_torchao),
    "gpt-fast-int8": transformers_peer(torch.bfloat16, compiled=True, change=_int8_linears),
    "llama.cpp-q8_0": llama_cpp,
    "transformers-xla": lazy_transformers,
    "xla-unprepared": our_form("int8", unprepared=True),
    "xla-prepared-bfloat16": our_form("bfloat16", unprepared=False),
    "xla-prepared-float32": our_form("float32", unprepared=False),
}

if __name__ == "__main__":
    main()
