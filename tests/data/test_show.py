"""The preview: samples as the model will see them, with every character whole."""

import io

from conftest import chat, run_config, write_lines
from rich.console import Console

from luthier.data import prepare
from luthier.data.show import histogram, segments, show


def shown(tmp_path, tokenizer, *, colours, packing=True):
    samples = [chat(f"问题 {number} [bold]", "回答：好的。" * (1 + number % 5)) for number in range(20)]
    config = run_config(write_lines(tmp_path / "a.jsonl", samples), eval=0.1, rows={"packing": packing})
    prepared = prepare(config, tokenizer, say=lambda line: None)
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=colours, color_system="standard" if colours else None)
    show(prepared, config, tokenizer, console)
    return out.getvalue()


def test_preview_says_counts_lengths_padding_and_marks_what_is_trained(tmp_path, tokenizer):
    text = shown(tmp_path, tokenizer, colours=False)
    assert "format messages" in text and "18 samples to train on" in text and "2 samples held out" in text
    assert "% of the places hold padding" in text and "█" in text
    assert "⟦回答：好的。" in text and "<|im_end|>⟧" in text
    assert "[bold]<|im_end|>" in text and "\ufffd" not in text


def test_preview_has_two_colours_on_a_terminal(tmp_path, tokenizer):
    text = shown(tmp_path, tokenizer, colours=True, packing=False)
    assert "\x1b[1;32m回答" in text and "\x1b[90m<|im_start|>user" in text and "⟦" not in text


def test_control_characters_are_pictured_and_long_lines_kept(tmp_path, tokenizer):
    config = run_config(write_lines(tmp_path / "a.jsonl", [chat("\x1b[31mred\x07", "word " * 20)]))
    out = io.StringIO()
    show(prepare(config, tokenizer, say=lambda line: None), config, tokenizer, Console(file=out, width=40))
    assert "␛[31mred␇" in out.getvalue() and "\x1b" not in out.getvalue()
    assert "word " * 19 in out.getvalue()


def test_character_over_several_tokens_stays_whole_at_a_border(tokenizer):
    ids = tokenizer("a龘b")["input_ids"]
    assert len(ids) > 3
    mask = [False, False, *[True] * (len(ids) - 2)]
    assert segments(ids, mask, tokenizer) == [("a龘", False), ("b", True)]


def test_histogram_counts_every_sample():
    import numpy as np

    lengths = np.array([1, 1, 2, 50, 99], np.int32)
    assert sum(int(line.split()[3].replace(",", "")) for line in histogram(lengths)) == 5
    assert len(histogram(np.array([7, 7], np.int32))) == 1
