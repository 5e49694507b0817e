"""Charts: round ticks, honest scales, lines that do not lag."""

import itertools
import math
import random
import re

import pytest

from luthier.report.charts import Chart, Series, draw, nice_ticks, smooth, thin, tick_labels


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 300, ["0", "100", "200", "300"]),
        (0.21, 2.53, ["0.5", "1.0", "1.5", "2.0", "2.5"]),
        (0, 2.1e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        (0, 9000, ["0", "2,000", "4,000", "6,000", "8,000"]),
        (0, 120_000, ["0", "25k", "50k", "75k", "100k"]),
        (2.301, 2.309, ["2.302", "2.304", "2.306", "2.308"]),
    ],
)
def test_ticks_are_round_numbers_with_as_many_digits_as_needed(low, high, labels):
    assert tick_labels(nice_ticks(low, high, 5)) == labels


@pytest.mark.parametrize("seed", range(50))
def test_ticks_lie_within_any_range(seed):
    chance = random.Random(seed)
    low = chance.uniform(-1, 1) * 10 ** chance.randint(-7, 7)
    high = low + abs(low) * 10 ** chance.uniform(-3, 3)
    ticks = nice_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 12 and all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in ticks)
    assert len(set(tick_labels(ticks))) == len(ticks)


def test_smoothing_keeps_a_straight_line_straight_up_to_its_ends():
    line = [(step, 5 - 0.01 * step) for step in range(300)]
    assert all(math.isclose(value, 5 - 0.01 * step, abs_tol=1e-9) for step, value in smooth(line))


def test_smoothing_removes_most_of_the_noise():
    noise = random.Random(0)
    curve = smooth([(step, 1 + noise.gauss(0, 0.2)) for step in range(1000)])
    assert len(curve) <= 400 and max(abs(value - 1) for _, value in curve[20:-20]) < 0.1


def test_smoothing_stands_gaps_and_few_points():
    assert smooth([]) == [] and smooth([(1, None)]) == [] and smooth([(1, 2.0), (2, None)]) == [(1, 2.0)]


def test_thinning_keeps_spikes_and_gaps():
    points = [(step, 100.0 if step == 70_001 else None if 20_000 <= step < 21_000 else 1.0) for step in range(100_000)]
    kept = thin(points)
    assert len(kept) <= 900 and (70_001, 100.0) in kept and any(value is None for _, value in kept)


def heights(figure: str, kind: str) -> list[float]:
    path = re.search(f'<path class="{kind} first" d="([^"]*)"', figure).group(1)
    return [float(pair.split()[1]) for pair in re.split("[ML]", path)[1:]]


def test_one_spike_does_not_flatten_the_curve():
    points = [(step, 5000.0 if step == 50 else 1 + 0.01 * step) for step in range(100)]
    figure = draw(Chart("x", "", [Series("x", points)]))
    shown = heights(figure, "line")
    assert "peak 5,000" in figure
    assert max(shown) - min(shown[:40]) > 200 and min(shown) == 0  # of 1000; the spike runs along the edge


def test_line_breaks_where_a_step_has_no_value():
    figure = draw(Chart("x", "", [Series("x", [(1, 1.0), (2, 2.0), (3, None), (4, 2.0), (5, 1.0)])], flaws=[3]))
    assert re.search('class="line first" d="([^"]*)"', figure).group(1).count("M") == 2 and "1 skipped" in figure


@pytest.mark.parametrize("points", [[(1, 0.0)], [(1, 2.0), (2, 2.0)], [(0, -1.0), (1, 1e-12)], [(5, 1e9)]])
def test_odd_values_are_drawn_without_nan(points):
    figure = draw(Chart("x", "", [Series("x", points)], from_zero=True))
    assert "nan" not in figure and "inf" not in figure.replace("info", "")


def test_labels_at_the_ends_never_overlap():
    lines = [Series(str(n), [(0, 1.0), (10, 1.0 + n / 1000)], tone=tone) for n, tone in enumerate(("first", "second"))]
    figure = draw(Chart("x", "", [*lines, Series("far", [(0, 3.0), (10, 9.0)])]))
    tops = sorted(float(top) for top in re.findall(r'<b class="\w+" style="top:([\d.]+)px"', figure))
    assert all(b - a >= 15 for a, b in itertools.pairwise(tops))
