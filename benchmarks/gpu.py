"""Checks and times every backend that runs here: python -m benchmarks.gpu

Builds networks from a seed, so that nothing is fetched; works from a checkout, without the
project's own dependencies. Rows are printed as they come; `--out FILE` keeps them as Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from app.cpu import cpu_limit
from app.types import Batch
from benchmarks.gpu_candidates import Candidate, Missing, Opened, Sizes, candidates, in_order
from benchmarks.gpu_ceilings import measure_ceilings
from benchmarks.gpu_models import IMAGES, Subject, build_subject
from benchmarks.gpu_report import Check, Report, Row, describe_machine
from models.buckets import bucket_sizes
from models.golden import golden_images
from models.tolerances import TOLERANCES, cosine_distance

ROUNDS = 5
SECONDS_A_ROUND = 0.2


@dataclass(frozen=True)
class Budget:
    """How long the whole may take; what would start after that is left out and said."""

    until: float

    def left(self) -> float:
        """Return seconds, negative when it is spent."""
        return self.until - time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit code is 1 where a backend fails, or disagrees with torch in float32."""
    arguments = _parser().parse_args(argv)
    device: Literal["cpu", "cuda"] = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU; run with --device cpu to measure the CPU", file=sys.stderr)
        return 2
    budget = Budget(time.monotonic() + 60 * arguments.minutes)
    print(describe_machine(device), flush=True)
    torch.set_num_threads(arguments.threads)
    report = Report(measure_ceilings(device), device, arguments.out)
    with tempfile.TemporaryDirectory(prefix="metaserve-benchmark-") as folder:
        for variant in arguments.variant or ["caformer_s18"]:
            subject = build_subject(variant, arguments.seed)
            for candidate in candidates(device, arguments.threads, arguments.compile_mode):
                _measure(candidate, subject, arguments.buckets, Path(folder), report, budget)
    print(f"\n{report.markdown()}")
    return int(report.failed or not all(check.passed for check in report.checks))


def _measure(
    candidate: Candidate,
    subject: Subject,
    buckets: Sizes,
    folder: Path,
    report: Report,
    budget: Budget,
) -> None:
    what = f"{subject.variant} {candidate.name} {candidate.precision}"
    sizes = [size for size in buckets if size <= (candidate.largest or size)]
    for group in in_order(sizes, candidate.one_by_one) if sizes else []:
        shown = ", ".join(map(str, group))
        if budget.left() < 0:
            report.add_missing(f"{what} at {shown}", "the time was up, see --minutes")
            continue
        started_at = time.perf_counter()
        try:
            opened = candidate.open(subject, group, folder)
        except Missing as error:
            report.add_missing(what, str(error))
            return
        except Exception as error:  # each library has errors of its own; the others go on
            report.add_failure(f"{what} at {shown}", error)
            continue
        opening = time.perf_counter() - started_at
        try:
            report.add_check(_check(candidate, opened, subject, group[-1]))
            for size in group:
                report.add_row(_time(candidate, opened, subject, size, opening / len(group)))
        except Exception as error:
            report.add_failure(f"{what} at {shown}", error)
        finally:
            opened.close()


def _check(candidate: Candidate, opened: Opened, subject: Subject, largest: int) -> Check:
    """Compare the answers to the golden images, in as large batches as fit."""
    images = golden_images(subject.input_size, IMAGES)
    rows = [opened.run(images[n : n + largest]) for n in range(0, IMAGES, largest)]
    logits = np.concatenate([one.logits for one in rows])
    embedding = np.concatenate([one.embedding for one in rows])
    tolerance = TOLERANCES[candidate.precision]
    return Check(
        subject.variant,
        candidate.name,
        candidate.precision,
        opened.words,
        difference=float(np.abs(logits - subject.logits).max()),
        allowed=tolerance.allowed(subject.logits),
        cosine_distance=float(cosine_distance(embedding, subject.embedding).max()),
        allowed_cosine_distance=tolerance.cosine,
        top1=float((logits.argmax(1) == subject.logits.argmax(1)).mean()),
    )


def _time(candidate: Candidate, opened: Opened, subject: Subject, size: int, opening: float) -> Row:
    batch: Batch = golden_images(subject.input_size, 1).repeat(size, 0)
    started_at = time.perf_counter()
    opened.run(batch)
    preparing = opening + time.perf_counter() - started_at
    wall = _median_seconds(lambda times: _repeat(opened, batch, times))
    replay = opened.replay
    device = None if replay is None else _median_seconds(lambda times: replay(size, times))
    return Row(subject, candidate.name, candidate.precision, size, wall, device, preparing)


def _repeat(opened: Opened, batch: Batch, times: int) -> None:
    for _ in range(times):
        opened.run(batch)


def _median_seconds(run: Callable[[int], None]) -> float:
    """Return the duration of one run: the median of rounds that are long enough to be told."""
    started_at = time.perf_counter()
    run(2)
    one = (time.perf_counter() - started_at) / 2
    times = max(1, round(SECONDS_A_ROUND / max(one, 1e-6)))
    durations = []
    for _ in range(ROUNDS if one < 1 else 2):
        started_at = time.perf_counter()
        run(times)
        durations.append((time.perf_counter() - started_at) / times)
    return statistics.median(durations)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--variant", action="append", metavar="NAME", help="[caformer_s18]")
    parser.add_argument(
        "--buckets", type=_sizes, default=bucket_sizes(256), metavar="N,N", help="[1,2,4 ... 256]"
    )
    parser.add_argument("--threads", type=int, default=cpu_limit(), metavar="N", help="on the CPU")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights")
    parser.add_argument(
        "--compile-mode", metavar="MODE", help="of torch.compile [max-autotune-no-cudagraphs]"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="nothing new starts after that [%(default)s]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write Markdown, after every row")
    return parser


def _sizes(text: str) -> Sizes:
    sizes = tuple(sorted({int(part) for part in text.split(",")}))
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError("batch sizes are 1 or more")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
