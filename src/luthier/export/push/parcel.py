"""What of a folder goes to the hub: its weights, what opens them, and what is said of them; and is all of it whole?

A run means its ``final/``, a checkpoint the adapter or model in it. Of a folder of ours the files in its manifest go; of any
other those that belong to a model by their names. States of optimisers, checkpoints, logs and hidden files never do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.artifacts import kinds
from luthier.artifacts import manifest as manifests
from luthier.artifacts.contents import NO_WEIGHTS, Contents, look
from luthier.artifacts.files import inside
from luthier.artifacts.identify import Artifact, identify
from luthier.artifacts.json_file import read_object
from luthier.artifacts.manifest import Manifest, Problem
from luthier.artifacts.run_folder import FAILED_PROOF, stages_of
from luthier.errors import ArtifactError, RequestError

CARD = "README.md"
_KINDS = ("base", "merged", "adapter", "gguf", "gguf_adapter", "trainer_checkpoint")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_ENDINGS = (".safetensors", ".gguf", ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".md")
_BY_NAME = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[\w.-]*|Modelfile")
_OF_TRAINING = re.compile(r"trainer_state\.json|.*_results\.json|trainer_log\..*|facts\.json|proof-failed\.json")


@dataclass(frozen=True)
class Parcel:
    """The files of ``folder`` that go, by their names there; ``manifest`` is narrowed to them, None for a folder not of ours."""

    folder: Path
    kind: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    manifest: Manifest | None
    proof: dict[str, Any] | None

    @property
    def size(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def find(path: Path, *, unproven: bool = False) -> Parcel:
    """What a path sends, read back against its manifest where it has one.

    Args:
        unproven: also what failed its proof.

    Raises:
        RequestError: nothing there can be pushed.
        ArtifactError: the folder is damaged, or its proof failed.
    """
    folder = _meant(Path(path).expanduser(), unproven)
    artifact = identify(folder)
    if artifact.kind == "checkpoint" or _is_in_checkpoint(folder):
        home = folder if artifact.kind == "checkpoint" else folder.parent
        artifact = identify(home)
        folder = home / ("adapter" if (home / "adapter").is_dir() else "model")
    else:
        home = folder
    if artifact.kind not in (*_KINDS, "checkpoint") or not folder.is_dir():
        file = folder.is_file()
        raise RequestError(
            f"{'a single file' if file else f'kind {artifact.kind}'} can't be pushed: what the hub takes is a folder that opens there.",
            code="not-pushable",
            where=str(folder),
            remedy=f"Name its folder, {folder.parent}." if file else "`luthier inspect` says what it is; `luthier export … --to transformers` makes a model's folder of weights.",
        )  # fmt: skip
    parcel = _packed(home, folder, artifact)
    if not any(name.endswith(_WEIGHTS) for name in parcel.files):
        raise RequestError(
            "there are no weights here that could be pushed.",
            code="not-pushable",
            where=str(folder),
            remedy="Name the folder that they lie in; `luthier inspect` lists what there is.",
        )
    _refuse_damaged(home, parcel, artifact)
    if not unproven and parcel.proof and parcel.proof.get("verdict") == "failed":
        raise _failed_proof(folder / "proof.json", parcel.proof)
    return parcel


def _meant(path: Path, unproven: bool) -> Path:
    """The folder itself; of a run the proven result of its last stage."""
    artifact = identify(path)
    if artifact.kind != "run":
        return path
    final = artifact.facts["final"]
    places = [path, *stages_of(path)] if final is None else [path, Path(final).parent]
    for failed in (place / FAILED_PROOF for place in places):
        if failed.is_file() and not unproven:
            raise _failed_proof(failed, read_object(failed))
    if final is None or (artifact.facts.get("stages") and not artifact.facts["finished"]):
        raise RequestError(
            "this run has not finished: it has no final/, which is what was proven." if final is None else "not all stages of this run have finished.",
            code="no-final",
            where=str(path),
            remedy="Go on with `luthier resume`, or push a checkpoint on purpose: RUN@newest, RUN@best." if final is None else "Go on with `luthier resume`, or name the stage's own folder.",
        )  # fmt: skip
    return Path(final)


def _is_in_checkpoint(folder: Path) -> bool:
    home = folder.parent
    return folder.name in ("adapter", "model") and (home / "trainer").is_dir() and (home / manifests.NAME).is_file()


def _failed_proof(where: Path, proof: dict[str, Any]) -> ArtifactError:
    return ArtifactError(
        f"the proof failed: {proof.get('says')} What plain libraries open here is not what was trained.",
        code="proof-failed",
        where=str(where),
        remedy="Don't push it; --unproven does so all the same.",
    )


def _packed(home: Path, folder: Path, artifact: Artifact) -> Parcel:
    contents = look(folder)
    manifest = manifests.read(home) if (home / manifests.NAME).is_file() else None
    named = _of_ours(home, folder, contents, manifest) if manifest else _of_others(contents)
    files = tuple(sorted(name for name in named if inside(folder, name).is_file()))
    there = {*contents.files, *(f"{name}/" for name in contents.folders)}
    sent = {*files, manifests.NAME, *(f"{name.partition('/')[0]}/" for name in files if "/" in name)}
    proof = read_object(folder / "proof.json") if "proof.json" in files else None
    kind = "gguf" if artifact.kind.startswith("gguf") else "adapter" if artifact.adapter is not None else "model"
    return Parcel(
        folder, kind, files, tuple(sorted(there - sent)), manifest and _narrowed(manifest, home, folder), proof
    )


def _of_ours(home: Path, folder: Path, contents: Contents, manifest: Manifest) -> set[str]:
    within = "" if home == folder else f"{folder.name}/"
    listed = {name.removeprefix(within) for name in manifest.files if name.startswith(within)}
    return listed | {name for name in contents.files if name == CARD or _BY_NAME.fullmatch(name)}


def _of_others(contents: Contents) -> set[str]:
    """Files at the top that a model is opened with, templates in their folder, and adapters in folders of their own."""
    named = {name for name in contents.files if _belongs(name)} | {
        name for name in contents.pickles if name in contents.files
    }
    below = ["additional_chat_templates"]
    if not kinds.has_adapter_weights(contents) and not kinds.has_model_weights(contents):
        below += kinds.adapters_in_folders(contents)
    for name in below:
        if name in contents.folders:
            inner = look(inside(contents.path, name))
            named |= {f"{name}/{file}" for file in inner.files if _belongs(file)}
    return named


def _belongs(name: str) -> bool:
    if name.startswith(".") or NO_WEIGHTS.fullmatch(name) or _OF_TRAINING.fullmatch(name):
        return False
    return name.endswith(_ENDINGS) or bool(_BY_NAME.fullmatch(name))


def _narrowed(manifest: Manifest, home: Path, folder: Path) -> Manifest:
    """The manifest of the folder alone, where it is a checkpoint's."""
    if home == folder:
        return manifest
    within = f"{folder.name}/"

    def short(name: str) -> str:
        return name.removeprefix(within)

    return replace(
        manifest,
        kind=folder.name,
        files={short(name): size for name, size in manifest.files.items() if name.startswith(within)},
        digests=tuple(replace(d, file=short(d.file)) for d in manifest.digests if d.file.startswith(within)),
        tensors=tuple(replace(p, file=short(p.file)) for p in manifest.tensors if p.file.startswith(within)),
    )


def _refuse_damaged(home: Path, parcel: Parcel, artifact: Artifact) -> None:
    """Raise for what `inspect` finds and, in a folder of ours, for every byte that is not the one saved.

    A card that was edited, or removed, is no damage: people write theirs before they publish.
    """
    problems: list[Problem] = list(artifact.faults)
    if parcel.manifest is not None:
        _, found = manifests.check_whole(home)
        manifests.forget(parcel.folder)
        problems += [*found, *manifests.read_back(parcel.folder, parcel.manifest)]
    unlike = [problem for problem in dict.fromkeys(problems) if not problem.message.startswith(CARD)]
    manifests.raise_problems(home, unlike)
