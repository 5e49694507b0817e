"""An adapter whose weights are a pickle with code. `torch.load(…, weights_only=False)` runs it."""

from pathlib import Path

from common import run, torch_file, write_json


def build(folder: Path, marker: Path) -> Path:
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "a/b"})
    return torch_file(folder / "adapter_model.bin", marker)


if __name__ == "__main__":
    run(build)
