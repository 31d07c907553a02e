"""The decode loop: launched ahead of what the host reads, ended by end tokens, counted as it ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from invoke import invoke
from models import make_model

from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from runtime.devices.host import HostBackend
from runtime.model.graphs import greedy_graph
from runtime.model.sampling import Sampling
from runtime.run.generate import Generation, Generator
from runtime.run.load import load_decoder, make_cache

PROMPTS = [[3, 4, 5], [6, 7, 8, 9], [10]]


STEPS_AHEAD = 4


class RecordingTensor(torch.Tensor):
    """A tensor that notes when it is brought to the host."""

    events: list[Any]

    def cpu(self) -> torch.Tensor:
        self.events.append("read")
        return self.as_subclass(torch.Tensor)


class RecordingBackend(HostBackend):
    """The eager backend, which notes when a decode step is launched and when its tokens are read."""

    steps_ahead = STEPS_AHEAD

    def __init__(self) -> None:
        super().__init__("eager")
        self.events: list[str] = []

    def compile(self, function: Any, donates: int, exact: bool = False, name: str | None = None) -> Any:
        def launch(*args: Any) -> Any:
            results = function(*args)
            if function.__name__ != greedy_graph.__name__:
                return results
            self.events.append("launch")
            tokens = results[0].as_subclass(RecordingTensor)
            tokens.events = self.events
            return (tokens, *results[1:])

        return launch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    root = tmp_path_factory.mktemp("generate")
    make_model(root / "hf")
    invoke(quantize, root / "hf", "--int8", "--out", root / "out")
    return Shards(root / "out")


def _generate(
    shards: Shards, backend: HostBackend, new_tokens: int, ends: tuple[int, ...] = (), prompts: Any = PROMPTS
) -> Generation:
    from dataclasses import replace

    config = replace(shards.config, eos_token_ids=ends)
    with torch.no_grad():
        decoder, _ = load_decoder(shards, config, torch.float32, backend, lambda *done: None)
        cache = make_cache(config, backend, len(prompts), 64, torch.float32)
        return Generator(config, decoder, cache, backend, [8]).generate(prompts, new_tokens)


def test_steps_are_launched_before_the_last_ones_are_read(shards: Shards) -> None:
    backend = RecordingBackend()
    generation = _generate(shards, backend, 20)
    assert generation.steps == 20
    ahead, most = 0, 0
    for place, event in enumerate(backend.events):
        ahead += 1 if event == "launch" else -1
        most = max(most, ahead)
        launched = backend.events[: place + 1].count("launch")
        if event == "read" and launched < 20:
            assert ahead == STEPS_AHEAD  # so many are still under way when the host waits for tokens
    assert most == STEPS_AHEAD + 1
    assert backend.events.count("read") == 20


def test_every_row_stops_at_its_own_end_token(shards: Shards) -> None:
    free = _generate(shards, HostBackend("eager"), 30).token_ids
    end = next(token for token in free[0][3:] if any(token in row[:12] for row in free[1:]) or token == free[0][5])
    generation = _generate(shards, HostBackend("eager"), 30, (end,))
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert generation.token_ids == expected
    assert min(map(len, expected)) < 30


def test_decoding_ends_a_few_steps_after_the_last_row_has(shards: Shards) -> None:
    free = _generate(shards, HostBackend("eager"), 30, prompts=PROMPTS[:1]).token_ids[0]
    end = free[4]
    needed = free.index(end) + 1
    backend = RecordingBackend()
    generation = _generate(shards, backend, 30, (end,), prompts=PROMPTS[:1])
    assert generation.token_ids == [free[:needed]]
    assert generation.steps == needed + STEPS_AHEAD == backend.events.count("launch")


def test_a_host_that_has_done_a_step_reads_it_at_once(shards: Shards) -> None:
    backend = RecordingBackend()
    backend.steps_ahead = HostBackend.steps_ahead
    _generate(shards, backend, 5)
    assert backend.events == ["launch", "read"] * 5


@pytest.mark.parametrize("new_tokens", [1, 2, STEPS_AHEAD, STEPS_AHEAD + 1])
def test_few_tokens(shards: Shards, new_tokens: int) -> None:
    generation = _generate(shards, HostBackend("eager"), new_tokens)
    assert [len(row) for row in generation.token_ids] == [new_tokens] * 3
    assert generation.steps == new_tokens
    assert 0 < generation.prefill_s < generation.first_token_s <= generation.prefill_s + generation.decode_s


def test_a_greedy_generator_does_not_sample(shards: Shards) -> None:
    backend = HostBackend("eager")
    with torch.no_grad():
        decoder, _ = load_decoder(shards, shards.config, torch.float32, backend, lambda *done: None)
        cache = make_cache(shards.config, backend, 1, 64, torch.float32)
        generator = Generator(shards.config, decoder, cache, backend, [8])
        with pytest.raises(ValueError, match="sampled=True"):
            generator.generate([[1]], 2, Sampling(1.0))
