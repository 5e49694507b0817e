"""A header whose tensors share their bytes: a file of a few kilobytes becomes gigabytes in memory, and a check of one tensor says nothing of another."""

from pathlib import Path

from common import run, tensor_file

TENSORS, SIZE = 1000, 4096


def build(folder: Path, marker: Path) -> Path:
    entry = {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}
    return tensor_file(folder / "model.safetensors", {f"t{i}": entry for i in range(TENSORS)}, bytes(SIZE))


if __name__ == "__main__":
    run(build)
