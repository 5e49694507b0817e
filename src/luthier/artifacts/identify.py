"""Telling what lies at a path, by what is in it and never by its name; no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.artifacts import kinds, problems
from luthier.artifacts import manifest as manifests
from luthier.artifacts.contents import ADAPTER_CONFIG, CONFIG, Contents, is_cut, look
from luthier.artifacts.json_file import read_object
from luthier.artifacts.lineage import Ancestor, lineage
from luthier.artifacts.manifest import Problem
from luthier.artifacts.names import is_adapters
from luthier.artifacts.run_folder import published, stages_of
from luthier.artifacts.sharded import check_sharded, read_sharded
from luthier.artifacts.sharded_model import model_tensors
from luthier.artifacts.tensorfile import TensorSpec, read_header
from luthier.artifacts.weight_facts import adapter_facts, adapter_of_names, count, precision_of
from luthier.config.yaml_text import load as load_yaml
from luthier.errors import ArtifactError, RequestError

PLAIN_MODEL = "AutoModelForCausalLM.from_pretrained"
PLAIN_ADAPTER = "PeftModel.from_pretrained, AutoPeftModelForCausalLM.from_pretrained"
CONVERTED = "nothing directly; luthier export … --to transformers makes a transformers folder of it"


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

    @property
    def faults(self) -> list[Problem]:
        """The problems that make it not whole; the others are worth knowing."""
        return [problem for problem in self.problems if problem.fault]

    def lineage(self) -> list[Ancestor]:
        """What it was made from, and what those were made from, where that is still there."""
        return lineage(self.parents, self.path)

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
        ArtifactError: the folder cannot be listed.
    """
    path = Path(path).expanduser()
    try:
        there = path.exists()
    except (OSError, ValueError):  # a name too long, or with a null character
        there = False
    if not there:
        raise RequestError("there is nothing here.", code="no-such-path", where=str(path), remedy="Check the path.")
    result = _folder(path) if path.is_dir() else _file(path)
    result.whole = not result.faults
    return result


def _folder(path: Path) -> Artifact:
    contents = look(path)
    kind = kinds.kind_of_folder(contents)
    describe: dict[str, Callable[[Contents], Artifact]] = {
        "run": _run, "checkpoint": _checkpoint, "adapter": _adapter, "base": _model, "distcp": _distcp,
        "state_dict": _state_dict, "trainer_checkpoint": _trainer_checkpoint, "gguf": _ggufs, "unknown": _unknown,
    }  # fmt: skip
    return describe[kind](contents)


def _file(path: Path) -> Artifact:
    kind = kinds.kind_of_file(path) if path.is_file() else "unknown"
    if kind == "gguf":
        return _gguf(path)
    if kind == "state_dict":
        found = Artifact(path, "state_dict", opens_with="torch.load(…, weights_only=True)")
        if is_cut(path):
            found.problems.append(Problem("file-size", "the file is cut off: its archive has no end.", problems.AGAIN))
        return found
    if kind == "safetensors":
        return _tensor_file(path)
    return Artifact(path, "unknown", problems=[Problem("unknown", "no kind of file that Luthier knows.", "Name a folder, a .gguf file or a file of weights.")])  # fmt: skip


def _tensor_file(path: Path) -> Artifact:
    """A safetensors file alone: weights without the folder that says what they are of."""
    found = Artifact(path, "state_dict", opens_with="safetensors.torch.load_file")
    try:
        places, _, size = read_header(path)
    except ArtifactError as error:
        found.problems.append(problems.from_error(error))
        return found
    if size != path.stat().st_size:
        found.problems.append(Problem("file-size", f"it has {path.stat().st_size} bytes and its header says {size}.", problems.AGAIN))  # fmt: skip
    specs = [place.spec for place in places.values()]
    if specs and all(is_adapters(spec.name) for spec in specs):
        found.kind, found.adapter = "adapter", adapter_of_names(specs)
        found.problems.append(Problem("no-adapter-config", "an adapter's weights alone, without adapter_config.json.", "Name the folder it lies in."))  # fmt: skip
    _measure(found, specs, {})
    return found


