"""The command line: one function a verb, with its imports inside, so that asking for help loads nothing.

The table of verbs is plain data; ``luthier --help`` prints it without loading even argparse, which would take longer
than the rest.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing takes longer to import than help to print; type checkers know the name
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence
    from typing import Any

    from luthier.config.schema import RunConfig

VERBS = {
    "train": ("RUN.yaml [key.sub=value …]", "train; goes on where the output folder already holds this run"),
    "resume": ("RUN [key.sub=value …] [--allow KEY]", "go on from the newest whole checkpoint"),
    "plan": (
        "RUN.yaml",
        "memory, time and disk before the first step, and a rehearsal: one step, one save, one reload",
    ),
    "data": ("RUN.yaml", "samples as the model will see them, trained tokens marked; counts, lengths, padding"),
    "inspect": ("PATH [--json]", "what is there: kind, base, shapes, precision, lineage, whether it is whole"),
    "verify": ("PATH", "read everything back against the manifest"),
    "prove": ("PATH --against SRC", "open both with plain libraries and compare logits"),
    "export": (
        "SRC DST --to FORM",
        "write another form: merged, transformers, adapter, gguf or quantized; streams; proves",
    ),
    "push": ("DST ID", "upload to the hub, private unless told, resumable; compare what it then holds"),
    "eval": ("PATH DATA [--against PATH]", "loss and task metrics of any artefact"),
    "mend": ("SRC DST [--base PATH]", "write a repaired copy where the remedy is certain"),
    "chat": ("PATH [--prompt TEXT]", "talk to whatever is there"),
    "schema": ("", "the run file's JSON Schema, for editors"),
    "demo": ("", "a small real model and a small real data set, end to end"),
}


def help_text() -> str:
    """What ``luthier --help`` prints."""
    width = max(len(f"{verb} {arguments}") for verb, (arguments, _) in VERBS.items())
    lines = [f"  {f'{verb} {arguments}':<{width}}  {what}" for verb, (arguments, what) in VERBS.items()]
    return "\n".join(
        [
            "usage: luthier VERB …   (luthier VERB --help says more)",
            "",
            "Fine-tunes language models and proves that what was trained can be opened, resumed and served.",
            "",
            *lines,
            "",
            "Exit codes: 0 done; 2 the request is wrong; 3 an artefact is broken or a proof failed; 75 stopped on request,",
            "resumable; 1 anything else. --debug shows the traceback of an error. Start with: luthier demo",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        from luthier import __version__

        print(f"luthier {__version__}")
        return 0
    if given[0] not in VERBS:
        return _unknown_verb(given[0])
    return _guarded(given[0], given[1:])


def _unknown_verb(verb: str) -> int:
    import difflib

    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f" Did you mean `luthier {near[0]}`?" if near else " `luthier --help` lists the verbs."
    print(f"luthier: there is no verb {verb!r}.{hint}", file=sys.stderr)
    return 2


def _guarded(verb: str, given: list[str]) -> int:
    """Run a verb and turn errors into one paragraph and an exit code."""
    import os

    from luthier.cli_options import parser
    from luthier.errors import EXIT_FAILURE, LuthierError

    options = parser(verb, VERBS[verb][1]).parse_intermixed_args(given)
    try:
        return _RUN[verb](options) or 0
    except LuthierError as error:
        if options.debug:
            raise
        _say_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say_error(
            f"interrupted; {'the same command goes on' if verb == 'push' else 'published checkpoints are whole'}."
        )
        sys.stdout.flush()
        os._exit(EXIT_FAILURE)  # at once: a save in flight is left as the hidden folder that the next start removes
    except BrokenPipeError:  # `luthier … | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        if options.debug:
            raise
        _say_error(f"{type(error).__name__}: {error} (this is not an error Luthier expects; --debug shows where)")
        return 1


def _say_error(text: str) -> None:
    lines = text.replace("\n- ", "\0- ").split("\0")  # a list of problems stays a list
    print(
        "\n".join(["luthier: " + " ".join(lines[0].split()), *(" ".join(line.split()) for line in lines[1:])]),
        file=sys.stderr,
    )


def _train(options: Namespace) -> int:
    if options.dry_run:
        options.json = False
        return _plan(options)
    from luthier.config.chain import Chain, read

    config = read(options.run_file, options.overrides)
    from luthier.training.run import train, train_chain

    if isinstance(config, Chain):
        train_chain(config, allow=options.allow)
    else:
        train(config, allow=options.allow)
    return 0


def _resume(options: Namespace) -> int:
    from pathlib import Path

    from luthier.config.chain import is_chain
    from luthier.training.resolve import stored_config

    if not is_chain(Path(options.run)):
        stored_config(Path(options.run))
    from luthier.training.run import resume

    resume(options.run, options.overrides, allow=options.allow)
    return 0


def _plan(options: Namespace) -> int:
    wanted = _stages(options)
    from luthier.training.plan import plan

    made = {}
    for title, config in wanted.items():
        if title and not options.json:
            print(f"stage {title}")
        made[title] = plan(config)
        if not options.json:
            print(made[title])
    if options.json:
        _print_json({title: each.as_dict() for title, each in made.items()} if "" not in made else made[""].as_dict())
    return 0


def _stages(options: Namespace) -> dict[str, RunConfig]:
    """The runs of a run file by their stage's title (empty for a file of one run); those that can be looked at now."""
    from luthier.config.chain import Chain, read

    found = read(options.run_file, options.overrides)
    if not isinstance(found, Chain):
        return {"": found}
    from luthier.training.chains import check, ready

    check(found)
    stages = [found.stage(options.stage)] if options.stage else list(found.stages)
    for stage in [stage for stage in stages if not ready(stage)]:
        _say_progress(
            f"stage {stage.title} starts from a stage that has not been trained yet, so it cannot be looked at."
        )
    return {stage.title: stage.config for stage in stages if ready(stage)}


