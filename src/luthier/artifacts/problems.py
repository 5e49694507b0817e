"""What can be wrong with a folder of weights that others wrote, each with a code, a sentence and the mend.

A fault means that something is missing or damaged; anything else opens and is what one should know beforehand.
Our own folders have a manifest, which says more (`artifacts.manifest`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from luthier.artifacts.contents import ADAPTER_CONFIG, SHARD, Contents, is_cut
from luthier.artifacts.kinds import has_adapter_weights, has_model_weights, trainer_checkpoints
from luthier.artifacts.manifest import Problem
from luthier.artifacts.names import PEFT, copies, is_adapters, of_adapter, unwrapped
from luthier.artifacts.templates import LONGEST, check_template
from luthier.artifacts.tensorfile import Place
from luthier.errors import ArtifactError, RequestError

AGAIN = "Get the file again."
MEND = "`luthier mend SRC DST` writes a repaired copy."
CONVERT = "`luthier export FOLDER DST --to transformers --base BASE` makes a transformers folder of it; BASE needs its config, tokenizer and processor only."  # fmt: skip
_ZERO_CHECK = 64 * 2**20  # bytes of lora_B that are read to tell an adapter that never trained
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight",
)  # fmt: skip


def of_weights(contents: Contents, *, adapter: bool) -> list[Problem]:
    """Everything that is wrong with a folder of a model or of an adapter, as far as headers show it."""
    tensors = list(contents.tensors())
    checks = [_of_files(contents), _of_index(contents), _of_pickles(contents, tensors), _of_names(tensors, adapter)]
    checks += [_of_types(contents, tensors)]
    checks += [_of_adapter(contents, tensors)] if adapter else [_of_model(contents, tensors)]
    found = [problem for check in checks for problem in check]
    return list(dict.fromkeys([*contents.problems, *found]))  # what reading has noted by now comes first


def _of_files(contents: Contents) -> Iterator[Problem]:
    for name in contents.safetensors:
        header = contents.header(name)
        if header and header.actual != header.expected:
            yield Problem("file-size", f"{name} has {header.actual} bytes and its header says {header.expected}.", AGAIN)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer.model", *(n for n in contents.files if n.endswith(".bin"))):
        if contents.is_pointer(name):
            yield Problem("lfs-pointer", f"{name} is a Git LFS pointer, not the file itself.", "Run `git lfs pull` in that folder.")  # fmt: skip


def _of_index(contents: Contents) -> Iterator[Problem]:
    for index, weight_map in contents.indices.items():
        missing = sorted({file for file in weight_map.values() if file not in contents.files})
        for file in missing:
            yield Problem("file-missing", f"{file} is missing, and {index} names it.", AGAIN)
        if index.endswith(".bin.index.json"):
            continue
        yield from _compare(contents, index, weight_map)
    if not contents.indices:
        yield from _without_index(contents)


def _compare(contents: Contents, index: str, weight_map: dict[str, str]) -> Iterator[Problem]:
    held: dict[str, str] = {}
    headers = {file: contents.header(file) for file in sorted(set(weight_map.values())) if file in contents.files}
    for file, header in headers.items():
        for name in header.places if header else ():
            if name in held:
                yield Problem("twice", f"tensor {name} is in {held[name]} and in {file}.", "Files of two saves were mixed; get the folder again.")  # fmt: skip
            held[name] = file
    readable = {file for file, header in headers.items() if header}
    wrong = sorted(name for name, file in weight_map.items() if file in readable and held.get(name) != file)
    remedy = f"Files of two saves were mixed: get the folder again. If the files are right and the index is not: {MEND}"
    if wrong:
        yield Problem("tensor-missing", f"{len(wrong)} tensors of {index} are not in the file it names, such as {wrong[0]}.", remedy)  # fmt: skip
    extra = sorted(name for name in held if name not in weight_map)
    if extra:
        yield Problem("tensor-extra", f"{len(extra)} tensors are in no line of {index}, such as {extra[0]}; transformers would leave them out.", remedy)  # fmt: skip
    stale = sorted(name for name in contents.files if SHARD.fullmatch(name) and name.endswith(".safetensors") and name not in weight_map.values())  # fmt: skip
    if stale:
        yield Problem("stranger", f"{stale[0]} belongs to no shard that {index} names: it is left from another save.", "Move it away.", fault=False)  # fmt: skip


def _without_index(contents: Contents) -> Iterator[Problem]:
    found = [match for name in [*contents.safetensors, *contents.pickles] if (match := SHARD.fullmatch(name))]
    if not found:
        return
    stem, ending, total = found[0]["stem"], found[0]["ending"], int(found[0]["total"])
    index = f"{stem}.{ending}.index.json"
    numbers = {int(match["number"]) for match in found if int(match["total"]) == total and match["stem"] == stem}
    lost = [number for number in range(1, min(total, 10_000) + 1) if number not in numbers]
    if lost:
        yield Problem("file-missing", f"{len(lost)} of {total} shards are missing, number {lost[0]} first.", AGAIN)
    if index not in contents.files:
        yield Problem("missing-index", f"{len(found)} shards lie here without {index}.", f"Get {index}, or: {MEND}")


def _of_pickles(contents: Contents, tensors: Sequence[Any]) -> Iterator[Problem]:
    for name in contents.pickles:
        if is_cut(contents.path / name):
            yield Problem("file-size", f"{name} is cut off: its archive has no end.", AGAIN)
    if contents.pickles and not contents.safetensors:
        yield Problem("pickle-only", f"the weights are pickle files only ({contents.pickles[0]}), which could hold code; here they are read without running any.", f"To have safetensors: {MEND}", fault=False)  # fmt: skip
    elif not contents.safetensors and not contents.problems:
        yield Problem("no-weights", "there are no weights here.", "Get the folder's *.safetensors files; an interrupted download or a clone without Git LFS leaves them out.")  # fmt: skip
    elif contents.safetensors and not tensors and not contents.problems:
        yield Problem("no-tensors", "the weight files hold no tensors at all.", "Whoever saved this saved nothing; get it again, or use an older checkpoint.")  # fmt: skip


def _of_names(tensors: Sequence[tuple[str, Place]], adapter: bool) -> Iterator[Problem]:
    names = [place.spec.name for _, place in tensors]
    wrapped = [name for name in names if unwrapped(name) != name]
    if wrapped:
        yield Problem("wrapped-names", f"{len(wrapped)} tensors carry names that a wrapper left, such as {wrapped[0]}; plain libraries match none of them.", f"luthier.load takes them off. For plain libraries: {MEND}", fault=False)  # fmt: skip
    plain = [unwrapped(name) for name in names]
    doubled = [name for name in plain if name.startswith(PEFT * 2)]
    if doubled:
        yield Problem("doubled-prefix", f"{len(doubled)} tensors begin with {PEFT} twice, such as {doubled[0]}: a peft model was wrapped again.", f"luthier.load takes one off. For plain libraries: {MEND}", fault=False)  # fmt: skip
    if adapter:
        known = {*doubled, *copies(plain)}
        other = [name for name in plain if name not in known and is_adapters(name) and of_adapter(name).name != name]
        if other:
            yield Problem("adapter-names", f"{len(other)} tensors are not named as in peft's files, such as {other[0]}.", f"luthier.load renames them. For plain libraries: {MEND}", fault=False)  # fmt: skip
    empty = [place.spec.name for _, place in tensors if 0 in place.spec.shape]
    if empty:
        yield Problem("empty-tensors", f"{len(empty)} tensors have no elements, such as {empty[0]}: a sharded model was saved from one process.", "These weights are gone from this folder; use another checkpoint.")  # fmt: skip


def _of_types(contents: Contents, tensors: Sequence[tuple[str, Place]]) -> Iterator[Problem]:
    """Integers where weights belong: a header's type was changed, and the bytes would be read as other numbers."""
    if contents.json("config.json").get("quantization_config"):
        return
    wrong = [p.spec for _, p in tensors if p.spec.name.endswith((".weight", ".bias")) and p.spec.dtype in _INTEGERS]
    if wrong:
        yield Problem("tensor-type", f"{len(wrong)} weights are integers, such as {wrong[0].name} ({wrong[0].dtype}), and no config says that they are quantised.", AGAIN)  # fmt: skip


