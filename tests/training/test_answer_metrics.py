"""Metrics on answers: what counts as right, and what a broken metric may cost."""

from __future__ import annotations

import logging

import pytest

from luthier.errors import RequestError
from luthier.training.metrics import resolve, same_json, score

REFERENCE = '{"intent":"refund","order":"A103","urgent":true}'


@pytest.mark.parametrize(
    "answer",
    [REFERENCE, f"\n {REFERENCE}\n", '{"urgent": true, "intent": "refund", "order": "A103"}'],
    ids=["same", "white space", "another order of keys"],
)
def test_equal_json_counts(answer):
    assert same_json(answer, REFERENCE)


@pytest.mark.parametrize(
    "answer",
    [
        f"Here you are: {REFERENCE}",
        f"```json\n{REFERENCE}\n```",
        '{"intent":"refund","order":"A103"}',
        '{"intent":"refund","order":"A103","urgent":1}',
        '{"intent":"refund","order":"A103","urgent":"true"}',
        '{"intent":"refund","order":"A103","urgent":true,"more":null}',
        '{"intent":"login","intent":"refund","order":"A103","urgent":true}',
        REFERENCE[:-1],
        REFERENCE + REFERENCE,
        "",
    ],
)
def test_anything_else_does_not_count(answer):
    assert not same_json(answer, REFERENCE)


def test_numbers_are_compared_by_value_and_booleans_are_none():
    assert same_json("[1.0, [2]]", "[1, [2]]")
    assert not same_json("[true]", "[1]")
    assert not same_json("NaN", "1")


def test_score_is_the_mean_over_samples():
    assert score(["exact", "json"], ["{} ", "x", "[1]"], ["{}", "{}", "[ 1 ]"]) == {"exact": 1 / 3, "json": 2 / 3}


def test_reference_that_is_no_json_is_an_error_of_the_metric():
    assert score(["json"], ["{}", "{}"], ["{}", "hello"]) == {"json": 0.5, "json/errors": 1.0}


@pytest.fixture
def own_metric(tmp_path, monkeypatch):
    (tmp_path / "my_metrics_for_test.py").write_text(
        "def length(answer, reference):\n    return len(answer) / len(reference)\n"
        "def nothing(answer, reference):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_own_function_is_called_with_answer_and_reference(own_metric):
    assert score(["my_metrics_for_test:length"], ["ab", "abcd"], ["abcd", "abcd"]) == {
        "my_metrics_for_test:length": 0.75
    }


def test_own_function_that_fails_counts_as_zero_and_is_named(own_metric, caplog):
    names = ["my_metrics_for_test:length", "my_metrics_for_test:nothing", "exact"]
    with caplog.at_level(logging.WARNING):
        found = score(names, ["ab", "ab"], ["", "ab"])
    assert found == {
        "my_metrics_for_test:length": 0.5,
        "my_metrics_for_test:length/errors": 1.0,
        "my_metrics_for_test:nothing": 0.0,
        "my_metrics_for_test:nothing/errors": 2.0,
        "exact": 0.5,
    }
    assert "evaluate.metrics: my_metrics_for_test:length failed, counted as 0: ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "bleu",
            "evaluate.metrics: there is no metric 'bleu'. Known are exact, json, and functions of yours as module:function.",
        ),
        (
            "no_such_module_here:f",
            "evaluate.metrics: no_such_module_here:f: the module 'no_such_module_here' cannot be imported",
        ),
        ("json:no_such_function", "has no function 'no_such_function'"),
    ],
)
def test_wrong_name_is_an_error_that_says_what_there_is(name, text):
    with pytest.raises(RequestError) as caught:
        resolve(["exact", name])
    assert text in str(caught.value)
    assert caught.value.where == "evaluate.metrics"
