"""The learning rate as a function of the step."""

import math

import pytest

from luthier.config.schema import OptimConfig
from luthier.training.schedule import continuation_note, rate, warmup_steps

SCHEDULES = ["constant", "linear", "cosine", "wsd"]


def curve(total, **optim):
    return [rate(step, total, OptimConfig(**optim)) for step in range(total)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 0.99, 1, 5, 1000])
@pytest.mark.parametrize("min_lr", [0.0, 0.1, 1.0])
def test_every_step_has_a_rate_above_zero_and_within_bounds(schedule, total, warmup, min_lr):
    values = curve(total, schedule=schedule, warmup=warmup, min_lr=min_lr)
    assert all(min_lr <= value <= 1 and value > 0 for value in values)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_ends_at_the_peak(schedule):
    values = curve(100, schedule=schedule, warmup=0.1)
    assert values[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert values[10] == 1.0
    assert curve(100, schedule=schedule, warmup=10) == values


def test_shapes():
    assert curve(4, schedule="constant", warmup=0) == [1, 1, 1, 1]
    assert curve(4, schedule="linear", warmup=0) == [1, 0.75, 0.5, 0.25]
    assert curve(4, schedule="linear", warmup=0, min_lr=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert curve(4, schedule="cosine", warmup=0)[2] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert curve(10, schedule="wsd", warmup=0) == [1.0] * 9 + [0.5]
    assert curve(20, schedule="wsd", warmup=0)[16:] == [1.0, 0.75, 0.5, 0.25]


def test_a_share_of_steps_is_rounded_up():
    assert warmup_steps(10, OptimConfig(warmup=0.03)) == 1
    assert warmup_steps(100, OptimConfig(warmup=3)) == 3
    assert warmup_steps(2, OptimConfig(warmup=30)) == 2


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match="10 steps"):
        rate(step, 10, OptimConfig())


def test_a_longer_run_takes_the_longer_schedule_from_where_it_is():
    optim = OptimConfig(schedule="linear", warmup=0, lr=1e-3)
    note = continuation_note(100, 100, 200, optim)
    assert rate(100, 200, optim) == 0.5
    assert "200 steps instead of 100" in note and "stretched" in note
    assert "at step 101 the learning rate is 0.0005, after 1e-05 at the end of the old one" in note
    assert "is 0.00075 instead of 0.0005" in continuation_note(50, 100, 200, optim)


def test_a_constant_rate_is_said_to_be_the_same():
    optim = OptimConfig(schedule="constant", warmup=0)
    assert "the same, 1 of its peak" in continuation_note(50, 100, 200, optim)


def test_a_length_already_reached_is_said():
    assert "nothing is left" in continuation_note(50, 100, 50, OptimConfig())
