"""Masks: exactly the assistant's turns with their end token, for templates of the shapes that are out there."""

import pytest
from tiny import CHATML, make_tokenizer

from luthier.data.formats import Conversation, read_messages
from luthier.data.offenders import SampleError
from luthier.data.plain import PlainText
from luthier.data.template import ChatTemplate
from luthier.errors import RequestError

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
TRIMMED_WITH_BEGIN = (
    "{{ '<|pad|>' }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim "
    "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' <|im_end|>' }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
NO_END_TOKEN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}{% set thought = '' %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>' + thought + '</think>\n' }}{% endif %}"
    "{{ content }}{% for call in message.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED_THINKING = THINKING.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
TOOLS_BEFORE_LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + '<|im_end|>' }}{% else %}"
    "{% if loop.index0 == ns.last and tools %}{{ '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITH_END = MARKED.replace(
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
)

U, A, S = "user", "assistant", "system"


def conversation(*turns, tools=None) -> Conversation:
    messages = [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns]
    return Conversation(read_messages(messages), tools)


def trained(template, sample, train_on="assistant"):
    """The stretches of text that are trained, or the error that a sample gives."""
    tokenizer = make_tokenizer(template=template)
    (result,) = ChatTemplate(tokenizer).encode([sample], train_on)
    if isinstance(result, SampleError):
        raise result
    ids, mask = result
    assert tokenizer.decode(ids) == ChatTemplate(tokenizer).render(sample.messages, sample.tools)
    stretches, current = [], []
    for token, is_trained in zip([*ids.tolist(), None], [*mask.tolist(), False], strict=True):
        if is_trained:
            current.append(token)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


TWO_TURNS = ((U, "b"), (A, "b"), (U, "你好"), (A, "好的 ok"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["b<|im_end|>", "好的 ok<|im_end|>"]),
        (DEFAULT_SYSTEM, ["b<|im_end|>", "好的 ok<|im_end|>"]),
        (TRIMMED_WITH_BEGIN, ["b<|im_end|>", "好的 ok<|im_end|>"]),
        (BRACKETS, [" b <|im_end|>", " 好的 ok <|im_end|>"]),
        (NO_END_TOKEN, ["b", "好的 ok"]),
        (THINKING, ["b<|im_end|>", "<think></think>\n好的 ok<|im_end|>"]),
        (OPENED_THINKING, ["b<|im_end|>", "</think>\n好的 ok<|im_end|>"]),
        (MARKED, ["b<|im_end|>", "好的 ok<|im_end|>"]),
        (MARKED_WITH_END, ["b<|im_end|>", "好的 ok<|im_end|>"]),
    ],
)
def test_answers_and_their_end_tokens_are_trained_and_nothing_else(template, expected):
    assert [each.strip() for each in trained(template, conversation(*TWO_TURNS))] == [each.strip() for each in expected]


def test_only_the_last_answer_is_trained_when_asked():
    assert trained(CHATML, conversation(*TWO_TURNS), "last") == ["好的 ok<|im_end|>"]


def test_everything_is_trained_when_asked():
    text = "".join(trained(CHATML, conversation((U, "a"), (A, "b")), "all"))
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"


def test_reasoning_that_the_template_drops_from_earlier_turns_is_not_looked_for():
    sample = conversation((U, "a"), (A, "<think>x</think>\nb"), (U, "c"), (A, "<think>y</think>\nd"))
    assert trained(THINKING, sample) == ["b<|im_end|>", "<think>y</think>\nd<|im_end|>"]


def test_tool_calls_are_trained_and_tool_results_are_not():
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "巴黎"}'}}
    sample = conversation(
        (U, "weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        (A, "Sunny."),
    )
    assert trained(THINKING, sample) == [
        '<think></think>\n<call>weather {"city": "巴黎"}</call><|im_end|>',
        "<think></think>\nSunny.<|im_end|>",
    ]


def test_tool_calls_that_the_template_leaves_out_are_an_error():
    call = {"function": {"name": "weather", "arguments": {}}}
    sample = conversation((U, "weather?"), {"role": "assistant", "tool_calls": [call]})
    with pytest.raises(SampleError, match=r"tool calls \(weather\), which the chat template does not write"):
        trained(CHATML, sample)


def test_template_that_moves_the_tools_along_is_followed():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert trained(TOOLS_BEFORE_LAST_USER, conversation(*TWO_TURNS, tools=tools)) == [
        " b<|im_end|>",
        " 好的 ok<|im_end|>",
    ]


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, TRIMMED_WITH_BEGIN])
def test_unusual_orders_of_turns_are_found(template):
    assert trained(template, conversation((A, "welcome"), (U, "hi"), (A, "x"))) == ["welcome<|im_end|>", "x<|im_end|>"]
    assert trained(template, conversation((S, "be"), (U, "hi"), (A, "x"), (A, "y"), (U, "z"))) == [
        "x<|im_end|>",
        "y<|im_end|>",
    ]


def test_answer_that_holds_the_end_token_is_trained_to_its_real_end():
    sample = conversation((U, "x<|im_end|>"), (A, "y<|im_end|> z"), (U, "a"), (A, "b"))
    assert trained(THINKING, sample)[0] == "y<|im_end|> z<|im_end|>"


def test_token_that_straddles_the_border_belongs_to_the_answer():
    tokenizer = make_tokenizer(template=CHATML.replace("\n' + message['content']", "' + message['content']"))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant")
    (result,) = ChatTemplate(tokenizer).encode([conversation((U, "a"), (A, " order"))], "assistant")
    ids, mask = result
    assert tokenizer.decode(ids[mask]).endswith(" order<|im_end|>")


def test_template_that_refuses_a_sample_names_its_reason():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system please') }}{% endif %}" + CHATML
    with pytest.raises(SampleError, match="no system please"):
        trained(template, conversation((S, "x"), (U, "a"), (A, "b")))


def test_template_that_hides_answers_is_an_error():
    template = "{% for message in messages %}{{ message['content'] | length }}{% endfor %}"
    with pytest.raises(SampleError, match=r"message 2 \(assistant\) cannot be found"):
        trained(template, conversation((U, "a"), (A, "b")))


def test_missing_template_is_an_error_with_a_remedy():
    with pytest.raises(RequestError, match=r"model\.template: chatml") as caught:
        ChatTemplate(make_tokenizer(template=None))
    assert caught.value.code == "no-template"


def test_pair_without_template_is_prompt_completion_and_end():
    tokenizer = make_tokenizer(template=None)
    pair = Conversation(read_messages([{"role": U, "content": "2+2="}, {"role": A, "content": "4"}]), separator="")
    ((ids, mask),) = PlainText(tokenizer).encode_pairs([pair], "assistant")
    assert tokenizer.decode(ids) == "2+2=4<|im_end|>"
    assert tokenizer.decode(ids[mask]) == "4<|im_end|>"
