"""Training arguments, a pickle that tools open without a thought, with code. `torch.load(…, weights_only=False)` runs it."""

from pathlib import Path

from common import run, torch_file


def build(folder: Path, marker: Path) -> Path:
    return torch_file(folder / "training_args.bin", marker)


if __name__ == "__main__":
    run(build)