def _data(options: Namespace) -> int:
    wanted = _stages(options)
    from pathlib import Path

    from rich.console import Console

    from luthier.data import prepare
    from luthier.data.show import show
    from luthier.models.open import open_config, open_tokenizer
    from luthier.training.resolve import before_data, pick_device
    from luthier.training.stage import settle

    console = Console()
    for title, config in wanted.items():
        if title:
            console.print(f"stage {title}")
        config, _ = settle(config, Path(config.output))
        config = before_data(config, open_config(config.model), pick_device())
        tokenizer = open_tokenizer(config.model)
        show(prepare(config, tokenizer, say=_say_progress), config, tokenizer, console, samples=options.samples)
    return 0


def _inspect(options: Namespace) -> int:
    from luthier.artifacts.identify import identify
    from luthier.artifacts.show import show

    found = identify(_meant(options.path))
    _print_json(found.as_dict()) if options.json else print(show(found))
    return 0


def _verify(options: Namespace) -> int:
    from luthier.artifacts.verify import verify_all

    outcome = verify_all(_meant(options.path))
    _print_json(outcome.as_dict()) if options.json else print(outcome)
    return 0 if outcome.whole else 3


def _prove(options: Namespace) -> int:

    from luthier.api import prove

    proof = prove(options.path, options.against)
    print(proof.to_bytes().decode() if options.json else f"{proof.verdict}: {proof.says} (compared: {proof.compared})")
    return 3 if proof.verdict == "failed" else 0


def _export(options: Namespace) -> int:
    from pathlib import Path

    from luthier.artifacts.ahead import read_for_export

    read_for_export(Path(options.source), Path(options.base) if options.base else None)
    from luthier.export.forms import export_folder, weights_of

    made = export_folder(
        [Path(_meant(path)) for path in (options.source, *options.others)], Path(options.target), to=options.to,
        base=Path(options.base) if options.base else None, dtype=options.dtype, shard_size=options.shard_size,
        weights=weights_of(options.weights), combine=options.combine, density=options.density, seed=options.seed,
        onto=options.onto, quant=options.quant, packing=options.format, rank=options.rank, prove=not options.no_proof,
        say=_say_progress,
    )  # fmt: skip
    print(made)
    return 0


def _push(options: Namespace) -> int:
    from pathlib import Path

    from luthier.export.push.push import push

    made = push(
        Path(_meant(options.path)), options.id, private=not options.public, revision=options.revision, base=options.base,
        endpoint=options.endpoint, replace=options.replace, unproven=options.unproven, say=_say_progress,
    )  # fmt: skip
    _print_json(made.as_dict()) if options.json else print(made)
    return 0


def _eval(options: Namespace) -> int:
    from luthier.api import load
    from luthier.training.eval_artefact import evaluate_artefacts

    made = evaluate_artefacts(
        [options.path, *([options.against] if options.against else [])], options.data, metrics=options.metric,
        limit=options.limit, max_new_tokens=options.max_new_tokens, base=options.base, load=load,
    )  # fmt: skip
    _print_json(made.as_dict()) if options.json else print(made)
    return 0


def _mend(options: Namespace) -> int:
    from luthier.export.mend.mend import mend

    made = mend(
        _meant(options.source), options.target, base=options.base, alpha=options.alpha, rslora=options.rslora,
        rank=options.rank, recover_adapter=options.recover, prove=not options.no_proof, say=_say_progress,
    )  # fmt: skip
    _print_json(made.as_dict()) if options.json else print(made)
    return 0


def _chat(options: Namespace) -> int:
    from luthier.api import load
    from luthier.training.chat import ChatOptions, chat_loop, chat_once

    model, tokenizer = load(options.path, base=options.base)
    settings = ChatOptions(
        system=options.system, max_new_tokens=options.max_new_tokens, temperature=options.temperature
    )

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if options.prompt is not None:
        chat_once(model, tokenizer, options.prompt, settings, write)
    else:
        chat_loop(model, tokenizer, settings, read=input, write=write)
    return 0


def _schema(options: Namespace) -> int:
    from luthier.config.read import json_schema

    _print_json(json_schema())
    return 0


def _demo(options: Namespace) -> int:
    from pathlib import Path

    from luthier.demo.run import run_demo

    return run_demo(Path(options.output), print)


def _meant(path: str) -> str:
    """The folder that RUN@best or RUN@newest means; any other path as it is."""
    if not path.endswith(("@best", "@newest", "@final")):
        return path
    from luthier.training.locate import locate

    return str(locate(path).path)


def _say_progress(text: str) -> None:
    """What is going on goes to standard error, so that a verb's own output can be piped."""
    print(text, file=sys.stderr)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


_RUN: dict[str, Callable[[Namespace], int]] = {
    "train": _train, "resume": _resume, "plan": _plan, "data": _data, "inspect": _inspect, "verify": _verify,
    "prove": _prove, "export": _export, "push": _push, "eval": _eval, "mend": _mend, "chat": _chat, "schema": _schema, "demo": _demo,
}  # fmt: skip
