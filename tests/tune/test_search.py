"""The search for the best settings, over services whose latency is a formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from app.bench.server_process import CannotStart
from app.cli import main
from app.tune.search import HEADROOM, OutOfTime, Space, best_of, nearest, sweep
from app.tune.trial import Configuration, Measured, Slo, Trial, parse_slo

SLO = Slo("p99", 50.0)


@dataclass
class Machine:
    """Services as queueing theory has them: 5 ms, and more the nearer to the capacity.

    Attributes:
        most_trials: after which the time is up.
        tried: every configuration and rate.
    """

    most_trials: int = 1000
    tried: list[tuple[Configuration, float]] = field(default_factory=list)
    idle_ms: float = 5.0

    @contextmanager
    def open(self, configuration: Configuration) -> Iterator[ModelService]:
        if configuration.workers == 3:
            raise CannotStart("three is too many")
        yield ModelService(self, configuration)


@dataclass
class ModelService:
    machine: Machine
    configuration: Configuration

    def capacity(self) -> float:
        settings = self.configuration
        batching = min(settings.max_batch_size, 8) / 8
        return 100.0 * settings.workers * batching - settings.max_wait_ms

    def try_rate(self, rate: float) -> Trial:
        if len(self.machine.tried) >= self.machine.most_trials:
            raise OutOfTime
        self.machine.tried.append((self.configuration, rate))
        left = 1 - rate / self.capacity()
        if left <= 0:
            return Trial(rate, self.capacity(), self.capacity() / rate, {"p99": 1000.0})
        return Trial(rate, rate, 1.0, {"p99": self.machine.idle_ms / left})


SPACE = Space(workers=[1, 2, 3], threads=[0], max_batch_size=[8, 1, 16], max_wait_ms=[0.0, 5.0])


def search(machine: Machine, slo: Slo = SLO) -> list[Measured]:
    measured: list[Measured] = []
    sweep(SPACE, slo, machine.open, lambda _: None, measured)
    return measured


def test_the_search_finds_the_best_configuration_and_about_its_highest_rate() -> None:
    found = best_of(search(Machine()), SLO)
    assert found is not None
    one, trial = found
    assert (one.configuration.workers, one.configuration.max_wait_ms) == (2, 0)
    assert one.configuration.max_batch_size >= 8
    # 5 ms / (1 - rate / 200) is 50 ms at 180 a second; bisection is that fine.
    assert 180 - HEADROOM * 200 / 14 <= trial.rate <= 180


def test_what_cannot_beat_the_best_is_given_up_without_bisection() -> None:
    measured = search(Machine())
    batch_1 = next(one for one in measured if one.configuration.max_batch_size == 1)
    assert batch_1.trials == []
    assert "given up" in batch_1.words
    assert batch_1.best(SLO) is None


def test_a_configuration_that_does_not_start_is_named_and_the_search_goes_on() -> None:
    measured = search(Machine())
    (broken,) = (one for one in measured if one.configuration.workers == 3)
    assert broken.words == "does not start: three is too many"
    assert broken.trials == []
    assert len(measured) > 3


def test_what_was_measured_until_the_time_was_up_counts() -> None:
    machine = Machine(most_trials=2)
    measured = search(machine)
    assert len(machine.tried) == 2
    assert [one.words for one in measured] == ["the time was up"]
    assert best_of(measured, SLO) is not None


def test_a_promise_nobody_can_keep_has_a_nearest() -> None:
    measured = search(Machine(), Slo("p99", 1.0))
    assert best_of(measured, Slo("p99", 1.0)) is None
    near = nearest(measured, Slo("p99", 1.0))
    assert near is not None
    assert near[1].latency_ms["p99"] == pytest.approx(5 / 0.95)


def test_no_rate_is_kept_by_refusing() -> None:
    refusing = Trial(rate=100, goodput=50, good_share=0.5, latency_ms={"p99": 1.0})
    assert not refusing.keeps(SLO)
    assert not Trial(rate=100, goodput=0, good_share=0, latency_ms={}).keeps(SLO)


@pytest.mark.parametrize(
    ("text", "slo"),
    [("p99=50ms", SLO), ("p50=0.2s", Slo("p50", 200)), ("p99.9=1.5ms", Slo("p99.9", 1.5))],
)
def test_promises_are_read(text: str, slo: Slo) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize("text", ["50ms", "p99=50", "p98=5ms", "p99=0ms", "p99=-5ms", "", "p99="])
def test_other_promises_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no promise like p99=50ms"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (["--try-workers", "1,0"], "'0' is no whole number above 0"),
        (["--try-threads", "0,-1"], "'-1' is no whole number of 0 or more"),
        (["--try-max-wait-ms", "0,"], "'' is no number of 0 or more"),
        (["--minutes", "inf"], "'inf' is no number of 0 or more"),
        (["--trial-seconds", "0"], "'0' is no number above 0"),
    ],
)
def test_arguments_out_of_range_are_named(
    argument: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--slo", "p99=5ms", *argument])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
