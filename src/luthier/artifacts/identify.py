"""Telling what lies at a path, by what is in it and never by its name; no weights are read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.artifacts import manifest as manifests
from luthier.artifacts.manifest import Manifest, Problem
from luthier.artifacts.run_folder import published
from luthier.artifacts.tensorfile import TensorSpec, read_header
from luthier.errors import ArtifactError, RequestError

PRECISIONS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8"}


@dataclass
class Artifact:
    """What is at a path, with the keys of ``luthier inspect --json``."""

    path: Path
    kind: str
    whole: bool = True
    problems: list[Problem] = field(default_factory=list)
    base: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    precision: str | None = None
    parameters: int | None = None
    parents: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    opens_with: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "whole": self.whole,
            "problems": [problem.as_dict() for problem in self.problems],
            "base": self.base,
            "adapter": self.adapter,
            "precision": self.precision,
            "parameters": self.parameters,
            "parents": self.parents,
            "opens_with": self.opens_with,
            **self.facts,
        }


def identify(path: str | Path) -> Artifact:
    """Say what is at a path, whether it is whole, and what is wrong with it.

    Raises:
        RequestError: there is nothing.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise RequestError("there is nothing here.", code="no-such-path", where=str(path), remedy="Check the path.")
    return _file(path) if path.is_file() else _folder(path)


def _folder(path: Path) -> Artifact:
    names = {child.name for child in path.iterdir()}
    if "run.yaml" in names:
        return _run(path)
    if "trainer" in names and names & {"adapter", "model"}:
        return _checkpoint(path)
    if "adapter_config.json" in names:
        return _weights(path, "adapter")
    if manifests.NAME in names or "config.json" in names:
        return _weights(path, "base")
    if any(name.endswith(".distcp") for name in names):
        return Artifact(path, "distcp", opens_with="luthier export (not in this version)")
    if any(name.endswith((".pt", ".pth")) for name in names):
        return Artifact(path, "state_dict", opens_with="luthier export (not in this version)")
    if "checkpoints" in names:
        return _broken(path, "run", "no-config", "the run has no run.yaml.", "Put the run file there as run.yaml.")
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) == 1:
        return _file(path / ggufs[0])
    return _broken(path, "unknown", "unknown", "nothing that Luthier knows lies here.", "Name a run, a checkpoint, a model folder or a .gguf file.")  # fmt: skip


def _file(path: Path) -> Artifact:
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            return Artifact(path, "gguf", opens_with="luthier.load, transformers (gguf_file=…), llama.cpp")
    if path.suffix in (".pt", ".pth", ".bin"):
        return Artifact(path, "state_dict", opens_with="torch.load(…, weights_only=True)")
    return _broken(path, "unknown", "unknown", "no kind of file that Luthier knows.", "Name a folder or a .gguf file.")


def _broken(path: Path, kind: str, code: str, message: str, remedy: str) -> Artifact:
    return Artifact(path, kind, False, [Problem(code, message, remedy)])


