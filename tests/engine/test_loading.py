"""A package becomes a warm engine, or is refused with the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.backends.fake import FakeBackend
from app.backends.ort import OnnxRuntimeBackend
from app.engine.loading import check_golden, start_tolerances, warm_up
from app.types import Batch, Rows
from models.golden import golden_images
from models.package import (
    Package,
    PackageError,
    find_package,
    open_package,
)
from tests.engine.doubles import ManualClock

Change = Callable[[Rows], None]
"""Writes into the rows of a batch."""


@pytest.fixture(scope="module")
def package() -> Package:
    return open_package(find_package("caformer_digits"))


class GoldenBackend(FakeBackend):
    """Knows the golden answers by heart, and changes them alone or in company."""

    def __init__(
        self, package: Package, *, alone: Change | None = None, together: Change | None = None
    ) -> None:
        manifest = package.manifest
        super().__init__(manifest.input.size, manifest.classes, manifest.embedding_dim)
        self._answers = package.golden
        self._images = golden_images(manifest.input.size, len(package.golden[0]))
        self._alone, self._together = alone, together

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        found = [
            next(n for n, known in enumerate(self._images) if np.array_equal(known, image))
            for image in batch
        ]
        logits, embedding = self._answers
        rows = Rows(logits[found], embedding[found])
        change = self._together if len(batch) > 1 else self._alone
        if change is not None:
            change(rows)
        return rows


def move_logits(by: float) -> Change:
    def change(rows: Rows) -> None:
        rows.logits[-1, 3] += by

    return change


def move_embedding(by: float) -> Change:
    def change(rows: Rows) -> None:
        rows.embedding[-1, 3] += by

    return change


def allowed(package: Package) -> float:
    return start_tolerances("fp32", package.golden[0])[0]


def test_the_embedded_package_is_accepted_on_onnxruntime(package: Package) -> None:
    backend = OnnxRuntimeBackend(package, "cpu", threads=1)
    check = check_golden(backend, package)
    assert check.max_abs_logit_difference <= package.manifest.verification.logit_tolerance
    assert check.batch_dependence == 0.0
    backend.close()


def test_a_backend_that_knows_the_answers_is_accepted(package: Package) -> None:
    check = check_golden(GoldenBackend(package), package)
    assert check.max_abs_logit_difference == 0.0
    assert check.batch_dependence == 0.0


def test_a_difference_within_the_tolerance_is_accepted_and_told(package: Package) -> None:
    small = 0.5 * allowed(package)
    check = check_golden(GoldenBackend(package, together=move_logits(small)), package)
    assert check.max_abs_logit_difference == pytest.approx(small, rel=1e-2)
    assert check.batch_dependence == pytest.approx(small, rel=1e-2)


@pytest.mark.parametrize("wrong", [0.01, -0.01, 1e9, float("nan"), float("inf")])
def test_logits_that_are_off_are_refused_alone_and_in_company(
    package: Package, wrong: float
) -> None:
    for backend in (
        GoldenBackend(package, alone=move_logits(wrong)),
        GoldenBackend(package, together=move_logits(wrong)),
    ):
        with pytest.raises(PackageError, match="does not reproduce the golden outputs") as refusal:
            check_golden(backend, package)
        assert "logits differ by" in str(refusal.value)
        assert "0.001 is allowed" in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("wrong", [5.0, -5.0, float("nan"), float("inf")])
def test_embeddings_that_are_off_are_refused_alone_and_in_company(
    package: Package, wrong: float
) -> None:
    for backend in (
        GoldenBackend(package, alone=move_embedding(wrong)),
        GoldenBackend(package, together=move_embedding(wrong)),
    ):
        with pytest.raises(PackageError, match="embeddings differ"):
            check_golden(backend, package)


def test_embeddings_within_the_tolerance_are_accepted(package: Package) -> None:
    length = float(np.linalg.norm(package.golden[1][-1]))
    small = 0.5 * start_tolerances("fp32", package.golden[0])[1] * length
    check_golden(GoldenBackend(package, together=move_embedding(small)), package)


@pytest.mark.parametrize(("most", "sizes"), [(2, [2, 1, 1]), (8, [5, 1, 1, 1, 1, 1])])
def test_a_backend_gets_no_more_golden_images_at_once_than_it_takes(
    package: Package, most: int, sizes: list[int]
) -> None:
    class Bounded(GoldenBackend):
        def __init__(self) -> None:
            super().__init__(package)
            self.info = replace(self.info, max_batch_size=most)
            self.sizes: list[int] = []

        def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
            self.sizes.append(len(batch))
            return super().run(batch)

    backend = Bounded()
    assert check_golden(backend, package).max_abs_logit_difference == 0.0
    assert backend.sizes == sizes


def test_a_backend_that_ignores_the_network_is_refused(package: Package) -> None:
    manifest = package.manifest
    backend = FakeBackend(manifest.input.size, manifest.classes, manifest.embedding_dim)
    with pytest.raises(PackageError):
        check_golden(backend, package)


class CostedBackend(FakeBackend):
    """Every batch takes what its cost says, on a clock of its own."""

    def __init__(self, cost: Callable[[int, int], float]) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.sizes: list[int] = []
        self._cost = cost

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        self.clock.advance(self._cost(len(batch), self.sizes.count(len(batch))))
        self.sizes.append(len(batch))
        return super().run(batch)


def distinct(sizes: list[int]) -> list[int]:
    return list(dict.fromkeys(sizes))


def test_warm_up_goes_to_the_limit_while_larger_batches_gain() -> None:
    backend = CostedBackend(lambda size, run: 1.0)
    times = warm_up(backend, 32, clock=backend.clock)
    assert distinct(backend.sizes) == [1, 2, 4, 8, 16, 32]
    assert times.as_dict() == dict.fromkeys([1, 2, 4, 8, 16, 32], 1.0)
    assert times.largest_useful() == 32


def test_warm_up_stops_when_two_sizes_in_a_row_gain_nothing() -> None:
    backend = CostedBackend(lambda size, run: max(size, 2) / 2)  # no faster per image beyond 2
    times = warm_up(backend, 1024, clock=backend.clock)
    assert distinct(backend.sizes) == [1, 2, 4, 8]
    assert times.largest_useful() == 2


def test_warm_up_goes_on_over_one_size_that_does_not_gain() -> None:
    cost = {1: 1.0, 2: 2.0, 4: 1.0, 8: 2.0, 16: 4.0}
    backend = CostedBackend(lambda size, run: cost[size])
    times = warm_up(backend, 64, clock=backend.clock)
    assert distinct(backend.sizes) == [1, 2, 4, 8, 16]
    assert times.largest_useful() == 4


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 4, 7]), (8, [1, 2, 4, 8])]
)
def test_warm_up_never_runs_more_than_the_limit(limit: int, sizes: list[int]) -> None:
    backend = CostedBackend(lambda size, run: 1.0)
    warm_up(backend, limit, clock=backend.clock)
    assert distinct(backend.sizes) == sizes


def test_warm_up_keeps_the_best_run_and_does_not_count_the_first() -> None:
    # The first run of a size is the one that compiles; here it is the fastest, to be told apart.
    costs = [0.1, 5.0, 3.0]
    backend = CostedBackend(lambda size, run: costs[run])
    assert warm_up(backend, 1, clock=backend.clock).as_dict() == {1: pytest.approx(3.0)}
    assert backend.sizes == [1] * 3


def test_warm_up_goes_on_until_a_second_run_confirms_the_best() -> None:
    costs = [0.1, 0.9, 0.3, 0.2, 0.25, 0.205, 7.0]  # a busy machine; the first is not counted
    backend = CostedBackend(lambda size, run: costs[run] / 10)
    assert warm_up(backend, 1, clock=backend.clock).as_dict() == {1: pytest.approx(0.02)}
    assert len(backend.sizes) == 6


def test_warm_up_does_not_wait_for_a_machine_that_never_comes_to_rest() -> None:
    backend = CostedBackend(lambda size, run: 0.5 / (1.1**run))  # ever faster
    warm_up(backend, 1, clock=backend.clock)
    assert len(backend.sizes) == 4, "the uncounted one, and those within a second"


def test_a_package_without_golden_outputs_is_refused_in_words(
    package: Package, tmp_path: Path
) -> None:
    files = {name: value for name, value in package.manifest.files.items() if name != "golden.npz"}
    bare = Package(tmp_path, package.manifest.model_copy(update={"files": files}))
    with pytest.raises(PackageError, match=r"holds no golden\.npz"):
        check_golden(GoldenBackend(package), bare)


@pytest.mark.parametrize(("classes", "dim"), [(9, 64), (11, 64), (10, 63)])
def test_a_graph_of_other_widths_than_the_golden_outputs_is_refused(
    package: Package, classes: int, dim: int
) -> None:
    backend = FakeBackend(package.manifest.input.size, classes, dim)
    with pytest.raises(PackageError, match="answers with shapes"):
        check_golden(backend, package)


def test_a_graph_that_cannot_be_run_is_refused_in_one_sentence(package: Package) -> None:
    class Broken(FakeBackend):
        def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
            raise RuntimeError("the axes do not fit\nand more about it")

    with pytest.raises(PackageError, match=r"cannot be run on .*: the axes do not fit$"):
        check_golden(Broken(package.manifest.input.size), package)
