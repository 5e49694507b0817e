"""A Trainer's checkpoint whose optimiser state is a pickle with code. `torch.load(…, weights_only=False)` runs it."""

from pathlib import Path

from common import run, torch_file


def build(folder: Path, marker: Path) -> Path:
    return torch_file(folder / "optimizer.pt", marker)


if __name__ == "__main__":
    run(build)
