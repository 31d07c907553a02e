"""Run by tests in a process of its own: torch_xla takes its number of chips once, when it is imported.

``child_score.py JOB RESULT``: opens a session, warms it up for scores, and writes the scores of each batch, the logits
behind some of its first tokens, and how many graphs were compiled after the warm-up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from runtime.model import graphs
from runtime.run.session import open_session


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    graphs._SCORED_LOGITS = job["scored_logits"]
    options = {"backend": job["backend"], "max_seq_len": job["max_seq_len"], "buckets": job["buckets"]}
    with open_session(job["shards"], dtype=torch.float32, **options) as session:
        session.warm_up_scores()
        before = session.backend.compilations()
        scores = [session.score([row]).tolist()[0] for row in job["rows"]]
        recompilations = session.backend.compilations() - before
        logits = [session.logits([job["rows"][-1][:length]]).tolist()[0] for length in job["lengths"]]
    Path(result_path).write_text(json.dumps({"scores": scores, "logits": logits, "recompilations": recompilations}))


if __name__ == "__main__":
    main(*sys.argv[1:])
