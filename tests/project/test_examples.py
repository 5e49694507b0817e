"""The Python in the documents is run as it stands there."""

import re
from pathlib import Path

from safetensors.torch import load_file
from tiny import make_llama
from warm import run_python

ROOT = Path(__file__).parents[2]


def python_blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_own_loop_in_the_checkpoints_page_resumes_bit_for_bit(tmp_path):
    (example,) = python_blocks("docs/checkpoints.md")
    base = make_llama(tmp_path / "base", dropout=0.1)
    example = example.replace("path/to/base", str(base))
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()

    run_python(example, tmp_path / "whole")
    run_python(example.replace("range(begin, 20)", "range(begin, 10)"), tmp_path / "interrupted")
    first_half = sorted(path.name for path in (tmp_path / "interrupted/runs/own/checkpoints").iterdir())
    run_python(example, tmp_path / "interrupted")

    assert first_half == ["step-00000005", "step-00000010"]
    last = "runs/own/checkpoints/step-00000020"
    for file in ("model/model.safetensors", "trainer/optimizer.safetensors"):
        whole = load_file(tmp_path / "whole" / last / file)
        resumed = load_file(tmp_path / "interrupted" / last / file)
        assert whole.keys() == resumed.keys()
        assert all(whole[name].equal(resumed[name]) for name in whole), file


def library_example(document: str) -> str:
    (example,) = [block for block in python_blocks(document) if "luthier.train" in block]
    return example


def without_comments(code: str) -> list[str]:
    return [line.split("  #")[0].rstrip() for line in code.splitlines() if not line.lstrip().startswith("#")]


def test_the_readme_shows_the_same_example_in_both_languages():
    assert without_comments(library_example("README.md")) == without_comments(library_example("README.zh-CN.md"))


def test_the_library_example_of_the_readme_runs(tmp_path):
    make_llama(tmp_path / "base")
    (tmp_path / "data").mkdir()
    line = '{"prompt": "What is the capital of France?", "completion": "The capital is Paris."}\n'
    (tmp_path / "data/train.jsonl").write_text("".join(line.replace("France", f"France {n}") for n in range(12)))
    (tmp_path / "run.yaml").write_text(
        "model: base\ndata: {train: data/train.jsonl, eval: 0.2}\nadapter: lora\n"
        "train: {steps: 2, batch_samples: 2, max_length: 128}\noutput: runs/support\n"
    )

    assert "passed" in run_python(library_example("README.md"), tmp_path)
