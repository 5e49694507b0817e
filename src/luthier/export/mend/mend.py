"""``luthier mend SRC DST``: a repaired copy where the remedy is certain. SRC is never touched; DST appears whole, checked, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts import names, publish
from luthier.artifacts.identify import identify
from luthier.artifacts.tensorfile import DEFAULT_SHARD
from luthier.errors import ArtifactError, RequestError
from luthier.export.exported_folder import publish_folder
from luthier.export.find_weights import Found, find_weights, indexed, weight_files
from luthier.export.mend.check import check_mended
from luthier.export.mend.rebuild_config import rebuild
from luthier.export.mend.recover import recover
from luthier.export.stream import WHOLE, Output, as_they_are, write_stream

RECORD = "mended.json"
_COPIED = (".json", ".jinja", ".txt", ".model", ".md", ".py", ".tiktoken")
_LEFT = ("luthier.json", "proof.json", "trainer_state.json", "adapter_config.json", "config.json", RECORD)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "processor_config.json", "preprocessor_config.json")  # fmt: skip


@dataclass(frozen=True)
class Mended:
    """What was written, and what was done to it."""

    path: Path
    kind: str
    done: tuple[dict[str, str], ...]
    checked: str
    table: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "kind": self.kind, "done": list(self.done), "checked": self.checked}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}, mended.", *(f"- {step['what']}" for step in self.done), self.checked]
        return "\n".join([*lines, *([self.table] if self.table else [])])


@dataclass
class _Repair:
    """A repaired copy as it is being put together."""

    source: Path
    base: Path | None
    kind: str = "base"
    items: dict[str, Output] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    done: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    open_files: ExitStack = field(default_factory=ExitStack)

    def find(self, path: Path) -> Found:
        """The weights in a folder or file, open until the mending ends."""
        found = find_weights(path)
        self.open_files.callback(found.source.close)
        return found

    def base_items(self) -> dict[str, Output]:
        """The base's tensors by the names that transformers writes."""
        assert self.base is not None
        items = as_they_are(self.find(self.base).source)
        return {new: items[old].named(new) for old, new in names.renamed(items, adapter=False, where=str(self.base)).items()}  # fmt: skip

    def did(self, code: str, what: str) -> None:
        self.done.append({"code": code, "what": what})


