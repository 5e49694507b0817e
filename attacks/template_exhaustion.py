"""A chat template that asks for more memory than there is, while it is compiled: the sandbox checks attributes, not sizes."""

from pathlib import Path

from common import run

BYTES = 10**8  # enough to see it work; an attacker writes 10**12


def build(folder: Path, marker: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / "chat_template.jinja"
    template.write_text(f"{{{{ ('x' * {BYTES}) | length }}}}")
    return template


if __name__ == "__main__":
    run(build)
