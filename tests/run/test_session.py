"""A session: opened once, asked for text, logits, scores and single steps; what it refuses, and when."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import virtual_chips
from invoke import invoke, invoke_error
from models import make_model, make_opt
from parity import logits_after, reference
from transformers import PreTrainedModel

from converters.console.errors import InputError
from quantize.cli import command as quantize
from runtime.cli import command as run
from runtime.model import graphs
from runtime.model.sampling import Sampling
from runtime.run import session as session_module
from runtime.run.session import Session, open_session

VOCAB, SLOTS, BUCKETS = 131, 40, [8, 16]
LENGTHS = (2, 9, 16, 18, SLOTS + 1)  # of scored rows: one section, several, and one token more than the cache holds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("session")
    make_model(root / "hf", heads=6, kv_heads=2, hidden=48, head_dim=16, vocab=VOCAB)
    for chips in (1, 2):
        invoke(quantize, root / "hf", "--int8", "--chips", chips, "--out", root / f"out{chips}")
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return reference(folder / "hf", folder / "out1")


def opened(folder: Path, **options: Any) -> Session:
    fixed = {"backend": "eager", "dtype": torch.float32, "max_seq_len": SLOTS, "buckets": BUCKETS}
    return open_session(folder / "out1", **fixed | options)


def drawn(*lengths: int, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def expected_scores(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """What transformers' logits say of every token but the first, by torch's log-softmax in float64."""
    log_probabilities = logits_after(model, row[:-1]).double().log_softmax(-1)
    return log_probabilities.gather(-1, torch.tensor(row[1:])[:, None])[:, 0]


def difference(ours: Any, theirs: torch.Tensor) -> float:
    return (torch.as_tensor(ours).double() - theirs).abs().max().item()


# --- scores


@pytest.mark.parametrize(("backend", "chips"), [("eager", 1), ("xla", 2)])
def test_scores_are_transformers_log_softmax(
    backend: str, chips: int, folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every length by the graphs of the warm-up; and the session's own logits say the same, in float64."""
    rows, lengths = drawn(*LENGTHS), (1, 8, 20, SLOTS)
    monkeypatch.setattr(graphs, "_SCORED_LOGITS", 3 * VOCAB)  # logits of three tokens at a time
    virtual_chips.start()
    options = {"backend": backend, "dtype": torch.float32, "max_seq_len": SLOTS, "buckets": BUCKETS}
    with virtual_chips.quickly_compiled(), open_session(folder / f"out{chips}", **options) as session:
        session.warm_up_scores()
        before = session.backend.compilations()
        found = [session.score([row])[0] for row in rows]
        assert session.backend.compilations() == before
        last = [session.logits([rows[-1][:length]])[0] for length in lengths]
    for row, scores in zip(rows, found, strict=True):
        assert len(scores) == len(row) - 1
        assert difference(scores, expected_scores(model, row)) < 1e-4
    for length, logits in zip(lengths, last, strict=True):
        own = logits.double().log_softmax(-1)[rows[-1][length]]
        assert abs(found[-1][length - 1].item() - own.item()) < 1e-4


