"""What each verb takes on the command line."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import Any


def _number(kind: type, least: float) -> Callable[[str], Any]:
    """A flag's value: a number of ``kind`` from ``least`` on; argparse says so with exit code 2."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number from {least} on")
        return value

    return read


def parser(verb: str, description: str) -> ArgumentParser:
    """What a verb takes."""
    made = ArgumentParser(f"luthier {verb}", description=description)
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    add = made.add_argument
    if verb in ("train", "plan", "data"):
        add("run_file", metavar="RUN.yaml", help="the run file")
    if verb in ("resume",):
        add("run", metavar="RUN", help="the run's folder")
    if verb in ("train", "plan", "data", "resume"):
        add("overrides", nargs="*", metavar="key.sub=value", help="change a key of the run file")
    if verb in ("train", "resume"):
        add("--allow", action="append", default=[], metavar="KEY", help="let this key differ from the existing run")
    if verb in ("plan", "data"):
        add("--stage", metavar="N", help="of a run file with stages only this one, by number or name")
    if verb == "train":
        add("--stage", help="with --dry-run: only this stage")
        add("--dry-run", action="store_true", help="the same as `luthier plan`")
    if verb in ("inspect", "verify", "prove", "eval", "chat"):
        add("path", metavar="PATH", help="a run, RUN@best, a checkpoint, an adapter, a model folder or a GGUF file")
    if verb in ("inspect", "verify", "eval", "prove", "plan", "mend", "push"):
        add("--json", action="store_true", help="print one JSON object")
    if verb == "data":
        add("--samples", type=_number(int, 0), default=3, metavar="N", help="how many samples to show (3)")
    if verb == "prove":
        add("--against", required=True, metavar="SRC", help="what PATH should equal")
    if verb == "export":
        add(
            "source",
            metavar="SRC",
            help="a run, RUN@best, a checkpoint, an adapter, a model folder, a GGUF file, or sharded weights",
        )
        add("target", metavar="DST", help="the folder to write; it must not exist, or be an unfinished export's")
        add("--to", required=True, metavar="FORM", help="merged, transformers, adapter, gguf or quantized")
        add("--base", metavar="PATH", help="the base under an adapter, or that sharded weights were trained from")
        add("--with", dest="others", action="append", default=[], metavar="PATH", help="a further adapter to merge in")
        add("--weights", metavar="W,W", help="a factor for each adapter, SRC's first (1 each)")
        add("--combine", metavar="METHOD", help="linear (the sum), ties, dare_linear, dare_ties or magnitude_prune")
        add("--density", type=float, metavar="D", help="share of values that ties, dare and magnitude_prune keep")
        add("--seed", type=int, default=0, metavar="N", help="of what the dare methods drop (0)")
        add("--onto", metavar="VALUES", help="over a quantised base: trained (the values it saw) or original (--base)")
        add("--dtype", metavar="DTYPE", help="bf16, fp16 or fp32 (as it is)")
        add("--quant", metavar="KIND", help="with --to gguf: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M or Q4_K_M (F16)")
        add("--format", metavar="PACKING", help="with --to quantized: nf4, int8 or fp8 (nf4)")
        add(
            "--rank",
            type=int,
            metavar="R",
            help="with --to adapter: recover it from a merged SRC and --base, with this rank",
        )
        add("--shard-size", metavar="SIZE", help="largest file, such as 2GB (4GiB)")
        add("--no-proof", action="store_true", help="neither read the result back nor open it with plain libraries")
    if verb == "push":
        add(
            "path",
            metavar="DST",
            help="a run (its final/), RUN@best, a checkpoint, an adapter, a model or a GGUF folder",
        )
        add("id", metavar="ID", help="the repository on the hub, OWNER/NAME; made where it does not exist")
        seen = made.add_mutually_exclusive_group()
        seen.add_argument("--public", action="store_true", help="everybody may see it; needed for one that is public")
        seen.add_argument("--private", action="store_true", help="only its owner may see it (this is the default)")
        add("--revision", metavar="BRANCH", help="a branch, made where it does not exist (main)")
        add("--endpoint", metavar="URL", help="another hub (HF_ENDPOINT, or the public one)")
        add("--base", metavar="ID", help="what the base under an adapter is called on the hub, where it is a path here")
        add("--replace", action="store_true", help="remove weights of another upload that DST doesn't have")
        add("--unproven", action="store_true", help="push although the proof failed")
    if verb == "eval":
        add("data", metavar="DATA", help="a data file, or a run file whose data.eval is used")
        add("--against", metavar="PATH", help="a second artefact, measured side by side")
        add("--metric", action="append", default=[], metavar="NAME", help="exact, json, or module:function")
        add("--limit", type=_number(int, 1), metavar="N", help="use the first N samples of each source")
        add("--max-new-tokens", type=_number(int, 1), default=128, metavar="N", help="longest generated answer (128)")
    if verb == "chat":
        add("--prompt", metavar="TEXT", help="answer this and end")
        add("--system", metavar="TEXT", help="a system message")
        add("--max-new-tokens", type=_number(int, 1), default=256, metavar="N", help="longest answer (256)")
        add(
            "--temperature",
            type=_number(float, 0),
            default=0.0,
            metavar="T",
            help="0 always takes the likeliest token (0)",
        )
    if verb in ("eval", "chat"):
        add("--base", metavar="PATH", help="the base under an adapter, where it isn't where the adapter says")
    if verb == "mend":
        add("source", metavar="SRC", help="what to mend; it is never touched")
        add("target", metavar="DST", help="the repaired copy, a folder that does not exist yet")
        add("--base", metavar="PATH", help="the base model's folder")
        add("--alpha", type=float, metavar="A", help="LoRA's alpha, where the adapter's config is lost")
        add("--rslora", action="store_true", help="the adapter was trained with rank-stabilised scaling")
        add("--rank", type=int, metavar="R", help="recover the adapter from a merged SRC and --base, with this rank")
        add("--recover", action="store_true", help="recover it, with ranks chosen from the spectrum")
        add("--no-proof", action="store_true", help="don't let plain libraries compute the result's logits")
    if verb == "demo":
        add("--output", default="runs/demo", metavar="DIR", help="the run's folder (runs/demo)")
    return made
