"""What may change between a run and its resumption."""

import pytest

from luthier.config.compare import CHOSEN_AT_START, check, compare, merge_resolved
from luthier.config.keys import keys
from luthier.config.schema import RunConfig
from luthier.errors import RequestError


def config(**sections):
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "output": "o", **sections}
    return RunConfig.model_validate(values)


def test_equal_configs_have_no_changes():
    assert compare(config(adapter={"r": 8}), config(adapter={"r": 8})) == []


def test_every_change_has_its_kind():
    old = config(train={"epochs": 1})
    new = config(
        train={"epochs": 2, "seed": 1},
        log=["wandb"],
        checkpoint={"keep": 5},
        evaluate={"every": 3},
        data={"train": "d", "eval": 0.1},
    )
    assert {change.key: change.kind for change in compare(old, new)} == {
        "train.epochs": "continuing",
        "train.seed": "fixed",
        "log": "free",
        "checkpoint.keep": "free",
        "evaluate.every": "free",
        "data.eval": "fixed",
    }


def test_an_adapter_that_appears_is_a_fixed_change():
    changes = compare(config(), config(adapter={"r": 8}))
    assert {"adapter.type", "adapter.r"} <= {change.key for change in changes}
    with pytest.raises(RequestError, match=r"--allow adapter\.type"):
        check(changes)


def test_peft_keys_of_the_adapter_are_compared():
    changes = compare(config(adapter={"bias": "none"}), config(adapter={"bias": "all"}))
    assert [(change.key, change.old, change.new) for change in changes] == [("adapter.bias", "none", "all")]


def test_fixed_changes_are_refused_with_both_values_and_the_flag():
    changes = compare(config(optim={"lr": 1e-4}), config(optim={"lr": 2e-4, "clip": None}))
    with pytest.raises(RequestError) as caught:
        check(changes, allow=["train"])
    message = str(caught.value)
    assert "optim.lr: 0.0001 → 0.0002" in message and "optim.clip: 1.0 → null" in message
    assert "--allow optim.lr --allow optim.clip" in message


def test_allowed_and_harmless_changes_become_lines():
    changes = compare(config(train={"steps": 5}), config(train={"steps": 9}, optim={"lr": 2e-4}, log=["wandb"]))
    lines = check(changes, allow=["optim"])
    assert len(lines) == 3
    assert any("train.steps: 5 → 9" in line and "new length" in line for line in lines)
    assert any("optim.lr: null → 0.0002" in line and "--allow" in line for line in lines)


def test_what_is_left_unset_keeps_the_choice_made_at_the_start():
    old = config(
        model={"path": "m", "precision": "fp32"},
        adapter={"alpha": 32},
        optim={"lr": 2e-4},
        train={"epochs": 1, "batch_samples": 16},
    )
    new = config(adapter={})
    assert compare(old, merge_resolved(old, new)) == []


def test_a_new_length_replaces_the_old_one():
    old = config(train={"epochs": 1, "batch_samples": 16})
    merged = merge_resolved(old, config(train={"steps": 100}))
    assert (merged.train.epochs, merged.train.steps, merged.train.batch_samples) == (None, 100, 16)


def test_null_that_means_none_is_a_change():
    old = config(model={"path": "m", "template": "chatml"}, optim={"clip": 1.0})
    changes = compare(old, merge_resolved(old, config(optim={"clip": None})))
    assert {change.key for change in changes} == {"model.template", "optim.clip"}


def test_the_keys_chosen_at_the_start_are_those_the_schema_says_so_of():
    unset = {key.name for key in keys().values() if "Unset" in key.line}
    assert unset <= CHOSEN_AT_START
    assert CHOSEN_AT_START - unset == {"train.steps", "train.batch_samples"}  # the other halves of their pairs