@pytest.mark.parametrize("once", [1, 3 * VOCAB, 1 << 24])
def test_rows_of_different_lengths_score_as_alone(once: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned at their ends, with NaN before a shorter row's second token; however many logits are made at once."""
    rows = drawn(30, 7, 2)
    with opened(folder) as alone:
        singles = [alone.score([row])[0] for row in rows]
    monkeypatch.setattr(graphs, "_SCORED_LOGITS", once)
    with opened(folder, batch_size=3) as batch:
        found = batch.score(rows)
        again = batch.score(rows)
    assert found.shape == (3, 29)
    assert found.dtype == torch.float32
    assert torch.equal(found.nan_to_num(), again.nan_to_num())
    for scores, single in zip(found, singles, strict=True):
        assert scores[: len(scores) - len(single)].isnan().all()
        assert difference(scores[-len(single) :], single.double()) < 1e-5


@pytest.mark.parametrize(
    "variety", [{"width": 40, "do_layer_norm_before": False}, {"tied": False, "do_layer_norm_before": True}], ids=str
)
def test_an_opt_scores_as_transformers(variety: dict[str, Any], tmp_path: Path) -> None:
    """With the projection behind its layers, without a last norm, with an output head of its own."""
    make_opt(tmp_path / "hf", vocab=VOCAB, **variety)
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "out1")
    [row] = drawn(30)
    with opened(tmp_path) as session:
        scores = session.score(torch.tensor([row]))[0]
    assert difference(scores, expected_scores(reference(tmp_path / "hf", tmp_path / "out1"), row)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_keep_float32_s_precision(dtype: torch.dtype) -> None:
    """Also of a token that is all but certain, and of logits far from zero."""
    logits = torch.randn(2, 3, 50_000, generator=torch.Generator().manual_seed(0)) * 3 + 70
    logits[0, 0, 7] = 120
    logits = logits.to(dtype)
    tokens = torch.tensor([[7, 1, 2], [49_999, 0, 5]])
    exact = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    found = graphs._log_probabilities(logits, tokens)
    assert found.dtype == torch.float32
    assert difference(found, exact) < 2e-5
    assert abs(found[0, 0].item() - exact[0, 0].item()) < 1e-12


# --- generating, whole and in parts


def test_steps_give_what_generate_does(folder: Path) -> None:
    prompts = drawn(21, 3)
    with opened(folder, batch_size=2, sampled=True) as session:
        session.warm_up(longest_prompt=21)
        for sampling in (Sampling(), Sampling(temperature=0.9, top_k=40, seed=5)):
            whole = session.generate(prompts, 12, sampling)
            session.prefill(prompts, sampling)
            steps = torch.stack([session.step() for _ in range(12)])  # [L, B]
            assert steps.T.tolist() == whole.token_ids
        firsts = [row[0] for row in session.generate(prompts, 1).token_ids]
        assert session.logits(prompts).argmax(-1).tolist() == firsts


def test_the_cache_ends_generating(folder: Path) -> None:
    """The last new token takes no slot."""
    [prompt] = drawn(SLOTS - 2)
    with opened(folder) as session:
        assert session.generate([prompt], 100).steps == 3
        session.prefill([prompt])
        for _ in range(3):
            session.step()
        with pytest.raises(ValueError, match="40 slots are full"):
            session.step()


def test_a_step_needs_a_batch_of_its_own(folder: Path) -> None:
    prompts = drawn(5)
    with opened(folder) as session:
        uses = (
            lambda: None,
            lambda: session.logits(prompts),
            lambda: session.score(prompts),
            lambda: session.generate(prompts, 2),
            session.warm_up,
        )
        for other in uses:
            other()
            with pytest.raises(ValueError, match="prefill"):
                session.step()
            session.prefill(prompts)
            session.step()


def test_a_step_s_tokens_are_the_caller_s(folder: Path) -> None:
    """Written over, they change nothing of what comes."""
    with opened(folder) as session:
        found = []
        for change in (False, True):
            session.prefill(drawn(5))
            tokens = []
            for _ in range(4):
                token = session.step()
                tokens.append(token.item())
                if change:
                    token.fill_(7)
            found.append(tokens)
    assert found[0] == found[1]


def test_an_interrupted_batch_is_not_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(folder) as session:
        session.prefill(drawn(5))
        generator, run_section, left = session.generator, session.generator._run_section, [1]

        def interrupted(*arguments: Any) -> Any:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return run_section(*arguments)

        monkeypatch.setattr(generator, "_run_section", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.logits(drawn(30))  # of two sections
        with pytest.raises(ValueError, match="prefill"):
            session.step()


def test_a_closed_session_holds_nothing(folder: Path) -> None:
    with opened(folder) as session:
        session.release()
        assert session.tensors
        with pytest.raises(ValueError, match="open another"):
            session.generate(drawn(3), 2)
    assert not session.tensors


# --- what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "cuda"}, "xla, inductor, eager"),
        ({"dtype": torch.int8}, "dtype can't be torch.int8"),
        ({"kv_cache_dtype": torch.float16}, "kv_cache_dtype can't be torch.float16"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_seq_len": 1.5}, "max_seq_len is 1.5"),
        ({"buckets": [16, 8]}, "ascending"),
        ({"buckets": []}, "ascending"),
        ({"compile_cache": Path("cache")}, "leave out compile_cache"),
        ({"layers": 3}, "give 1 to 2"),
    ],
    ids=str,
)
def test_options_are_refused_before_the_device(
    options: dict[str, Any], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "start_backend", _no_device)
    with pytest.raises(InputError, match=re.escape(says)):
        opened(folder, **options)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt-ids", VOCAB), "outside the vocabulary"),
        (("--prompt", "text"), "no tokenizer.json"),
        (("--prompt-ids", "3,4", "--max-seq-len", 1), "shorten the prompt"),
        (("--prompt-len", 9, "--max-seq-len", 8), "lower --prompt-len"),
        (("--layers", 3), "give 1 to 2"),
    ],
    ids=str,
)
def test_llama_run_refuses_prompts_before_the_device(
    arguments: tuple[object, ...], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "start_backend", _no_device)
    assert says in invoke_error(run, "--shards", folder / "out1", *arguments)


def _no_device(*_: Any) -> None:
    raise AssertionError("the device was brought up")


def test_rows_are_refused(folder: Path) -> None:
    with opened(folder, batch_size=2) as session:
        for rows, says in (
            (drawn(3), "for 2 rows and was given 1"),
            ([[3], []], "give at least one"),
            ([[3], [VOCAB]], "outside the vocabulary"),
            (drawn(3, SLOTS + 1), "shorten the prompt"),
        ):
            for use in (session.logits, session.prefill, lambda rows: session.generate(rows, 2)):
                with pytest.raises(InputError, match=says):
                    use(rows)
        for rows, says in (
            (drawn(3), "for 2 rows and was given 1"),
            (drawn(3, 1), "give two tokens or more"),
            ([[3, 4], [5, VOCAB]], "outside the vocabulary"),
            (drawn(3, SLOTS + 2), "score it in pieces"),
        ):
            with pytest.raises(InputError, match=says):
                session.score(rows)
        for rows in ([3, 4], ["ab", "cd"], torch.tensor([[3.5, 4], [5, 6]]), [[3, True], [4, 5]]):
            for use in (session.score, session.logits):
                with pytest.raises(InputError, match="list of whole numbers"):
                    use(rows)
        for count in (0, 2.5):
            with pytest.raises(InputError, match="max_new_tokens"):
                session.generate(drawn(3, 4), count)
        for warm_up, longest in ((session.warm_up, SLOTS + 1), (session.warm_up_scores, SLOTS + 2)):
            for tokens in (0, longest):
                with pytest.raises(InputError, match="can't be compiled for"):
                    warm_up(tokens)
