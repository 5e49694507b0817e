"""A config that names Python code of the folder. `trust_remote_code=True`, which many scripts set for all, runs it."""

from pathlib import Path

from common import run, write_json


def build(folder: Path, marker: Path) -> Path:
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedConfig\n\n\nclass Attack(PreTrainedConfig):\n    model_type = 'attack'\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attack.py").write_text(code)
    auto_map = {"AutoConfig": "attack.Attack", "AutoModelForCausalLM": "attack.Attack"}
    return write_json(folder / "config.json", {"model_type": "attack", "auto_map": auto_map})


if __name__ == "__main__":
    run(build)
