"""The page and the card hold what the run folder holds, at every stage, and nothing that a browser would run or fetch."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from made_up_run import HOSTILE, write_run

from luthier.errors import ArtifactError
from luthier.report.card import model_card
from luthier.report.page import write_report
from luthier.report.run_files import read_run_files


class Page(HTMLParser):
    """What a browser would make of it: text, tags and whether they nest."""

    VOID = {"meta", "br", "link", "img", "input"}

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.tags, self.open, self.scripts = "", [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data + "\n"


def page_of(run) -> Page:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_finished_run_shows_curves_facts_proof_samples_and_lineage(tmp_path):
    page = page_of(write_run(tmp_path / "support"))
    for text in (
        "LoRA r16 on 210 layers, 4.9 M of 134.5 M parameters", "Proof passed", "bit for bit", "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Loss", "Held-out loss", "Learning rate", "Gradient norm", "Speed", "2 skipped", "loss is not finite, samples 311, 4002, 17",
        "我的订单号是 88231", "I'm sorry to hear", "same as the reference", "3f9a77c1d2e4b5a6", "NVIDIA H100 80GB HBM3", "resumed on another",
        "step-00000300", "58.9 MB", "13 ms", "step 200, held-out loss 0.373", "4,800",
    ):  # fmt: skip
        assert text in page.text, text


def test_page_is_one_file_that_fetches_nothing(tmp_path):
    run = write_run(tmp_path / "support")
    page = page_of(run)
    assert not [
        tag
        for tag, attributes in page.tags
        if tag in ("link", "img", "iframe", "object") or "src" in attributes or "href" in attributes
    ]
    source = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", source)
    assert sorted(path.name for path in run.iterdir()) == [
        "facts.json",
        "final",
        "metrics.jsonl",
        "report.html",
        "run.yaml",
    ]


def test_nothing_a_model_says_is_run(tmp_path):
    run = write_run(tmp_path / "a<b>&\"'")
    facts = json.loads((run / "facts.json").read_text())
    facts |= {"summary": HOSTILE, "device": HOSTILE, "data": {HOSTILE: HOSTILE}}
    (run / "facts.json").write_text(json.dumps(facts))
    (run / "final/luthier.json").write_text(
        json.dumps({"parents": [{"kind": HOSTILE, "name": HOSTILE, "fingerprint": HOSTILE}]})
    )
    proof = {"passed": False, "verdict": HOSTILE, "says": HOSTILE, "compared": HOSTILE}
    (run / "final/proof.json").write_text(json.dumps(proof))
    with open(run / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"kind": "note", "step": 300, "message": HOSTILE}) + "\n")
        log.write(json.dumps({"kind": "eval", "step": 300, "eval_loss": 1.0, f"metric/{HOSTILE}": 1}) + "\n")
        log.write(json.dumps({"kind": "checkpoint", "step": 300, "path": HOSTILE}) + "\n")
    page = page_of(run)
    assert not [script for script in page.scripts if "alert" in script]
    assert page.text.count("<script>alert('x')</script>") >= 10


def test_embedded_data_are_json_with_the_measured_values(tmp_path):
    page = page_of(write_run(tmp_path / "support"))
    loss = json.loads(page.scripts[0])
    assert (loss["low"], loss["high"]) == (0, 300)
    held_out = next(series for series in loss["series"] if series["label"] == "held out")["points"]
    assert held_out[0] == [0, 2.413] and [step for step, _ in held_out] == [0, 50, 100, 150, 200, 250, 300]


@pytest.mark.parametrize("steps", [0, 1, 2, 21])
@pytest.mark.parametrize("evaluated", [True, False])
def test_run_that_has_just_begun_has_a_page(tmp_path, steps, evaluated):
    page = page_of(write_run(tmp_path / "begun", steps=steps, evaluated=evaluated, finished=False))
    assert f"Step {steps} of 300" in page.text and "Proof" not in page.text
    assert ("nothing measured yet" in page.text) == (steps == 0 and not evaluated)


def test_empty_folder_has_a_page(tmp_path):
    assert "nothing measured yet" in page_of(tmp_path).text


def test_crashed_run_with_a_torn_line_has_a_page(tmp_path):
    run = write_run(tmp_path / "crashed", steps=40, finished=False)
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"kind": "train", "st')
    assert "Step 40 of 300" in page_of(run).text


def test_run_whose_losses_are_all_not_finite_has_a_page(tmp_path):
    lines = [
        json.dumps({"kind": "train", "step": step, "loss": None, "nonfinite": ["loss"], "skipped": True})
        for step in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = page_of(tmp_path).text
    assert "nothing measured yet" in text and "skipped: loss or gradient not finite" in text


@pytest.mark.parametrize(("verdict", "mood"), [("passed", "good"), ("failed", "bad"), ("inconclusive", "unsure")])
def test_proof_is_shown_as_what_it_is(tmp_path, verdict, mood):
    page = page_of(write_run(tmp_path / "run", verdict=verdict))
    assert f"Proof {verdict}" in page.text
    assert {attributes["class"] for _, attributes in page.tags if "pill" in attributes.get("class", "")} == {
        f"pill {mood}"
    }


def test_broken_file_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "facts.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"facts\.json.*cannot be read"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_duration_leaves_out_the_time_between_a_crash_and_its_resumption(tmp_path):
    lines = [
        json.dumps({"kind": "train", "step": step, "time": 1000.0 + 2 * step + (90_000 if step > 50 else 0)})
        for step in range(101)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_run_files(tmp_path).seconds == 198


def test_page_of_a_long_run_stays_small(tmp_path):
    lines = [
        json.dumps({"kind": "train", "step": step, "loss": 1 + 1 / step, "lr": 1e-4, "grad_norm": 1.0})
        for step in range(1, 50_001)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert write_report(tmp_path).stat().st_size < 300_000


def test_report_imports_neither_torch_nor_transformers():
    code = "import sys, luthier.report.page, luthier.report.card; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


OPEN = 'model = AutoPeftModelForCausalLM.from_pretrained("final")'


def test_card_has_a_head_that_hubs_read_and_says_how_to_open(tmp_path):
    run = write_run(tmp_path / "support")
    facts = json.loads((run / "facts.json").read_text())
    facts["model"]["license"] = "apache-2.0"
    (run / "facts.json").write_text(json.dumps(facts))
    _, head, body = model_card(run, kind="adapter", open_with=OPEN).split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "license": "apache-2.0", "tags": ["luthier", "sft", "lora"],
    }  # fmt: skip
    for text in (
        f"```python\n{OPEN}\n```",
        "| exact | 0.000 | 0.958 |",
        "| learning rate | 2e-4 |",
        "▁",
        "**passed.**",
        "`3f9a77c1d2e4b5a60718293a4b5c6d7e`",
    ):
        assert text in body, text


def test_card_tells_neither_paths_nor_samples(tmp_path):
    run = write_run(tmp_path / "support")
    config = yaml.safe_load((run / "run.yaml").read_text())
    config["model"]["path"] = "/home/someone/models/base"
    config["data"]["train"] = ["/home/someone/data/support.jsonl", {"path": "org/open-data"}]
    (run / "run.yaml").write_text(yaml.safe_dump(config))
    (run / "final/luthier.json").unlink()
    card = model_card(run, kind="model", open_with=OPEN)
    head = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in head and head["library_name"] == "transformers" and head["datasets"] == ["org/open-data"]
    assert "/home/someone" not in card and "support.jsonl, org/open-data" in card
    assert "parcel" not in card and "订单" not in card


def test_card_of_a_bare_folder_is_still_a_card(tmp_path):
    card = model_card(tmp_path, kind="model", open_with=OPEN)
    assert card.startswith("---\nlibrary_name: transformers\n") and OPEN in card


def test_card_cells_cannot_break_their_table(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "facts.json").write_text(json.dumps({"device": "a|b\n<script>", "summary": "x\n# y"}))
    card = model_card(run, kind="adapter", open_with="print('```')")
    assert "| device | a\\|b &lt;script> |" in card and "\n# y" not in card and "````python\nprint('```')\n````" in card
