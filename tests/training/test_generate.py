"""Answers are the model's most likely ones whatever the batch, stop at the end of a turn, and leave no trace."""

from __future__ import annotations

import logging
import signal
import threading
import time

import peft
import pytest
import torch
from tiny import END, make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

from luthier.errors import RequestError
from luthier.training.chat import ChatOptions, chat_loop, chat_once
from luthier.training.generate import answers, stop_ids, stream

QUESTIONS = [
    [{"role": "user", "content": text}]
    for text in (
        "Hi",
        "What is the capital of France?",
        "My order has not arrived yet, please help me.",
        "你好",
        "One two",
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def by_hand(model, tokenizer, messages, count: int) -> str:
    """Greedy decoding of one prompt alone, without a cache and without padding."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            token = int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.convert_tokens_to_ids(END):
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def ending_after(model, tokenizer, messages, count: int) -> None:
    """Make the end token the most likely one after `count` tokens of this answer, by way of the head alone."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(END)] = 10 * hidden / hidden.norm()


def test_answers_in_a_padded_batch_equal_those_alone_in_the_order_given(model, tokenizer):
    expected = [by_hand(model, tokenizer, messages, 8) for messages in QUESTIONS]
    assert len(set(expected)) > 1
    assert answers(model, tokenizer, QUESTIONS, max_new_tokens=8) == expected
    assert answers(model, tokenizer, QUESTIONS, max_new_tokens=8, batch=2) == expected


def test_answer_stops_at_the_end_of_the_turn_though_no_config_names_it(model, tokenizer):
    ending_after(model, tokenizer, QUESTIONS[1], 3)
    model.generation_config.eos_token_id = None
    other = make_tokenizer()
    other.eos_token = "<|pad|>"
    expected = by_hand(model, tokenizer, QUESTIONS[1], 20)
    assert END not in expected
    assert answers(model, other, [QUESTIONS[1]], max_new_tokens=20) == [expected]
    assert len(tokenizer(expected)["input_ids"]) <= 3


def test_stops_are_those_of_config_tokenizer_and_template(model):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    model.generation_config.eos_token_id = [7, 9]
    assert stop_ids(model, tokenizer) == [0, 2, 7, 9]
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert stop_ids(model, tokenizer) == [0, 7, 9]  # an ordinary line end is no stop


def test_sampling_settings_of_the_model_neither_count_nor_warn(model, tokenizer, caplog):
    expected = answers(model, tokenizer, QUESTIONS, max_new_tokens=8)
    settings = model.generation_config
    settings.update(do_sample=True, temperature=5.0, top_p=0.5, top_k=3, repetition_penalty=3.0, max_length=20)
    with caplog.at_level(logging.WARNING):
        assert answers(model, tokenizer, QUESTIONS, max_new_tokens=8) == expected
    assert caplog.text == ""
    assert model.generation_config is settings


def test_modes_cache_switch_padding_side_and_random_state_are_as_before(model, tokenizer):
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    )
    adapted.train()
    adapted.base_model.model.model.layers[0].eval()
    adapted.gradient_checkpointing_enable()
    adapted.config.use_cache = False
    tokenizer.padding_side = "right"
    modes = {name: module.training for name, module in adapted.named_modules()}
    random_state = torch.get_rng_state()
    answers(adapted, tokenizer, QUESTIONS, max_new_tokens=4)
    assert {name: module.training for name, module in adapted.named_modules()} == modes
    assert adapted.config.use_cache is False
    assert tokenizer.padding_side == "right"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_plain_text_has_nothing_to_answer(model, tokenizer):
    with pytest.raises(RequestError, match=r"evaluate\.generate: there is nothing to answer"):
        answers(model, tokenizer, [QUESTIONS[0], []], max_new_tokens=4)


def test_pieces_of_a_streamed_answer_are_the_answer(model, tokenizer):
    for messages in QUESTIONS:
        (expected,) = answers(model, tokenizer, [messages], max_new_tokens=12)
        assert "".join(stream(model, tokenizer, messages, max_new_tokens=12)) == expected


def test_closing_a_stream_stops_the_model(model, tokenizer):
    model.train()
    pieces = stream(model, tokenizer, QUESTIONS[0], max_new_tokens=200)
    next(pieces)
    pieces.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "luthier-answer"]
    assert model.training


def test_failure_in_the_model_reaches_the_reader_of_the_stream(model, tokenizer):
    def fail(*_):
        raise RuntimeError("the model broke")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the model broke"):
        list(stream(model, tokenizer, QUESTIONS[0], max_new_tokens=5))


def test_conversation_longer_than_the_context_is_refused_with_a_remedy(model, tokenizer):
    with pytest.raises(RequestError, match=r"the model's context ends at 256.*/reset"):
        list(stream(model, tokenizer, [{"role": "user", "content": "one two " * 300}], max_new_tokens=5))


def test_temperature_draws_other_answers(model, tokenizer):
    drawn = {"".join(stream(model, tokenizer, QUESTIONS[0], max_new_tokens=8, temperature=2.0)) for _ in range(4)}
    assert len(drawn) > 1


class Terminal:
    """Lines typed, one a question, and what was shown."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)
        self.shown = ""

    def read(self, prompt: str) -> str:
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def write(self, text: str) -> None:
        self.shown += text


def test_chat_keeps_the_conversation_until_it_is_reset(model, tokenizer):
    terminal = Terminal("Hi", "One two", "/reset", "One two", "/exit", "never read")
    options = ChatOptions(system="You are a helpful assistant.", max_new_tokens=6)
    chat_loop(model, tokenizer, options, read=terminal.read, write=terminal.write)

    system = {"role": "system", "content": options.system}
    (first,) = answers(model, tokenizer, [[system, *QUESTIONS[0]]], max_new_tokens=6)
    history = [system, *QUESTIONS[0], {"role": "assistant", "content": first.strip()}, *QUESTIONS[4]]
    second, afresh = answers(model, tokenizer, [history, [system, *QUESTIONS[4]]], max_new_tokens=6)
    assert terminal.shown.split("\n", 1)[1] == f"{first}\n{second}\nStarted afresh.\n{afresh}\n"
    assert terminal.lines == ["never read"]


def test_chat_survives_unknown_commands_ctrl_c_and_too_long_lines_and_ends_at_ctrl_d(model, tokenizer):
    terminal = Terminal("/what", KeyboardInterrupt, "one two " * 300, "")
    chat_loop(model, tokenizer, ChatOptions(max_new_tokens=4), read=terminal.read, write=terminal.write)
    assert "There is no command /what." in terminal.shown
    assert "the model's context ends at 256" in terminal.shown
    assert terminal.shown.endswith("\n")


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(model, tokenizer):
    def slow(*_):
        time.sleep(0.02)

    model.model.register_forward_pre_hook(slow)
    terminal = Terminal("Hi", "/exit")
    timer = threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    start = time.monotonic()
    chat_loop(model, tokenizer, ChatOptions(max_new_tokens=240), read=terminal.read, write=terminal.write)
    assert time.monotonic() - start < 4  # 240 tokens would take 4.8 seconds at least
    assert terminal.lines == []


def test_one_prompt_is_answered_and_the_line_ended(model, tokenizer):
    terminal = Terminal()
    chat_once(model, tokenizer, "Hi", ChatOptions(max_new_tokens=5), terminal.write)
    assert terminal.shown == answers(model, tokenizer, [QUESTIONS[0]], max_new_tokens=5)[0] + "\n"
