"""The loss scale of fp16."""

from luthier.training.loss_scale import LossScale


def test_overflow_halves_and_two_thousand_good_steps_double():
    scale = LossScale(enabled=True)
    assert scale.update(False) is True
    assert (scale.value, scale.good_steps) == (2.0**15, 0)
    for _ in range(1999):
        assert scale.update(True) is False
    assert scale.value == 2.0**15
    scale.update(True)
    assert (scale.value, scale.good_steps) == (2.0**16, 0)


def test_other_precisions_have_none():
    scale = LossScale(enabled=False)
    scale.load_state({"value": 8.0, "good_steps": 3})
    assert [scale.update(finite) for finite in (False, True)] == [False, False]
    assert (scale.value, scale.good_steps) == (1.0, 0)


def test_state_goes_on_where_it_was():
    scale = LossScale(enabled=True)
    outcomes = [step % 700 != 3 for step in range(5000)]
    for finite in outcomes[:2500]:
        scale.update(finite)
    again = LossScale(enabled=True)
    again.load_state(scale.state())
    for finite in outcomes[2500:]:
        scale.update(finite)
        again.update(finite)
    assert again.state() == scale.state()


def test_at_the_smallest_scale_an_overflow_is_not_the_scales_doing():
    scale = LossScale(enabled=True)
    outcomes = [scale.update(False) for _ in range(100)]
    assert outcomes == [True] * 30 + [False] * 70
    assert scale.value == 2.0**-14