def _unknown(contents: Contents) -> Artifact:
    said = Problem("unknown", "nothing that Luthier knows lies here.", "Name a run, a checkpoint, a model folder or a .gguf file.")  # fmt: skip
    return Artifact(contents.path, "unknown", problems=[*contents.problems, said])


def _run(contents: Contents) -> Artifact:
    path = contents.path
    run = Artifact(path, "run")
    if "run.yaml" not in contents.files:
        run.problems = [Problem("no-config", "the run has no run.yaml.", "Put the run file there as run.yaml.")]
        config: Any = None
    else:
        try:
            config = load_yaml((path / "run.yaml").read_text(encoding="utf-8"), "run.yaml").value
            if not isinstance(config, dict):
                raise ValueError("it holds no keys")
        except (OSError, ValueError, RequestError) as error:
            run.problems = [Problem("run-yaml", f"run.yaml cannot be read: {error}.".replace("..", "."), "Put the run file back.")]  # fmt: skip
            config = None
    listed: list[dict[str, Any]] = []
    for found in published(path):
        _, damaged = manifests.check_whole(found.path)
        listed.append({"step": found.step, "path": str(found.path), "whole": not damaged})
    newest = next((entry for entry in reversed(listed) if entry["whole"]), None)
    stages = [(each, identify(each)) for each in stages_of(path)]
    final = next((each / "final" for each, _ in reversed(stages) if (each / "final").is_dir()), path / "final")
    inner = _folder(final) if final.is_dir() else _folder(Path(newest["path"])) if newest else None
    if inner is not None:
        run.base, run.adapter, run.precision = inner.base, inner.adapter, inner.precision
        run.parameters, run.parents = inner.parameters, inner.parents
        run.problems += inner.problems
    for entry in listed:
        if not entry["whole"]:
            run.problems.append(Problem("checkpoint-damaged", f"the checkpoint of step {entry['step']} is damaged.", "Resuming passes it over."))  # fmt: skip
    if inner is None and not listed and not run.problems:
        run.problems.append(Problem("nothing-saved", "this run has saved nothing yet.", "luthier resume on this folder begins it again.", fault=False))  # fmt: skip
    model = config.get("model") if config else None
    run.base = run.base or ({"name": model.get("path") if isinstance(model, dict) else model} if model else None)
    run.facts = {"checkpoints": listed, "final": str(final) if final.is_dir() else None, "finished": final.is_dir(), "resumes_from": newest["step"] if newest else None}  # fmt: skip
    run.facts["proof"] = _proof(final)
    if stages:
        _describe_stages(run, stages, config)
    ways = ["luthier.load, luthier chat"] if inner is not None else []
    if newest and not final.is_dir():
        ways.append("luthier resume")
    run.opens_with = ", ".join(ways)
    return run


def _describe_stages(run: Artifact, stages: list[tuple[Path, Artifact]], config: Any) -> None:
    known = ("finished", "resumes_from")
    run.facts["stages"] = [{"path": str(each), **{key: found.facts.get(key) for key in known}} for each, found in stages]  # fmt: skip
    wanted = config.get("stages") if config else None
    all_there = len(stages) == len(wanted) if isinstance(wanted, list) else False
    run.facts["finished"] = all_there and all(found.facts.get("finished") for _, found in stages)


def _proof(final: Path) -> dict[str, Any] | None:
    try:
        return read_object(final / "proof.json")
    except ArtifactError:
        return None


def _checkpoint(contents: Contents) -> Artifact:
    kind = "adapter" if "adapter" in contents.folders else "model"
    result = _weights(look(contents.path / kind), kind, home=contents)
    result.path, result.kind = contents.path, "checkpoint"
    result.opens_with = (
        f"luthier resume, luthier.load; {'PeftModel.from_pretrained' if kind == 'adapter' else PLAIN_MODEL}({kind}/)"
    )
    return result


