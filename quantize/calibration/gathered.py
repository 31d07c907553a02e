"""Moments in a directory of their own, gathered once for every format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.console.notes import note
from converters.console.progress import counted
from converters.model.config import ModelConfig
from converters.output.claim import Output, Wanted, claim
from converters.output.state import State
from converters.sources.source import TensorSource
from quantize.calibration.calibrator import Calibration, find_calibrator
from quantize.calibration.moments import FILE_NAME, GRADIENTS, Moments, read_moments

GRADIENT_TOKENS = 2048  # of the text's: a mean over outputs needs fewer than one by input
_FORCE, _KEEPS = "Give --force", ", and --force keeps it"  # of claim's messages


def find_moments(directory: Path, source: TensorSource, config: ModelConfig, calibration: Calibration) -> Moments:
    """Those in ``directory``, gathered first where they aren't there.

    ``config`` is the source's own, possibly cut to fewer layers. Raises InputError where the directory has others.
    """

    def gather(key: str) -> Moments:
        with counted("Calibrating", config.num_layers) as advance:
            return find_calibrator().gather_moments(source, config, calibration.windows, directory, key, advance)

    return _found_or_gathered(directory / FILE_NAME, source, config, calibration, gather, of_inputs=True)


def find_gradients(directory: Path, source: TensorSource, config: ModelConfig, calibration: Calibration) -> Moments:
    """The same of the gradients by the linears' outputs, over the first tokens."""

    def gather(key: str) -> Moments:
        windows = calibration.windows[: max(1, GRADIENT_TOKENS // calibration.windows.shape[1])]
        with counted("Differentiating", 2 * config.num_layers) as advance:
            return find_calibrator().gather_gradients(source, config, windows, directory, key, advance)

    return _found_or_gathered(directory / GRADIENTS, source, config, calibration, gather, of_inputs=False)


def _found_or_gathered(
    path: Path,
    source: TensorSource,
    config: ModelConfig,
    calibration: Calibration,
    gather: Callable[[str], Moments],
    of_inputs: bool,
) -> Moments:
    arguments = {
        "source_fingerprint": source.fingerprint(),
        "layers": config.num_layers,
        "calibration": calibration.as_json(),
    }
    wanted = Wanted("llama-quantize", path.parent, arguments, tuple(source.files()), (path.name,))
    with _claimed(wanted) as output:
        if output.state is State.FINISHED:
            note(f"{path} is of this model and this text: it is taken.")
        else:
            key = key_of({**arguments, "file": path.name})
            found = gather(key)
            output.check_sources()
            output.write({path.name: found.to_file({"calibration": json.dumps(calibration.as_json())})})
            find_calibrator().clear(path.parent, key, config)
    return read_moments(path, config, of_inputs)


@contextmanager
def _claimed(wanted: Wanted) -> Iterator[Output]:
    """``claim``, with what is to be done about a directory of something else said for --moments."""
    entered = False
    try:
        with claim(wanted, lambda path: None, lambda existing: None, force=False) as output:
            entered = True
            yield output
    except InputError as error:
        if entered:
            raise
        problem = str(error).replace(_KEEPS, "").replace("--out", "--moments")
        if _FORCE in problem:
            problem = f"{wanted.out} holds something else than the moments of this model's layers over this text. "
            problem += "Take it away, or give another --moments."
        raise InputError(problem) from None


def key_of(arguments: dict[str, Any]) -> str:
    """What tells one run's files from another's."""
    return sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
