"""An adapter that names a module to import: `AutoPeftModel` imported it, from wherever Python finds it, until peft had a list of modules that it allows."""

from pathlib import Path

from common import run, write_json


def build(folder: Path, marker: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "luthier_attack.py").write_text(f"open({str(marker)!r}, 'w').close()\n\n\nclass Attack:\n    pass\n")
    mapping = {"base_model_class": "Attack", "parent_library": "luthier_attack"}
    return write_json(folder / "adapter_config.json", {"auto_mapping": mapping, "task_type": None})


if __name__ == "__main__":
    run(build)