def _adapter(contents: Contents) -> Artifact:
    inner = kinds.adapters_in_folders(contents)
    if inner and not kinds.has_adapter_weights(contents) and ADAPTER_CONFIG not in contents.files:
        found = [_folder(contents.path / name) for name in inner]
        result = found[0]
        result.path = contents.path
        result.facts["adapters"] = inner
        result.problems += [problem for other in found[1:] for problem in other.problems]
        result.opens_with = f"luthier.load, {PLAIN_ADAPTER} of {', '.join(inner)}"
        return result
    return _weights(contents, "adapter")


def _model(contents: Contents) -> Artifact:
    return _weights(contents, "model")


def _weights(contents: Contents, kind: str, *, home: Contents | None = None) -> Artifact:
    """A folder with the weights of a model or an adapter; ``home`` holds the manifest where that is another folder."""
    ours = home or contents
    adapter = kind == "adapter"
    result = Artifact(contents.path, "adapter" if adapter else "base")
    manifest = None
    if home or manifests.NAME in ours.files:
        manifest, result.problems = manifests.check_whole(ours.path)
    if manifest is None:
        result.problems += problems.of_weights(contents, adapter=adapter)
        specs = [place.spec for _, place in contents.tensors()]
    else:
        within = "" if home is None else f"{contents.path.name}/"
        files = {file for file in manifest.files if file.startswith(within)}
        specs = [place.spec for place in manifest.tensors if place.file in files]
        result.problems += contents.problems
        result.base = manifest.facts.get("base")
        result.parents = list(manifest.facts.get("parents", []))
        known = ("step", "fingerprint", "versions")
        result.facts = {key: manifest.facts[key] for key in known if key in manifest.facts}
        if not adapter and (
            manifest.kind == "merged" or {"adapter", "base"} <= {parent.get("kind") for parent in result.parents}
        ):
            result.kind = "merged"
    config = contents.json(ADAPTER_CONFIG if adapter else CONFIG)
    _measure(result, specs, {} if adapter else config)
    if adapter:
        _describe_adapter(result, config, specs)
    else:
        result.facts["architecture"] = _architecture(config)
        result.facts["has_tokenizer"] = bool({"tokenizer_config.json", "tokenizer.json"} & set(contents.files))
    result.problems += problems.of_templates(contents)
    result.problems = list(dict.fromkeys([*result.problems, *contents.problems]))
    result.opens_with = _ways(result, contents)
    return result


def _measure(result: Artifact, specs: Iterable[TensorSpec], config: dict[str, Any]) -> None:
    specs = list(specs)
    result.parameters = count(specs, config) or None
    result.precision = precision_of(specs, config)


def _describe_adapter(result: Artifact, config: dict[str, Any], specs: list[TensorSpec]) -> None:
    result.adapter = adapter_facts(config) if config else adapter_of_names(specs)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    named = {"name": name if isinstance(name, str) else None, "revision": revision if isinstance(revision, str) else None}  # fmt: skip
    result.base = result.base or named
    result.problems += problems.of_base(named)


def _architecture(config: dict[str, Any]) -> str | None:
    listed = config.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else config.get("model_type")
    return named if isinstance(named, str) else None


def _ways(result: Artifact, contents: Contents) -> str:
    """What opens it as it lies there."""
    if result.faults:
        return ""
    plain = PLAIN_ADAPTER if result.adapter is not None else PLAIN_MODEL
    only_ours = {"wrapped-names", "doubled-prefix", "adapter-names"} & {problem.code for problem in result.problems}
    return "luthier.load" if only_ours else f"luthier.load, {plain}"


def _distcp(contents: Contents) -> Artifact:
    found = Artifact(contents.path, "distcp", problems=problems.of_distcp(contents), opens_with=CONVERTED)
    found.facts["files"] = len([n for n in contents.files if n.endswith((".distcp", ".safetensors"))])
    found.facts["wrote"] = "llama-cookbook" if "train_params.yaml" in contents.files else "torch.distributed.checkpoint"
    if found.faults:
        return found
    found.problems = [problem for problem in found.problems if problem.code != "stranger"]  # said better below
    try:
        saved = read_sharded(contents.path)
        tensors, left = model_tensors(saved)
        check_sharded(saved, tensors.values())
    except (ArtifactError, RequestError) as error:
        found.problems.append(problems.from_error(error))
        return found
    _measure(found, [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()], {})
    found.facts["beside_the_model"] = len(left)
    return found


