"""A raw state dict that is a pickle with code. `torch.load(…, weights_only=False)` runs it."""

from pathlib import Path

from common import run, torch_file


def build(folder: Path, marker: Path) -> Path:
    return torch_file(folder / "model.pt", marker)


if __name__ == "__main__":
    run(build)
