"""A run file of a few hundred bytes that stands for 10**15 values: YAML's aliases multiply when anything walks or prints them."""

from pathlib import Path

from common import run

LEVELS = 15


def build(folder: Path, marker: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, LEVELS)]
    file = folder / "run.yaml"
    file.write_text("\n".join([*lines, f"model: *a{LEVELS - 1}", ""]))
    return file


if __name__ == "__main__":
    run(build)
