"""How quickly the command line starts, and what it leaves unloaded."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from tiny import make_llama

from luthier.cli import VERBS

HEAVY = ("torch", "transformers", "peft", "datasets", "pyarrow", "numpy")
PROBE = f"""
import json, sys
from luthier.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, [name for name in {(*HEAVY, "argparse", "pydantic")} if name in sys.modules]]), file=sys.stderr)
"""


def loaded_by(*arguments: str) -> tuple[int, set[str], str]:
    """Exit code, which of the watched modules were loaded, and what was printed."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=120)
    lines = done.stderr.strip().splitlines()
    code, modules = json.loads(lines[-1])
    return code, set(modules), done.stdout + "\n".join(lines[:-1])


def test_help_lists_every_verb_and_loads_nothing():
    code, modules, text = loaded_by("--help")
    assert code == 0
    assert modules == set()
    assert all(f"\n  {verb}" in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_on_a_verb_loads_nothing_heavy(verb):
    code, modules, _ = loaded_by(verb, "--help")
    assert code == 0
    assert modules & set(HEAVY) == set()


def test_the_schema_is_printed_without_torch():
    code, modules, text = loaded_by("schema")
    assert code == 0
    assert modules & set(HEAVY) == set()
    assert "properties" in json.loads(text)


def test_inspect_and_verify_do_without_torch(tmp_path):
    model = make_llama(tmp_path / "model")
    for verb, expected in (("inspect", 0), ("verify", 3)):  # 3: a folder that is not ours has no manifest
        code, modules, text = loaded_by(verb, str(model))
        assert code == expected, text
        assert modules & {"torch", "transformers", "peft", "datasets"} == set()


@pytest.mark.parametrize("verb", ["train", "plan", "data"])
def test_a_wrong_run_file_is_refused_before_anything_heavy_is_loaded(tmp_path, verb):
    run_file = tmp_path / "run.yaml"
    run_file.write_text("model: nowhere/at-all\ndata: {train: x.jsonl}\nlearning_rate: 1e-4\noutput: runs/x\n")
    code, modules, text = loaded_by(verb, str(run_file))
    assert code == 2
    assert modules & set(HEAVY) == set()
    assert "optim.lr: 0.0001" in text


def test_an_unknown_verb_is_refused_with_the_nearest_one():
    code, modules, text = loaded_by("trian")
    assert code == 2
    assert modules & set(HEAVY) == set()
    assert "luthier train" in text


@pytest.mark.skipif(sys.platform == "win32", reason="counts processor time of child processes")
def test_help_costs_at_most_three_times_python_doing_nothing():
    """In processor time, which other work on the machine changes least; the two alternate, and medians are compared."""
    program = Path(sys.executable).with_name("luthier")
    if not program.is_file():
        pytest.skip("luthier is not installed beside this Python")
    commands = {"help": [str(program), "--help"], "nothing": [sys.executable, "-c", "pass"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(15):
        for name, command in commands.items():
            seconds[name].append(processor_seconds(command))
    assert median(seconds["help"]) <= 3 * median(seconds["nothing"]), seconds


def processor_seconds(command: list[str]) -> float:
    import resource

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return spent() - before
