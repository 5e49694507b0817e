"""The same in tokenizer_config.json, beside a model that needs no code."""

from pathlib import Path

from common import run, write_json


def build(folder: Path, marker: Path) -> Path:
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n\n\nclass Attack(PreTrainedTokenizerFast):\n    pass\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attack.py").write_text(code)
    auto_map = {"AutoTokenizer": [None, "attack.Attack"]}
    return write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Attack", "auto_map": auto_map})


if __name__ == "__main__":
    run(build)
