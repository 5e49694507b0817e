"""Whether a written folder holds exactly the tensors of its architecture, by transformers' own loader, in a process of its own.

The loader runs over the real files onto a device without storage, so it needs memory for a tensor at a time, and what it
says of names and shapes is what it would say to a user. Run as a script with a folder, it prints that as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from luthier.errors import ArtifactError
from luthier.models.coverage import check_coverage


def check_architecture(folder: Path, source: Path) -> str:
    """Returns the name of the class that opens it.

    Args:
        folder: what was written.
        source: what it was made from, for messages.

    Raises:
        ArtifactError: a tensor is missing, of another shape, or has no place; or transformers does not know the model.
    """
    done = subprocess.run([sys.executable, "-m", "luthier.export.architecture", str(folder)], capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        raise ArtifactError(
            f"transformers cannot open this model by its config: {last[0] if last else done.returncode}",
            code="unknown-model",
            where=str(source),
            remedy="Give the base it was trained from with --base; install the transformers version that knows it.",
        )
    told = json.loads(done.stdout.strip().splitlines()[-1])
    for name, found, expected in told["mismatched_keys"]:
        axes = [axis for axis, (have, want) in enumerate(zip(found, expected)) if have != want]
        if len(found) == len(expected) and len(axes) == 1 and found[axes[0]] < expected[axes[0]]:
            low = [found[a] if a == axes[0] else 0 for a in range(len(found))]
            lost = ", ".join(f"{begin}:{end}" for begin, end in zip(low, expected))
            raise ArtifactError(
                f"[{lost}] of {name} {expected} lies in no file: the last ranks' files are missing, or the base is of another size.",
                code="shard-hole",
                where=str(source),
                remedy="Copy the whole folder again from where it was written, or give the right base with --base.",
            )
    check_coverage(told, str(source))
    return str(told["class"])


def _look(folder: Path) -> dict[str, Any]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForCausalLM
    model, loading = kind.from_pretrained(
        folder, device_map="meta", dtype="auto", local_files_only=True, trust_remote_code=False,
        ignore_mismatched_sizes=True, output_loading_info=True,
    )  # fmt: skip
    told = {key: sorted(loading.get(key, ())) for key in ("missing_keys", "unexpected_keys", "error_msgs")}
    mismatched = [[name, list(found), list(expected)] for name, found, expected in loading.get("mismatched_keys", ())]
    return told | {"mismatched_keys": sorted(mismatched), "class": type(model).__name__}


if __name__ == "__main__":
    print(json.dumps(_look(Path(sys.argv[1]))))
