"""A header that claims 2**60 bytes, a shape whose product overflows 64 bits to 0: a loader that allocates first dies, one in C reads beyond."""

from pathlib import Path

from common import run, tensor_file


def build(folder: Path, marker: Path) -> Path:
    header = {
        "huge": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]},
        "overflow": {"dtype": "U8", "shape": [2**32, 2**32], "data_offsets": [2**60, 2**60]},
    }
    return tensor_file(folder / "model.safetensors", header, b"")


if __name__ == "__main__":
    run(build)
