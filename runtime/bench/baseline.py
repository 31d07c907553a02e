"""The baseline of llama-bench: transformers' own model, unchanged, with the same weights.

``transformers-lazy`` moves it to one XLA device: LazyTensor traces every step again, and because the cache grows, every
length not seen before is compiled. ``transformers-eager`` runs it on the host's CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.console.command import run
from converters.console.errors import InputError

if TYPE_CHECKING:
    import torch

    from quantize.shards.reading import Shards

INSTALL = "pip install 'llama-tpu-toolchain[bench]'"


@click.command()
@click.option("--shards", type=click.Path(path_type=Path), required=True)
@click.option("--backend", type=click.Choice(["transformers-lazy", "transformers-eager"]), required=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), required=True)
@click.option("--batch-size", type=int, required=True)
@click.option("--prompt-len", type=int, required=True)
@click.option("--max-new-tokens", type=int, required=True)
@click.option("--layers", type=int)
def command(
    shards: Path, backend: str, dtype: str, batch_size: int, prompt_len: int, max_new_tokens: int, layers: int | None
) -> None:
    """One run of the baseline; its figures as JSON on stdout, under llama-run's keys."""
    import torch

    from runtime.json_out import STDOUT, write_json_out

    begin = time.perf_counter()
    lazy = backend == "transformers-lazy"
    with torch.no_grad():
        model = load_model(shards, getattr(torch, dtype), layers)
        device = _LazyXLA() if lazy else _HostCPU()
        model.to(device.device)
        device.sync()
        loaded = time.perf_counter()
        drawn = torch.Generator().manual_seed(0)
        prompts = torch.randint(model.config.vocab_size, (batch_size, prompt_len), generator=drawn)
        if not lazy:  # the first tokens also set up memory and kernels; under LazyTensor, that is to be measured
            _generate(model, prompts, 2, device)
        first = _generate(model, prompts, max_new_tokens, device)
        compiled = device.compilations()
        again = _generate(model, prompts, max_new_tokens, device) if lazy else None
    figures = first.figures() | {
        "model": model.config._name_or_path,
        "platform": f"{device.kind}/{backend}",
        "chips": 1,
        "batch_size": batch_size,
        "prompt_tokens": prompt_len,
        "load_s": loaded - begin,
        "compilations": compiled,
        "memory": {"host_peak_rss_bytes": _host_peak_rss_bytes()},
        "token_ids": first.token_ids,
    }
    if again is not None:
        figures["repeated_per_token_latency_ms"] = again.figures()["per_token_latency_ms"]
    write_json_out(STDOUT, figures)


def load_model(directory: Path, dtype: torch.dtype, layers: int | None) -> Any:
    """transformers' model on the host, with the dequantized weights of the shards in ``directory``.

    Raises InputError where transformers is not installed.
    """
    import torch

    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise InputError(f"transformers can't be imported ({error}). Install it: {INSTALL}") from None
    from converters.model.architecture import Positions
    from converters.model.families.hf_config import to_hf
    from quantize.shards.reading import Shards

    shards = Shards(directory)
    fields = to_hf(shards.config.cut(layers))
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):  # spends no time on values that are replaced
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(_weights(shards, layers, dtype), assign=True)
    model.tie_weights()
    if shards.config.architecture.positions is Positions.ROTARY:
        rotary = type(model.model.rotary_emb)
        model.model.rotary_emb = rotary(config)  # its frequencies are not weights, so they are still on meta
    return model.eval()


def _weights(shards: Shards, layers: int | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter by its name in transformers, dequantized."""
    from converters.model.parameters import EMBEDDING, LM_HEAD, parameters

    config = shards.config.cut(layers)
    tensors = {
        parameter.name: shards.dequantized(parameter.name, 0, parameter.shape[0]).to(dtype)
        for parameter in parameters(config)
    }
    if config.tie_word_embeddings:
        tensors[LM_HEAD.name] = tensors[config.architecture.prefix + EMBEDDING.name]
    return tensors


class _HostCPU:
    """The host, which executes everything immediately."""

    kind = device = "cpu"

    def sync(self) -> None:
        """Do nothing: no work is pending."""

    def compilations(self) -> int:
        return 0


class _LazyXLA:
    """One XLA device under LazyTensor."""

    def __init__(self) -> None:
        from runtime.devices.tracing import lazy_compilations, lazy_device, lazy_sync
        from runtime.devices.xla import choose_device

        kind = choose_device()
        self.device, self.kind = lazy_device(kind), kind.lower()
        self.sync, self.compilations = lazy_sync, lazy_compilations


@dataclass(frozen=True)
class _Generated:
    """The tokens of each row, and the seconds that the prompt and the L steps after it took."""

    token_ids: list[list[int]]
    prefill_s: float
    decode_s: float

    def figures(self) -> dict[str, Any]:
        rows, steps = len(self.token_ids), len(self.token_ids[0])
        return {
            "new_tokens": steps,
            "latency_s": self.decode_s,
            "per_token_latency_ms": 1000 * self.decode_s / steps,
            "throughput_tokens_per_s": rows * steps / self.decode_s,
            "prefill_ms": 1000 * self.prefill_s,
        }


def _generate(model: Any, prompts: torch.Tensor, new_tokens: int, device: _HostCPU | _LazyXLA) -> _Generated:
    """Greedy decoding as llama-run counts it: the prompt without its last token, then one step per new token."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    prompts = prompts.to(device.device)
    device.sync()
    begin = time.perf_counter()
    if prompts.shape[1] > 1:
        model(prompts[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        device.sync()
    filled = time.perf_counter()
    tokens = prompts[:, -1:]
    produced = []
    for _ in range(new_tokens):
        tokens = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        device.sync()
        produced.append(tokens.cpu())
    done = time.perf_counter()
    return _Generated(torch.cat(produced, dim=1).tolist(), filled - begin, done - filled)


def _host_peak_rss_bytes() -> int:
    from runtime.run.metrics import host_peak_rss_bytes

    return host_peak_rss_bytes()


def main() -> None:
    """The process that llama-bench starts."""
    run(command)
