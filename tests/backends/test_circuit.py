"""The circuit breaker: who may call, who may probe, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.backends.circuit import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Circuit


def test_it_is_closed_until_a_connection_is_lost() -> None:
    circuit = Circuit()
    assert circuit.is_closed
    assert not circuit.begin_probe(0.0), "nothing to find out"
    assert circuit.lost(10.0)
    assert circuit.state == "open"


def test_many_losses_at_once_open_it_once() -> None:
    circuit = Circuit()
    assert [circuit.lost(10.0) for _ in range(3)] == [True, False, False]


def test_the_first_probe_is_due_at_once_and_alone() -> None:
    circuit = Circuit()
    circuit.lost(10.0)
    assert circuit.seconds_until_probe(10.0) == 0
    assert [circuit.begin_probe(10.0) for _ in range(3)] == [True, False, False]
    assert circuit.state == "probing"
    assert not circuit.is_closed


def test_a_loss_while_probing_changes_nothing() -> None:
    circuit = Circuit()
    circuit.lost(10.0)
    circuit.begin_probe(10.0)
    assert not circuit.lost(10.1)
    assert circuit.state == "probing"


def test_pauses_double_up_to_the_longest() -> None:
    circuit = Circuit(first_pause_seconds=0.1, longest_pause_seconds=0.5)
    circuit.lost(0.0)
    pauses = []
    for _ in range(5):
        now = circuit.seconds_until_probe(0.0)
        assert circuit.begin_probe(now)
        circuit.probe_failed(now)
        pauses.append(round(circuit.seconds_until_probe(now), 6))
    assert pauses == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_no_probe_begins_before_its_time() -> None:
    circuit = Circuit(first_pause_seconds=0.1)
    circuit.lost(0.0)
    circuit.begin_probe(0.0)
    circuit.probe_failed(1.0)
    assert not circuit.begin_probe(1.05)
    assert circuit.begin_probe(1.1)


def test_success_closes_it_and_forgets_the_long_pauses() -> None:
    circuit = Circuit()
    circuit.lost(0.0)
    for now in (0.0, 5.0, 10.0):
        circuit.begin_probe(now)
        circuit.probe_failed(now)
    circuit.begin_probe(20.0)
    circuit.probe_succeeded()
    assert circuit.is_closed
    assert circuit.lost(30.0)
    circuit.begin_probe(30.0)
    circuit.probe_failed(30.0)
    assert circuit.seconds_until_probe(30.0) == pytest.approx(FIRST_PAUSE_SECONDS)


STEPS = st.lists(st.tuples(st.sampled_from(["lost", "probe", "ok", "failed"]), st.floats(0, 2)))


@given(STEPS)
def test_calls_go_out_only_between_a_success_and_a_loss(steps: list[tuple[str, float]]) -> None:
    circuit, now, closed, probing = Circuit(), 0.0, True, False
    for step, seconds in steps:
        now += seconds
        match step:
            case "lost":
                assert circuit.lost(now) == closed
                closed = False
            case "probe":
                began = circuit.begin_probe(now)
                assert not (began and (closed or probing)), "one at a time, and only when open"
                probing = probing or began
            case "ok" if probing:
                circuit.probe_succeeded()
                closed, probing = True, False
            case "failed" if probing:
                circuit.probe_failed(now)
                probing = False
                assert 0 < circuit.seconds_until_probe(now) <= LONGEST_PAUSE_SECONDS
        assert circuit.is_closed == closed