def _run(path: Path) -> Artifact:
    import yaml

    try:
        config = yaml.safe_load((path / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return _broken(path, "run", "run-yaml", f"run.yaml cannot be read: {error}.", "Put the run file back.")
    listed = []
    for found in published(path):
        _, problems = manifests.check_whole(found.path)
        listed.append({"step": found.step, "path": str(found.path), "whole": not problems})
    newest = next((entry for entry in reversed(listed) if entry["whole"]), None)
    final = path / "final"
    inner = identify(final) if final.is_dir() else _folder(Path(newest["path"])) if newest else None
    run = Artifact(path, "run")
    if inner is not None:
        run.base, run.adapter, run.precision = inner.base, inner.adapter, inner.precision
        run.parameters, run.parents, run.problems = inner.parameters, inner.parents, list(inner.problems)
    for entry in listed:
        if not entry["whole"]:
            run.problems.append(Problem("checkpoint-damaged", f"the checkpoint of step {entry['step']} is damaged.", "Resuming passes it over."))  # fmt: skip
    run.whole = not run.problems
    model = config.get("model")
    run.base = run.base or {"name": model.get("path") if isinstance(model, dict) else model}
    run.facts = {"checkpoints": listed, "final": str(final) if final.is_dir() else None, "finished": final.is_dir(), "resumes_from": newest["step"] if newest else None}  # fmt: skip
    run.facts["proof"] = _read_json(final / "proof.json") if (final / "proof.json").is_file() else None
    run.opens_with = "luthier.load, luthier chat" + (", luthier resume" if newest and not final.is_dir() else "")
    return run


def _checkpoint(path: Path) -> Artifact:
    kind = "adapter" if (path / "adapter").is_dir() else "model"
    result = _weights(path / kind, "adapter" if kind == "adapter" else "base", manifest_in=path)
    result.path, result.kind = path, "checkpoint"
    result.opens_with = f"luthier resume, luthier.load; {'PeftModel' if kind == 'adapter' else 'AutoModelForCausalLM'}.from_pretrained({kind}/)"
    return result


def _weights(path: Path, kind: str, manifest_in: Path | None = None) -> Artifact:
    """A folder with weights: a base, a model of ours, or an adapter."""
    home = manifest_in or path
    result = Artifact(path, kind)
    manifest: Manifest | None = None
    if manifest_in or (home / manifests.NAME).exists():
        manifest, result.problems = manifests.check_whole(home)
    specs, found = _specs(path)
    if manifest is None:
        result.problems = result.problems + found
    result.whole = not result.problems
    if manifest is not None:
        if manifest.kind == "merged":
            result.kind = "merged"
        result.base = manifest.facts.get("base")
        result.parents = list(manifest.facts.get("parents", []))
        known = ("step", "fingerprint", "versions")
        result.facts = {key: manifest.facts[key] for key in known if key in manifest.facts}
    result.parameters = sum(_count(spec) for spec in specs) or None
    dtypes = Counter({spec.dtype: 0 for spec in specs})
    for spec in specs:
        dtypes[spec.dtype] += _count(spec)
    if dtypes:
        widest = dtypes.most_common(1)[0][0]
        result.precision = PRECISIONS.get(widest, widest.lower())
    if kind == "adapter":
        _describe_adapter(result, path)
    else:
        _describe_model(result, path)
    return result


def _describe_adapter(result: Artifact, path: Path) -> None:
    config = _read_json(path / "adapter_config.json")
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "modules_to_save")
    result.adapter = {"type": str(config.get("peft_type", "unknown")).lower()}
    result.adapter |= {key: config[key] for key in keys if config.get(key) is not None}
    named = {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    result.base = result.base or named
    result.opens_with = "luthier.load, PeftModel.from_pretrained, AutoPeftModelForCausalLM.from_pretrained"
    name = named["name"]
    if name and Path(name).is_absolute() and not Path(name).exists():
        result.problems.append(Problem("base-missing", f"the base it names, {name}, is not there.", "Give the base: luthier.load(…, base=PATH)."))  # fmt: skip


def _describe_model(result: Artifact, path: Path) -> None:
    config = _read_json(path / "config.json")
    result.facts["architecture"] = (config.get("architectures") or [config.get("model_type")])[0]
    result.facts["has_tokenizer"] = (path / "tokenizer_config.json").is_file() or (path / "tokenizer.json").is_file()
    result.opens_with = "luthier.load, AutoModelForCausalLM.from_pretrained"


def _specs(path: Path) -> tuple[list[TensorSpec], list[Problem]]:
    """The tensors of a folder's files, and what is wrong with the files."""
    specs: list[TensorSpec] = []
    problems: list[Problem] = []
    again = "Get the file again."
    for file in sorted(path.glob("*.safetensors")):
        try:
            places, _, size = read_header(file)
        except ArtifactError as error:
            problems.append(Problem(error.code, f"{file.name}: {error.message}", error.remedy))
            continue
        if size != file.stat().st_size:
            problems.append(Problem("file-size", f"{file.name} has {file.stat().st_size} bytes and its header says {size}.", again))  # fmt: skip
        specs += [place.spec for place in places.values()]
    names = {spec.name for spec in specs}
    for index in sorted(path.glob("*.safetensors.index.json")):
        wanted = _read_json(index).get("weight_map", {})
        for file in sorted({name for name in wanted.values() if not (path / name).is_file()}):
            problems.append(Problem("file-missing", f"{file} is missing.", again))
        lost = sorted(name for name in wanted if name not in names and (path / wanted[name]).is_file())
        if lost:
            problems.append(Problem("tensor-missing", f"{len(lost)} tensors of the index are in no file, such as {lost[0]}.", again))  # fmt: skip
    if not specs and not problems and not list(path.glob("*.bin")):
        problems.append(Problem("no-weights", "there are no weights here.", "Get the folder's *.safetensors files."))
    return specs, problems


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _count(spec: TensorSpec) -> int:
    count = 1
    for extent in spec.shape:
        count *= extent
    return count