def mend(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    rank: int | None = None,
    recover_adapter: bool = False,
    prove: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Mended:
    """Write a repaired copy of ``src`` as ``dst``, where the remedy is certain.

    Args:
        base: the base model's folder: what is copied from it, and what a mended adapter is opened on.
        alpha, rslora: what an adapter without adapter_config.json was trained with; no tensor tells.
        rank: recover the adapter from a merged ``src`` and ``base`` with this rank.
        recover_adapter: recover it with ranks from the spectrum; also done where nothing else is wrong and ``base`` is given.
        prove: let plain libraries compute the result's logits in a process of their own; the coverage check is made anyway.

    Raises:
        RequestError: nothing is wrong, something must be given, or no remedy is certain.
        ArtifactError: a file is missing or damaged beyond mending, or the result does not open.
        LuthierError: the disk has no room.
    """
    source, target = Path(src).expanduser().resolve(), Path(dst).expanduser().resolve()
    if not source.exists():
        raise RequestError("there is nothing here.", code="no-such-path", where=str(source), remedy="Check the path.")
    if target.exists():
        raise RequestError("this folder exists already.", code="exists", where=str(target), remedy="Give another name, or move it away.")  # fmt: skip
    if target.is_relative_to(source):
        raise RequestError("the copy would lie inside what it is made from, which is never touched.", code="exists", where=str(target), remedy="Give a folder outside.")  # fmt: skip
    repair = _Repair(source, _base_folder(base))
    with repair.open_files:
        read = _read(repair)
        _tensors(repair, read)
        _configs(repair, read, alpha, rslora)
        _small_files(repair)
        nothing_else = not repair.done and repair.base is not None and repair.kind == "base"
        if rank is not None or recover_adapter or nothing_else:
            _recover(repair, rank, say)
        if not repair.done:
            raise _nothing(repair.source)
        checked = _publish(repair, target, prove)
    return Mended(target, repair.kind, tuple(repair.done), checked, repair.table)


def _base_folder(base: str | os.PathLike[str] | None) -> Path | None:
    if base is None:
        return None
    folder = Path(base).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise RequestError("the base must be a model's folder on this machine, with its config.json.", code="not-a-model", where=str(folder), remedy="Give the folder as --base; a hub model's lies in the hub's cache.")  # fmt: skip
    return folder


def _nothing(source: Path) -> RequestError:
    problems = identify(source).problems
    if not problems:
        return RequestError("nothing is wrong here that mending could change.", code="nothing-to-mend", where=str(source), remedy="Use it as it is. To recover an adapter from a merged model, give its base: --base BASE.")  # fmt: skip
    said = " ".join(f"{problem.message} {problem.remedy}" for problem in problems[:3])
    return RequestError(f"nothing here has a certain remedy. What `luthier inspect` finds: {said}", code="nothing-to-mend", where=str(source))  # fmt: skip


def _read(repair: _Repair) -> Found:
    """The tensors of the folder, or of the newest whole ``checkpoint-N`` below an empty one."""
    folder = repair.source
    if folder.is_file() or weight_files(folder):
        return repair.find(folder)
    numbered = [(int(m[1]), path) for path in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    broken = []
    for _, path in sorted(numbered, reverse=True):
        try:
            read = repair.find(path)
        except ArtifactError as error:
            broken.append(f"{path.name} is not whole ({error.message.rstrip('.')})")
            continue
        if read.source.specs:
            passed = f"; passed over: {', '.join(broken)}" if broken else ""
            repair.did("from-checkpoint", f"The folder held no weights; taken from {path.name}, the newest whole one{passed}.")  # fmt: skip
            repair.source = path
            return read
    raise ArtifactError("there are no weights here" + (f": {'; '.join(broken)}" if broken else "") + ".", code="no-weights", where=str(folder), remedy="Give the folder that holds them.")  # fmt: skip


def _tensors(repair: _Repair, read: Found) -> None:
    """Names brought to one form, the adapter split from a whole peft model's tensors, files that open everywhere."""
    items = as_they_are(read.source)
    has_config = repair.source.is_dir() and (repair.source / "adapter_config.json").is_file()
    adapter = has_config or any(names.is_adapters(name) for name in items)
    repair.kind = "adapter" if adapter else "base"
    if adapter and _whole_peft(items):
        kept = {name: item for name, item in items.items() if names.is_adapters(name)}
        repair.did("split", f"The adapter's {len(kept)} tensors taken out of a whole peft model's {len(items)}.")
        items = kept
    renamed = names.renamed(items, adapter=adapter, where=str(repair.source))
    changed = [(old, new) for old, new in renamed.items() if old != new]
    if changed:
        repair.did("renamed", f"{len(changed)} names brought to the form that libraries expect: {changed[0][0]} is now {changed[0][1]}.")  # fmt: skip
    repair.items = {new: items[old].named(new) for old, new in renamed.items()}
    if read.source.nested is not None:
        repair.did("unnested", f"The tensors lay under {read.source.nested!r}.")
    if read.pickled:
        repair.did(
            "safetensors", f"{len(read.files)} PyTorch file{'s' * (len(read.files) > 1)} written as safetensors."
        )
    elif read.index is None and len(read.files) > 1:
        repair.did("index", f"The index of {len(read.files)} shards was missing; written anew.")
    elif read.index is not None and indexed(read.index) != read.source.file_of:
        repair.did("index", "The index named wrong files or left tensors out; written anew.")
    if adapter and repair.base is not None:
        _without_copies(repair)
    repair.metadata = {**{k: v for k, v in read.source.metadata.items() if k.startswith("luthier.")}, "format": "pt"}


def _without_copies(repair: _Repair) -> None:
    """peft writes an adapted embedding's own weight beside its adapter; where it is the base's, the base has it."""
    base = repair.base_items()
    for name in [name for name in repair.items if ".base_layer." in name]:
        original = base.get(name.removeprefix(names.PEFT).replace(".base_layer.", "."))
        if original is not None and original.spec.shape == repair.items[name].spec.shape and torch.equal(original.load(), repair.items[name].load()):  # fmt: skip
            del repair.items[name]
            repair.did("copy", f"{name} is the base's own weight; left to the base.")


def _whole_peft(items: Mapping[str, Output]) -> bool:
    """Whether base weights lie beside the adapter's; an adapter's own file may hold the embeddings under an adapter."""
    embedded = {names.of_adapter(name).name.partition(".lora_embedding_A")[0] for name in items if "lora_embedding_A" in name}  # fmt: skip
    return any(
        ".base_layer." in name
        and not names.is_adapters(name)
        and names.of_adapter(name).name.partition(".base_layer.")[0] not in embedded
        for name in items
    ) or any(".original_module." in name for name in items)


def _configs(repair: _Repair, read: Found, alpha: float | None, rslora: bool) -> None:
    name = "adapter_config.json" if repair.kind == "adapter" else "config.json"
    own = repair.source / name if repair.source.is_dir() else repair.source.parent / name
    if own.is_file():
        repair.small[name] = own.read_bytes()
        config = _json(own)
    elif repair.kind == "adapter":
        shapes = {n: i.spec.shape for n, i in repair.base_items().items()} if repair.base else None
        config = rebuild(
            {n: i.spec for n, i in repair.items.items()}, alpha=alpha, rslora=rslora, where=str(repair.source),
            base=str(repair.base) if repair.base else read.source.metadata.get("luthier.base"), base_shapes=shapes,
        )  # fmt: skip
        repair.small[name] = json.dumps(config, indent=2).encode() + b"\n"
        repair.did("adapter-config", f"adapter_config.json rebuilt from names and shapes: {config['peft_type']}, rank {config.get('r', 'none')}, alpha {config.get('lora_alpha', 'none')}.")  # fmt: skip
    elif repair.base is not None:
        repair.small[name] = (repair.base / name).read_bytes()
        config = _json(repair.base / name)
        repair.did("config", "config.json was missing; taken from the base, and the tensors checked against it.")
    else:
        raise RequestError("config.json is missing, and a model's tensors don't tell it.", code="cannot-know", where=str(repair.source), remedy="Give the base model's folder: --base BASE.")  # fmt: skip
    if repair.kind == "adapter" and repair.base is not None and config.get("base_model_name_or_path") != str(repair.base):  # fmt: skip
        named = config.get("base_model_name_or_path")
        if not named or (Path(str(named)).is_absolute() and not Path(str(named)).exists()):
            repair.did("base", f"The base it named, {named}, is not there; it names {repair.base} now.")
            config["base_model_name_or_path"] = str(repair.base)
            repair.small[name] = json.dumps(config, indent=2).encode() + b"\n"
    if repair.kind == "base":
        _untie(repair, read, config)


def _untie(repair: _Repair, read: Found, config: dict[str, Any]) -> None:
    """A tied weight goes into files once, under the name transformers reads it by."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not config.get("tie_word_embeddings") or not read.pickled:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for copy, original in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if copy in repair.items and original in repair.items:
            one, other = repair.items[copy], repair.items[original]
            if read.source.same(one.name, other.name) or torch.equal(one.load(), other.load()):
                del repair.items[copy]
                repair.did("tied", f"{copy} is {original}, to which config.json ties it; written once.")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"is no JSON: {error}.", code="broken-json", where=str(path), remedy="Get the file again, or move it away to have it rebuilt.") from None  # fmt: skip
    if not isinstance(content, dict):
        raise ArtifactError("holds no JSON object.", code="broken-json", where=str(path), remedy="Get the file again.")
    return content


def _small_files(repair: _Repair) -> None:
    """What lies beside the weights comes along; tokenizer, template and generation config from the base where they lack."""
    if repair.source.is_dir():
        for path in sorted(repair.source.iterdir()):
            if path.is_file() and path.suffix in _COPIED and path.name not in _LEFT and not path.name.endswith(".index.json"):  # fmt: skip
                repair.small[path.name] = path.read_bytes()
    if repair.base is None:
        return
    present = [name for name in _TOKENIZER if (repair.base / name).is_file()]
    if not {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} & set(repair.small):
        repair.small |= {name: (repair.base / name).read_bytes() for name in present}
        if present:
            repair.did("tokenizer", "The tokenizer was missing; taken from the base.")
    elif (template := _template(repair.base)) and not _has_template(repair.small) and _same_vocabulary(repair):
        repair.small["chat_template.jinja"] = template.encode()
        repair.did("template", "The chat template was missing; taken from the base.")
    generation = repair.base / "generation_config.json"
    if repair.kind == "base" and generation.is_file() and generation.name not in repair.small:
        repair.small[generation.name] = generation.read_bytes()
        repair.did("generation", "generation_config.json was missing; taken from the base.")


def _template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = _json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None


def _has_template(small: Mapping[str, bytes]) -> bool:
    return "chat_template.jinja" in small or bool(json.loads(small.get("tokenizer_config.json", b"{}")).get("chat_template"))  # fmt: skip


def _same_vocabulary(repair: _Repair) -> bool:
    """A template is certain only where both tokenizers write its tokens the same way."""
    assert repair.base is not None
    theirs = repair.base / "tokenizer.json"
    if "tokenizer.json" not in repair.small or not theirs.is_file():
        return False
    mine, other = json.loads(repair.small["tokenizer.json"]), _json(theirs)
    return all(mine.get(key) == other.get(key) for key in ("model", "added_tokens"))


def _recover(repair: _Repair, rank: int | None, say: Callable[[str], None]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    if repair.base is None or repair.kind != "base" or (rank is not None and rank < 1):
        raise RequestError("recovering an adapter takes a merged model, its base, and a rank of 1 or more.", code="cannot-know", where=str(repair.source), remedy="Give: luthier mend MERGED DST --base BASE [--rank R].")  # fmt: skip
    config = AutoConfig.from_pretrained(repair.base, local_files_only=True)
    for what, settings in (("base", vars(config)), ("merged model", json.loads(repair.small["config.json"]))):
        if settings.get("quantization_config"):
            raise RequestError(f"the {what} is quantised, so a difference of the two is codes or their rounding, and no adapter.", code="not-recoverable", where=str(repair.base if what == "base" else repair.source), remedy="Give the 16-bit model that it was made from; luthier export … --to transformers dequantises one.")  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = recover(repair.base_items(), repair.items, model, rank=rank, where=str(repair.source), say=say)
    found.config["base_model_name_or_path"] = str(repair.base)
    repair.kind, repair.items, repair.table = "adapter", found.items, found.table()
    repair.small.pop("config.json", None)
    repair.small["adapter_config.json"] = json.dumps(found.config, indent=2).encode() + b"\n"
    repair.facts["recovered"] = {"merged": str(repair.source), "rank": rank, "layers": [layer.as_dict() for layer in found.layers], "saved_whole": found.saved}  # fmt: skip
    worst = max((layer.relative_error for layer in found.layers), default=0.0)
    whole = f"; saved whole: {', '.join(found.saved)}" if found.saved else ""
    repair.did("recovered", f"An adapter for {len(found.layers)} layers recovered from the difference to the base; at most {worst:.2g} of a layer's difference remains{whole}.")  # fmt: skip


def _publish(repair: _Repair, target: Path, prove: bool) -> str:
    adapter = repair.kind == "adapter"
    partial = publish.begin(target)
    try:
        written = write_stream(
            partial, list(repair.items.values()), repair.small, stem="adapter_model" if adapter else "model",
            kind=repair.kind, metadata=repair.metadata, shard_bytes=WHOLE if adapter else DEFAULT_SHARD,
        )  # fmt: skip
        merged = repair.source if "recovered" in repair.facts else None
        approximate = merged is not None and repair.facts["recovered"]["rank"] is not None
        checked = check_mended(partial, repair.kind, repair.base, merged, prove=prove, approximate=approximate)
        facts = {**repair.facts, **checked.facts, "done": repair.done, "checked": checked.says}
        late = {RECORD: json.dumps({"source": str(repair.source), **facts}, indent=1, ensure_ascii=False).encode() + b"\n"}  # fmt: skip
        if checked.proof is not None:
            late["proof.json"] = checked.proof.to_bytes()
        parents = [{"kind": "mended-from", "name": str(repair.source)}, *([{"kind": "base", "name": str(repair.base)}] if repair.base else [])]  # fmt: skip
        config = None if adapter else json.loads(repair.small["config.json"])
        publish_folder(partial, target, written.manifest, {"mended": facts, "parents": parents}, config=config, late=late)  # fmt: skip
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return checked.says