def _of_model(contents: Contents, tensors: Sequence[tuple[str, Place]]) -> Iterator[Problem]:
    own = [place.spec.name for _, place in tensors if is_adapters(place.spec.name)]
    if own:
        yield Problem("adapter-in-weights", f"{len(own)} of {len(tensors)} tensors are an adapter's, such as {own[0]}: the state of a whole peft model was saved as a model.", f"transformers would leave them out. {MEND}")  # fmt: skip
    if ADAPTER_CONFIG in contents.files:
        yield Problem("adapter-in-base", "an adapter_config.json lies beside a model; transformers would attach that adapter without a word.", "Move the adapter's files into a folder of their own.")  # fmt: skip
    earlier = [name for name in trainer_checkpoints(contents) if (contents.path / name / ADAPTER_CONFIG).is_file()]
    if earlier and ADAPTER_CONFIG not in contents.files:
        yield Problem("adapter-in-checkpoints", f"this is a whole model, and the adapter that was trained lies in {earlier[-1]}: it was merged before it was saved.", f"To train on, or for the adapter alone, open {contents.path / earlier[-1]}.", fault=False)  # fmt: skip
    yield from _of_tokenizer(contents, tensors)


def _of_tokenizer(contents: Contents, tensors: Sequence[tuple[str, Place]]) -> Iterator[Problem]:
    files = contents.files
    config = contents.json("config.json")
    if not {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"} & set(files):
        yield Problem("no-tokenizer", "there is no tokenizer here.", "Copy the base's tokenizer files into the folder.", fault=False)  # fmt: skip
    elif not _has_template(contents):
        yield Problem("no-template", "there is no chat template here.", "If it was trained on conversations, take its base's: `luthier mend SRC DST` given the base.", fault=False)  # fmt: skip
    told = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    wanted = told.get("vocab_size") if isinstance(told, dict) else None
    rows = next((p.spec.shape[0] for _, p in tensors if p.spec.name.endswith(_EMBEDDINGS) and len(p.spec.shape) == 2), None)  # fmt: skip
    if type(wanted) is int and rows is not None and rows != wanted:
        yield Problem("vocabulary", f"the embeddings have {rows} rows and config.json says vocab_size {wanted}.", "The vocabulary was resized and one of the two was not saved; get both from one save.", fault=False)  # fmt: skip
    last = _last_token(contents) if rows is not None else None
    if last is not None and rows is not None and last >= rows:
        yield Problem("vocabulary", f"the tokenizer gives ids up to {last} and the embeddings have {rows} rows.", "It is another model's tokenizer, or added tokens were not trained; put the right one there.", fault=False)  # fmt: skip


def _has_template(contents: Contents) -> bool:
    if {"chat_template.jinja", "chat_template.json"} & set(contents.files) or "additional_chat_templates" in contents.folders:  # fmt: skip
        return True
    return bool(contents.json("tokenizer_config.json").get("chat_template"))


def of_templates(contents: Contents) -> list[Problem]:
    """Chat templates that try to escape their sandbox, or to exhaust the machine, and code that a folder brings."""
    found: list[Any] = [contents.json(name).get("chat_template") for name in ("tokenizer_config.json", "chat_template.json")]  # fmt: skip
    problems = []
    try:
        if contents.files.get("chat_template.jinja", LONGEST + 1) <= LONGEST:
            found.append((contents.path / "chat_template.jinja").read_text(encoding="utf-8"))
        elif "chat_template.jinja" in contents.files:
            problems.append(Problem("template-exhausts", "chat_template.jinja is larger than any template.", AGAIN))
        check_template([text for text in found if text], str(contents.path))
    except ArtifactError as error:
        problems.append(from_error(error))
    except (OSError, UnicodeDecodeError):
        problems.append(Problem("broken-template", "chat_template.jinja cannot be read as UTF-8.", AGAIN))
    coded = [name for name in ("config.json", "tokenizer_config.json", "processor_config.json") if contents.json(name).get("auto_map")]  # fmt: skip
    if _imports_a_strangers_module(contents.json(ADAPTER_CONFIG).get("auto_mapping")):
        coded.append(ADAPTER_CONFIG)
    if coded:
        problems.append(Problem("brings-code", f"{coded[0]} names Python code to run.", "Luthier runs none of it unless model.trust_remote_code is set; read it before you do.", fault=False))  # fmt: skip
    return problems


def _imports_a_strangers_module(mapping: Any) -> bool:
    """peft names the base's class wherever no task was given; a class of transformers' own is no code of the folder's."""
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    return bool(mapping) and not (isinstance(library, str) and library.startswith("transformers.models."))


def _last_token(contents: Contents) -> int | None:
    """The highest id that the tokenizer's files name."""
    content = contents.json("tokenizer.json")
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens")
    ids: list[Any] = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [len(vocab) - 1] if isinstance(vocab, list) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((value for value in ids if type(value) is int), default=None)


def _of_adapter(contents: Contents, tensors: Sequence[tuple[str, Place]]) -> Iterator[Problem]:
    if ADAPTER_CONFIG not in contents.files:
        yield Problem("no-adapter-config", f"the adapter's weights are here and {ADAPTER_CONFIG} is not.", f"Copy it from another checkpoint of that run; or: {MEND} It asks for what names and shapes don't tell.")  # fmt: skip
    beside = [name for name in contents.model_safetensors if has_adapter_weights(contents)]
    beside += [name for name in contents.pickles if not name.startswith("adapter_") and has_adapter_weights(contents)]
    if beside:
        yield Problem("merged-beside-adapter", f"weights of a model ({beside[0]}) lie beside the adapter; if the adapter was merged into them, adding it again applies it twice.", "Move the model into a folder of its own.", fault=False)  # fmt: skip
    elif contents.safetensors and not has_adapter_weights(contents) and has_model_weights(contents):
        yield Problem("adapter-names", f"the adapter's weights are called {contents.safetensors[0]}, where peft does not look.", f"{MEND}", fault=False)  # fmt: skip
    places = {of_adapter(place.spec.name).name: (file, place) for file, place in tensors}
    yield from _pairs({name: place for name, (_, place) in places.items()})
    if _never_trained(contents.path, [(file, place) for name, (file, place) in places.items() if ".lora_B." in name or name.endswith(".lora_B")]):  # fmt: skip
        yield Problem("untrained", "every lora_B is zero, so this adapter changes nothing: it was saved before it was trained, or its weights were lost on the way.", "Use another checkpoint.", fault=False)  # fmt: skip


def _pairs(places: dict[str, Place]) -> Iterator[Problem]:
    alone, uneven = [], []
    for name, place in places.items():
        for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A"), ("lora_embedding_A", "lora_embedding_B"), ("lora_embedding_B", "lora_embedding_A")):  # fmt: skip
            if one in name.split("."):
                partner = places.get(re.sub(rf"\b{one}\b", other, name))
                if partner is None and name.endswith((one, ".weight")):
                    alone.append(name)
                elif partner is not None and one.endswith("_A") and len(place.spec.shape) == len(partner.spec.shape) == 2:  # fmt: skip
                    uneven += [name] if place.spec.shape[0] != partner.spec.shape[1] else []
    remedy = "Part of the adapter was not saved; use another checkpoint."
    if alone:
        yield Problem("adapter-pairs", f"{len(alone)} of the adapter's matrices lack the other one of their pair, such as {sorted(alone)[0]}.", remedy)  # fmt: skip
    if uneven:
        yield Problem("adapter-pairs", f"{len(uneven)} pairs of the adapter's matrices have different ranks, such as {sorted(uneven)[0]}.", remedy)  # fmt: skip


def _never_trained(folder: Path, seconds: list[tuple[str, Place]]) -> bool:
    """Whether every lora_B is zero; not looked at where that would be more than 64 MiB of reading."""
    if not seconds or sum(place.spec.size for _, place in seconds) > _ZERO_CHECK or not any(math.prod(p.spec.shape) for _, p in seconds):  # fmt: skip
        return False
    try:
        for name, place in seconds:
            with open(folder / name, "rb") as file:
                file.seek(place.offset)
                data = file.read(place.spec.size)
            if len(data) < place.spec.size or data != bytes(len(data)):
                return False
    except OSError:
        return False
    return True


def of_distcp(contents: Contents) -> list[Problem]:
    """What is wrong with a folder of torch's checkpoint writer, as far as its names show it; no pickle is opened."""
    shards = {name for name in contents.files if name.endswith(".distcp")}
    problems = list(contents.problems)
    if not shards:
        return problems
    if ".metadata" not in contents.files:
        return [*problems, Problem("no-metadata", ".metadata is missing, which says where each tensor lies in the .distcp files.", "Copy it from where the folder was written; without it they cannot be read.")]  # fmt: skip
    named = _named_shards(contents)
    problems += [Problem("file-missing", f"{name} is missing, and .metadata names it.", AGAIN) for name in sorted(named - shards)]  # fmt: skip
    problems += [Problem("stranger", f"{name} is in no line of .metadata: it is left from another save.", "Move it away.", fault=False) for name in sorted(shards - named) if named]  # fmt: skip
    return problems


def _named_shards(contents: Contents) -> set[str]:
    """The files that `.metadata` speaks of, found as texts in its bytes: a pickle is not for opening here."""
    if contents.files[".metadata"] > 64 * 2**20:
        return set()
    data = (contents.path / ".metadata").read_bytes()
    return {name.decode() for name in re.findall(rb"__\d{1,9}_\d{1,9}\.distcp", data)}


def of_base(base: dict[str, Any] | None) -> list[Problem]:
    """Whether the base that an adapter names can be found."""
    name = (base or {}).get("name")
    try:
        gone = isinstance(name, str) and Path(name).is_absolute() and not Path(name).exists()
    except (OSError, ValueError):
        gone = True
    if gone:
        return [Problem("base-missing", f"the base it names, {name:.300}, is not there.", "Give the base: luthier.load(…, base=PATH).", fault=False)]  # fmt: skip
    return []


def from_error(error: ArtifactError | RequestError) -> Problem:
    """An error as a problem."""
    return Problem(error.code, error.message, error.remedy)
