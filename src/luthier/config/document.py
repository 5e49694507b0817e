"""The pages about the run file, made from the schema and the table of foreign names.

``python -m luthier.config.document`` rewrites ``docs/run-file.md`` and ``docs/coming-from.md`` below the current
folder; a test asserts that the committed pages are what this module makes.
"""

from __future__ import annotations

from pathlib import Path

from luthier.config import foreign
from luthier.config.hints import show
from luthier.config.keys import Key, keys

_EXAMPLE = """\
model: HuggingFaceTB/SmolLM2-135M-Instruct
data: {train: data/train.jsonl, eval: 0.02}
adapter: {type: lora, r: 16, dropout: 0.05}
optim: {lr: 2e-4}
train: {epochs: 3, batch_tokens: 65536}
output: runs/support
"""

_RUN_FILE = f"""\
# The run file

One YAML file describes a run: one model, one data set, one way of training, one output folder. The smallest useful
one:

```yaml
{_EXAMPLE}```

- **Everything else has a default.** A default of `null` with "Unset:" in its line is chosen when the run starts, from the
  model, the data or the device; the choice is written into the run folder's `run.yaml`, which holds every key.
- **Overrides** on the command line win over the file: `luthier train run.yaml optim.lr=1e-4 train.steps=100`. The right-hand
  side is read as YAML. Setting `train.steps` clears `train.epochs`, and the other way round; the same for
  `train.batch_tokens` and `train.batch_samples`.
- **Numbers** may be written `1e-4`. `null` is "none". An empty block counts as left out.
- **Paths** are relative to the working directory; `~` and `${{VAR}}` expand, and a variable that is not set is an error. In
  `model.path` and the data's paths, what exists here is taken as a file or folder, and what looks like a path (a suffix, a leading
  `.` or `/`, a glob) must exist; anything else is a hub id.
- **A wrong key or value is an error** before any model is loaded: exit code 2, with the line, what is allowed, and what was
  probably meant, the names of other tools included ([coming-from.md](coming-from.md)). A key that stands twice is an error.
- **Editors** complete and check run files with the JSON Schema that `luthier schema` prints.

## Resuming with another run file

| kind | keys | what happens |
| --- | --- | --- |
| free | `log`, `callbacks`, `push`, `evaluate.*`, `checkpoint.*`, `output` | listed in the log |
| continuing | `train.epochs`, `train.steps` | the run goes on over the new length; the log says how the learning rate changes |
| fixed | all others | an error that names them, unless permitted with `--allow KEY` |

A key left unset whose value was chosen at the start keeps that value.

## All keys
"""

_COMING_FROM = """\
# Coming from other tools

What other tools call our keys. A run file with one of these names is refused with the same conversion, so nothing is
taken for something else. Tools: {tools}.

| there | tools | here |
| --- | --- | --- |
"""


def run_file_page() -> str:
    """The reference of every key."""
    lines = [_RUN_FILE]
    groups: dict[str, list[Key]] = {"": []}
    for key in keys().values():
        if key.section:
            groups[key.name] = []
        if key.section and "." not in key.name:
            groups[key.name].append(key)
        else:
            groups[key.name.rpartition(".")[0]].append(key)
    for name, members in groups.items():
        if not members:
            continue
        title = f"`{name}`" if name else "At the top"
        lines.append(f"### {title}\n")
        if members[0].name == name:
            head = members.pop(0)
            optional = f" Default: `{head.default}`." if head.default else ""
            lines.append(f"{head.line} {_sentence(head.allowed)}{optional}\n".lstrip())
        if name == "data.train":
            lines.append("Keys of one source, here and in `data.eval`.\n")
        lines += ["| key | takes | default | |", "| --- | --- | --- | --- |"]
        for key in members:
            default = f"`{key.default}`" if key.default else ("required" if key.required else "")
            lines.append(f"| `{key.name}` | {_cell(key.allowed)} | {default} | {_cell(key.line)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def coming_from_page() -> str:
    """The table of foreign names, each with an example run through its own converter."""
    tools = ", ".join(f"{letter} {name}" for letter, name in foreign.TOOLS.items())
    lines = [_COMING_FROM.format(tools=tools).rstrip("\n")]
    for row in foreign.TABLE.values():
        ours = row.convert(row.example, {})
        if isinstance(ours, dict):
            here = "<br>".join(f"`{key}: {show(value)}`" for key, value in ours.items())
        else:
            here = ours
        lines.append(f"| `{row.name}: {show(row.example)}` | {' '.join(row.tools)} | {_cell(here)} |")
    lines.append(
        "\n`per_device_train_batch_size: 4` with `gradient_accumulation_steps: 8` is `train.micro_batch: 4` and "
        "`train.batch_samples: 32`. Batches do not depend on the number of devices here: multiply by it."
    )
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {"run-file.md": run_file_page(), "coming-from.md": coming_from_page()}


def main() -> None:
    """Rewrite the pages below ``docs`` in the current folder."""
    for name, text in pages().items():
        Path("docs", name).write_text(text, encoding="utf-8", newline="\n")


def _sentence(allowed: str) -> str:
    return f"Takes {allowed}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