def _state_dict(contents: Contents) -> Artifact:
    found = Artifact(contents.path, "state_dict", problems=problems.of_weights(contents, adapter=False))
    dropped = {"no-tokenizer", "no-template", "no-weights"}  # nobody expects them beside a bare state dict
    found.problems = [problem for problem in found.problems if problem.code not in dropped]
    found.problems.append(Problem("no-model-config", "there are weights here and no config.json, which says what model they are of.", f"Copy the base's config.json and tokenizer into the folder, or give the base: {problems.MEND}", fault=False))  # fmt: skip
    specs = [place.spec for _, place in contents.tensors()]
    _measure(found, specs, {})
    found.opens_with = "torch.load(…, weights_only=True)" if contents.pickles else "safetensors.torch.load_file"
    return found


def _trainer_checkpoint(contents: Contents) -> Artifact:
    inner = kinds.trainer_checkpoints(contents)
    if "trainer_state.json" not in contents.files and inner:  # the output folder: its newest checkpoint stands for it
        found = _trainer_checkpoint(look(contents.path / inner[-1]))
        found.path = contents.path
        found.facts["checkpoints"] = [{"step": int(name.split("-")[1]), "path": str(contents.path / name)} for name in inner]  # fmt: skip
        return found
    sharded = sorted(name for name in contents.folders if (contents.path / name / ".metadata").is_file())
    adapter = ADAPTER_CONFIG in contents.files or kinds.has_adapter_weights(contents)
    found = _weights(contents, "adapter" if adapter else "model")
    found.kind = "trainer_checkpoint"
    if sharded and found.parameters is None:
        found.problems = [p for p in found.problems if p.code != "no-weights"]
        found.problems.append(Problem("sharded-weights", f"the weights lie in {sharded[0]}/ in torch's sharded form, which transformers does not open.", problems.CONVERT))  # fmt: skip
    elif not adapter and CONFIG not in contents.files:
        found.problems.append(Problem("no-model-config", "there are weights here and no config.json, which says what model they are of.", f"Give the base they were trained from: {problems.MEND}", fault=False))  # fmt: skip
    state = contents.json("trainer_state.json")
    step = state.get("global_step")
    found.facts |= {"step": step if type(step) is int else None, "weights": str(contents.path)}
    found.facts["optimizer"] = bool({"optimizer.pt", "optimizer.bin", "optimizer"} & {*contents.files, *contents.folders})  # fmt: skip
    found.problems = list(dict.fromkeys([*found.problems, *contents.problems]))
    return found


def _ggufs(contents: Contents) -> Artifact:
    files = sorted(name for name in contents.files if name.endswith(".gguf"))
    if len(files) == 1:
        result = _gguf(contents.path / files[0])
        if manifests.NAME in contents.files:
            result.path = contents.path
            manifest, faults = manifests.check_whole(contents.path)
            result.problems += faults
            result.parents = list(manifest.facts.get("parents", [])) if manifest else []
        return result
    result = Artifact(contents.path, "gguf", facts={"files": files})
    result.problems = [*contents.problems, Problem("which-gguf", f"{len(files)} GGUF files lie here.", f"Name one, such as {files[0]}.", fault=False)]  # fmt: skip
    return result


def _gguf(path: Path) -> Artifact:
    from luthier.artifacts.gguf_facts import describe_gguf

    result = Artifact(path, "gguf", opens_with="luthier.load, transformers (gguf_file=…), llama.cpp")
    try:
        known = describe_gguf(path)
    except ArtifactError as error:
        result.problems, result.opens_with = [problems.from_error(error)], ""
        return result
    result.precision, result.parameters = known.precision, known.parameters
    result.facts["architecture"] = known.architecture
    if known.adapter is not None:
        result.kind, result.adapter = "gguf_adapter", known.adapter
        result.base = {"name": known.base} if known.base else None
        result.opens_with = "llama.cpp (--lora)"
    return result
