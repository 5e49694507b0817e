"""Nothing global changes: two runs in one process don't know of each other, and the process is as it was before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from harness import Setup, assert_same_run, in_a_process, make_setup, train

TWICE = '''
import json, logging, os, random, signal, sys, warnings
from pathlib import Path

import datasets, numpy, peft, torch, transformers
from peft.tuners.lora import layer as lora_layer
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_moe import modeling_qwen3_moe

import luthier
from luthier.errors import LuthierError


def classes():
    """What the classes of other libraries are made of."""
    return {
        f"{module.__name__}.{name}.{key}": id(value)
        for module in (modeling_llama, modeling_qwen3_moe, lora_layer, transformers.modeling_utils, peft.peft_model)
        for name, kind in list(vars(module).items())
        if isinstance(kind, type)
        for key, value in list(vars(kind).items())
        # caches of Python's and of transformers' own
        if not key.startswith(("_abc_", "__abstract", "__weakref", "__slotnames")) and not key.endswith("_cached_value")
    }


def settings():
    return {
        "environment": dict(os.environ),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filling": torch.utils.deterministic.fill_uninitialized_memory,
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()],
        "cudnn": [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark],
        "gradients": torch.is_grad_enabled(),
        "random": [torch.get_rng_state().tolist(), str(numpy.random.get_state()), str(random.getstate())],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "verbosity": [transformers.logging.get_verbosity(), datasets.logging.get_verbosity(), logging.getLogger().level],
        "bars": [transformers.logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()],
        "warnings": [str(entry) for entry in warnings.filters],
        "folder": os.getcwd(),
        "hooks": [str(sys.excepthook), str(sys.stdout), str(sys.stderr)],
        "attention": sorted(map(str, transformers.AttentionInterface().valid_keys())),
    }


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def main(first, second, base, answer):
    torch.manual_seed(11), numpy.random.seed(12), random.seed(13)
    bystander, tokenizer = luthier.load(base)
    ids = torch.tensor([tokenizer("one two three blue sea")["input_ids"]])
    expected = logits(bystander, ids)
    settings_before, classes_before = settings(), classes()
    runs = [luthier.train(path) for path in (first, second)]
    failed = None
    try:
        luthier.train({"model": base, "data": {"train": first}, "output": answer + ".none"})
    except LuthierError as error:
        failed = str(error)
    settings_after, classes_after = settings(), classes()
    Path(answer).write_text(json.dumps({
        "settings": [name for name in settings_before if settings_before[name] != settings_after[name]],
        "classes": [name for name in {**classes_before, **classes_after} if classes_before.get(name) != classes_after.get(name)],
        "bystander": torch.equal(expected, logits(bystander, ids)) and not bystander.training,
        "proofs": [run.proof["verdict"] for run in runs],
        "failed": failed,
    }))
'''


@pytest.mark.slow
def test_two_runs_in_one_process_are_those_of_two_processes_and_change_nothing(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    pairs = [("llama", True), ("moe", False)]
    setups: list[tuple[Setup, Setup]] = []
    for model, lora in pairs:
        made = make_setup(alone / model, model=model, lora=lora)
        assert train(made).code == 0
        run = together / model
        text = made.run_file.read_text().replace(str(made.run), str(run))
        (alone / f"{model}.yaml").write_text(text)
        setups.append((made, Setup(made.home, run, alone / f"{model}.yaml")))
    (tmp_path / "twice.py").write_text(TWICE)
    answer = tmp_path / "answer.json"
    paths = [str(other.run_file) for _, other in setups]
    in_a_process(tmp_path, "twice:main", *paths, str(alone / "llama/base"), str(answer))
    said = json.loads(answer.read_text())
    assert said["settings"] == []
    assert said["classes"] == []
    assert said["bystander"]
    assert said["proofs"] == ["passed", "passed"]
    assert said["failed"]
    for made, other in setups:
        assert_same_run(other.run, made.run)


def test_importing_luthier_loads_nothing_heavy_and_changes_nothing(tmp_path):
    script = (
        "import os, sys, warnings, logging, signal; import re\n"
        "before = dict(os.environ), list(warnings.filters), logging.getLogger().handlers[:], signal.getsignal(2)\n"
        "import luthier, luthier.cli\n"
        "after = dict(os.environ), list(warnings.filters), logging.getLogger().handlers[:], signal.getsignal(2)\n"
        "print(before == after, [name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.stdout.strip() == "True []", done.stderr
