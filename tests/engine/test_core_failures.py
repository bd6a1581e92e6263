"""EngineCore over a backend that fails, or answers nonsense: who is told what."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from app.errors import (
    BackendUnavailable,
    InferenceFailed,
)
from app.types import Rows
from tests.engine.doubles import (
    Caller,
    CountingObserver,
    Spoil,
    WatchedBackend,
    hold_one,
    not_finite_for,
    nothing,
    raise_for,
    running,
    submit,
    too_few,
)


def run_one_batch(backend: WatchedBackend, *values: int) -> list[Caller]:
    """Answer these in one batch, as company of each other; the first batch is a healthy one."""
    assert not backend.gate.is_set()
    with running(backend, max_batch_size=len(values)) as core:
        plug = hold_one(core, backend, 255)
        callers = submit(core, *values)
        backend.gate.set()
        plug.assert_got_its_row()
        for caller in callers:
            caller.answer()
    assert backend.batches[1] == list(values)
    assert all(len(caller.answers) == 1 for caller in callers)
    return callers


def assert_only_culprits_failed(callers: list[Caller], *culprits: int) -> None:
    for caller in callers:
        if caller.value in culprits:
            assert type(caller.error()) is InferenceFailed
        else:
            caller.assert_got_its_row()


@pytest.mark.parametrize("culprit", range(1, 8))
def test_one_image_that_breaks_its_batch_fails_alone(culprit: int) -> None:
    backend = WatchedBackend(shut=True, spoil=raise_for(culprit))
    callers = run_one_batch(backend, *range(1, 8))
    assert_only_culprits_failed(callers, culprit)


def test_a_batch_that_breaks_is_searched_in_halves() -> None:
    backend = WatchedBackend(shut=True, spoil=raise_for(3))
    run_one_batch(backend, 1, 2, 3, 4)
    assert backend.batches[1:] == [[1, 2, 3, 4], [1, 2], [3, 4], [3], [4]]


def test_a_backend_that_always_raises_fails_everybody_and_the_engine_lives() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend, max_batch_size=5) as core:
        hold_one(core, backend)
        callers = submit(core, *range(1, 6))
        backend.spoil = raise_for(*range(256))
        backend.gate.set()
        assert all(type(caller.error()) is InferenceFailed for caller in callers)
        backend.spoil = None
        (after,) = submit(core, 9)
        after.assert_got_its_row()


def test_what_breaks_only_in_company_is_answered_alone() -> None:
    def only_alone(values: list[int], rows: Rows) -> Rows:
        if len(values) > 1:
            raise MemoryError
        return rows

    backend = WatchedBackend(shut=True, spoil=only_alone)
    callers = run_one_batch(backend, 1, 2, 3)
    assert_only_culprits_failed(callers)


def test_an_error_of_our_family_goes_to_every_caller_of_the_batch_and_is_not_retried() -> None:
    backend = WatchedBackend(shut=True, spoil=raise_for(2, error=BackendUnavailable))
    callers = run_one_batch(backend, 1, 2, 3)
    assert all(type(caller.error()) is BackendUnavailable for caller in callers)
    assert len(backend.batches) == 2


def too_many(values: list[int], rows: Rows) -> Rows:
    return Rows(rows.logits.repeat(2, 0), rows.embedding.repeat(2, 0)) if 2 in values else rows


def too_narrow(values: list[int], rows: Rows) -> Rows:
    return replace(rows, embedding=rows.embedding[:, 1:]) if 2 in values else rows


def flat(values: list[int], rows: Rows) -> Rows:
    return replace(rows, logits=rows.logits.reshape(-1)) if 2 in values else rows


def of_objects(values: list[int], rows: Rows) -> Rows:
    return replace(rows, logits=rows.logits.astype(object)) if 2 in values else rows


def of_doubles(values: list[int], rows: Rows) -> Rows:
    return Rows(rows.logits, rows.embedding.astype(np.float64)) if 2 in values else rows


@pytest.mark.parametrize(
    "spoil", [too_few, too_many, too_narrow, flat, of_objects, of_doubles, nothing]
)
def test_rows_of_the_wrong_number_shape_or_type_reach_nobody(spoil: Spoil) -> None:
    backend = WatchedBackend(shut=True, spoil=spoil)
    callers = run_one_batch(backend, 1, 2, 3)
    assert_only_culprits_failed(callers, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["logits", "embedding"])
def test_a_row_that_is_not_finite_fails_alone(wrong: float, which: str) -> None:
    backend = WatchedBackend(shut=True, spoil=not_finite_for(2, wrong=wrong, which=which))
    callers = run_one_batch(backend, 1, 2, 3, 4)
    assert_only_culprits_failed(callers, 2)
    assert backend.batches[1:] == [[1, 2, 3, 4], [2]], "the neighbours' rows were good already"


def test_rows_that_are_not_finite_in_company_only_are_all_answered() -> None:
    def only_alone(values: list[int], rows: Rows) -> Rows:
        return not_finite_for(*values)(values, rows) if len(values) > 1 else rows

    backend = WatchedBackend(shut=True, spoil=only_alone)
    callers = run_one_batch(backend, 1, 2, 3, 4, 5)
    assert_only_culprits_failed(callers)


def test_a_lone_row_that_is_not_finite_fails_without_a_second_try() -> None:
    backend = WatchedBackend(shut=True, spoil=not_finite_for(2))
    callers = run_one_batch(backend, 2)
    assert_only_culprits_failed(callers, 2)
    assert backend.batches[1:] == [[2]]


def test_the_last_error_is_told_until_a_batch_goes_well(caplog: pytest.LogCaptureFixture) -> None:
    backend = WatchedBackend(spoil=raise_for(2))
    with running(backend) as core:
        assert core.status().last_error is None
        submit(core, 2)[0].error()
        assert core.status().last_error == "RuntimeError: cannot run [2]"
        submit(core, 1)[0].assert_got_its_row()
        assert core.status().last_error is None
        backend.spoil = not_finite_for(3)
        submit(core, 3)[0].error()
        assert "not finite" in (core.status().last_error or "")
    errors = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "cannot run [2]" in errors[0]


def test_the_observer_hears_of_every_batch_and_every_failure() -> None:
    observer = CountingObserver()
    backend = WatchedBackend(shut=True, spoil=raise_for(3))
    with running(backend, max_batch_size=4, observer=observer) as core:
        callers = [hold_one(core, backend), *submit(core, 1, 2, 3, 4)]
        backend.gate.set()
        for caller in callers:
            caller.answer()
    assert observer.sizes == [1, 2, 1]
    assert observer.failures == 3, "four together, two together, one alone"
