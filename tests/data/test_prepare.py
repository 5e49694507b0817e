"""From the run file to tokens: formats, what becomes of odd samples, holding out, mixtures and the cache."""

import json
import time

import numpy as np
import pytest
from conftest import chat, run_config, write_lines
from tiny import CHATML, make_tokenizer

from luthier.data import prepare
from luthier.data import tokenise as tokenise_module
from luthier.data.batches import Batches
from luthier.data.order import Order
from luthier.errors import RequestError

CHATML_PAIR = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"


def chats(count, start=0):
    return [chat(f"question {number}", f"answer {number}") for number in range(start, start + count)]


def text_of(tokens, tokenizer, index=0):
    ids, mask = tokens[index]
    return tokenizer.decode(ids), tokenizer.decode(ids[mask])


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("messages", chat("q", "a")),
        ("messages", {"messages": json.dumps(chat("q", "a")["messages"])}),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, chat("q", "a")["messages"][1]]},
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("sharegpt", {"conversations": chat("q", "a")["messages"]}),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}),
        ("prompt-completion", {"prompt": "q", "completion": "a"}),
        ("prompt-completion", {"prompt": chat("q", "a")["messages"][:1], "completion": chat("q", "a")["messages"][1:]}),
    ],
)
def test_formats_are_recognised_by_their_columns_and_mean_the_same(tmp_path, prepared, tokenizer, name, sample):
    result = prepared(write_lines(tmp_path / "a.jsonl", [sample]))
    assert result.facts["format"] == name
    assert any(f"format {name}" in line for line in prepared.said)
    assert text_of(result.train, tokenizer) == (CHATML_PAIR, "a<|im_end|>")
    assert result.train.prompts(0) == [{"role": "user", "content": "q"}] and result.train.reference(0) == "a"


def test_alpaca_input_system_and_history_are_written(tmp_path, prepared, tokenizer):
    sample = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["x", "y"]]}
    result = prepared(write_lines(tmp_path / "a.jsonl", [sample]))
    roles = [message["role"] for message in result.train.prompts(0)]
    assert roles == ["system", "user", "assistant", "user"]
    assert result.train.prompts(0)[-1]["content"] == "q\ni"
    assert text_of(result.train, tokenizer)[1] == "y<|im_end|>a<|im_end|>"


def test_mapping_of_columns_overrides(tmp_path, prepared, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"问题": "q", "回答": "a", "text": "other"}])
    result = prepared(path, columns={"prompt": "问题", "completion": "回答"})
    assert text_of(result.train, tokenizer) == (CHATML_PAIR, "a<|im_end|>")


def test_mapping_to_a_column_or_field_that_is_not_there_is_an_error(tmp_path, prepared):
    path = write_lines(tmp_path / "a.jsonl", [{"问题": "q", "回答": "a"}])
    with pytest.raises(RequestError, match=r"a\.jsonl:1: has no column '答案' \(it has 问题, 回答\)"):
        prepared(path, columns={"prompt": "问题", "completion": "答案"})
    with pytest.raises(RequestError, match=r"data\.columns\.question: 'question' is not a field"):
        prepared(path, columns={"question": "问题"})


def test_pairs_do_without_a_chat_template_and_conversations_do_not(tmp_path, prepared):
    bare = make_tokenizer(template=None)
    result = prepared(write_lines(tmp_path / "a.jsonl", [{"prompt": "q:", "completion": "a"}]), with_tokenizer=bare)
    assert text_of(result.train, bare) == ("q:a<|im_end|>", "a<|im_end|>")
    with pytest.raises(RequestError, match=r"model\.template: chatml") as caught:
        prepared(write_lines(tmp_path / "b.jsonl", chats(2)), with_tokenizer=bare)
    assert caught.value.code == "no-template"


def test_pretraining_takes_text_with_an_end_token_and_trains_it_all(tmp_path, prepared, tokenizer):
    (tmp_path / "a.txt").write_text("One two three.\n")
    result = prepared(tmp_path / "a.txt", method="pretrain")
    ids, mask = result.train[0]
    assert tokenizer.decode(ids) == "One two three.\n<|im_end|>"
    assert not mask[0] and mask[1:].all()


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {}, r"preference data .*data\.columns"),
        ({"foo": 1, "bar": 2}, {}, r"columns foo, bar, which are no known format.*data\.columns"),
        ({"text": "a"}, {}, r"plain text, in which no answers.*method: pretrain"),
        (chat("q", "a"), {"method": "pretrain"}, r"`method: pretrain` trains on plain text.*method: sft"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            {},
            r"a\.jsonl:1: message 1 has the role 'bot'; roles are system",
        ),
        ({"messages": []}, {}, r"a\.jsonl:1: has no messages"),
        ({"messages": None}, {}, r"a\.jsonl:1: has no value under 'messages'"),
        ({"messages": [{"role": "user"}]}, {}, r"message 1 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, r"part of type 'image'; only text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, {}, r"turn 1 has from, value with from='alien'"),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            {},
            r"No sample .* has a token to train on \(the first: .*a\.jsonl:1",
        ),
        ({"prompt": "", "completion": ""}, {}, r"holds no sample"),
    ],
)
def test_data_that_cannot_be_trained_on_is_an_error_with_a_remedy(tmp_path, prepared, sample, options, message):
    with pytest.raises(RequestError, match=message):
        prepared(write_lines(tmp_path / "a.jsonl", [sample]), **options)


def test_text_can_be_trained_on_whole_when_asked(tmp_path, prepared):
    result = prepared(write_lines(tmp_path / "a.jsonl", [{"text": "hello there"}]), train_on="all")
    assert result.facts["format"] == "text"


def test_masks_that_are_all_full_are_an_error(tmp_path, prepared):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "", "completion": f"a {number}"} for number in range(3)])
    with pytest.raises(RequestError, match=r"Every token of every sample .* would be trained.*data\.train_on: all"):
        prepared(path, with_tokenizer=make_tokenizer(template=None))


def test_samples_that_differ_from_the_first_in_format_are_named(tmp_path, prepared):
    path = write_lines(tmp_path / "a.jsonl", [*chats(2), {"instruction": "q", "output": "a"}, *chats(1)])
    with pytest.raises(
        RequestError,
        match=r"a\.jsonl:3: has no 'messages' .*looks like alpaca, while the source began as messages.*as a list",
    ):
        prepared(path)
    result = prepared(path, on_bad="skip")
    assert result.facts["skipped"] == 1 and len(result.train) == 3
    assert any("1 broken samples skipped" in line and "a.jsonl:3" in line for line in prepared.said)


def test_first_few_offenders_are_listed(tmp_path, prepared):
    path = write_lines(tmp_path / "a.jsonl", [*chats(1), *[{"messages": [{"role": "bot", "content": "x"}]}] * 20])
    with pytest.raises(RequestError) as caught:
        prepared(path)
    assert all(f"a.jsonl:{line}:" in str(caught.value) for line in (2, 3, 4, 5, 6))
    assert "a.jsonl:7:" not in str(caught.value)


def test_odd_samples_are_counted_and_said(tmp_path, prepared):
    samples = [
        *chats(3),
        *chats(2),
        {"messages": [{"role": "user", "content": "only a question"}]},
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]},
        chat("q", " "),
    ]
    result = prepared(write_lines(tmp_path / "a.jsonl", samples))
    facts = result.facts
    assert (facts["duplicates"], facts["untrained"], facts["empty"], facts["empty_answers"]) == (2, 1, 1, 1)
    assert any("no token of theirs is trained" in line and "a.jsonl:6" in line for line in prepared.said)


def test_long_samples_are_truncated_dropped_or_split_and_counted(tmp_path, prepared):
    path = write_lines(tmp_path / "a.jsonl", [chat("q", "word " * 100), chat("q", "short")])
    truncated = prepared(path, rows={"max_length": 32})
    assert truncated.facts["truncated"] == 1 and truncated.train.lengths.max() == 32 and len(truncated.train) == 2
    dropped = prepared(path, rows={"max_length": 32}, too_long="drop")
    assert dropped.facts["dropped"] == 1 and len(dropped.train) == 1
    split = prepared(path, rows={"max_length": 32}, too_long="split")
    assert split.facts["split"] == 1 and split.train.lengths.max() == 32
    whole = prepared(path, rows={"max_length": 4096})
    assert split.train.lengths.sum() == whole.train.lengths.sum()
    with pytest.raises(RequestError, match=r"All 2 samples .* dropped.*train\.max_length"):
        prepared(path, rows={"max_length": 8}, too_long="drop")


def test_long_text_is_split_for_pretraining_where_nothing_is_said(tmp_path, prepared):
    (tmp_path / "a.txt").write_text("one two three " * 100)
    result = prepared(tmp_path / "a.txt", method="pretrain", rows={"max_length": 32})
    assert result.facts["split"] == 1 and len(result.train) > 5
    cut = prepared(tmp_path / "a.txt", method="pretrain", rows={"max_length": 32}, too_long="truncate")
    assert cut.facts["truncated"] == 1 and len(cut.train) == 1


def test_held_out_share_is_stable_and_shares_no_content_with_training(tmp_path, prepared):
    samples = [*chats(90), *chats(30), *chats(30)]
    result = prepared(write_lines(tmp_path / "a.jsonl", samples), eval=0.2)
    again = prepared(write_lines(tmp_path / "a.jsonl", samples), eval=0.2)
    assert 25 <= len(result.eval) <= 30 and len(result.eval) + len(result.train) == 150
    assert not set(result.train.digests.tolist()) & set(result.eval.digests.tolist())
    assert result.eval.digests.tolist() == again.eval.digests.tolist()
    other = prepared(write_lines(tmp_path / "a.jsonl", samples), eval=0.2, rows={"seed": 1})
    assert set(other.eval.digests.tolist()) != set(result.eval.digests.tolist())


def test_smallest_share_holds_out_one_sample_and_one_content_cannot_be_split(tmp_path, prepared):
    result = prepared(write_lines(tmp_path / "a.jsonl", chats(10)), eval=0.001)
    assert len(result.eval) == 1 and len(result.train) == 9
    with pytest.raises(RequestError, match=r"too few different samples"):
        prepared(write_lines(tmp_path / "b.jsonl", [chat("q", "a")] * 5), eval=0.2)


def test_evaluation_data_of_their_own_are_used_and_overlap_is_counted(tmp_path, prepared):
    train = write_lines(tmp_path / "a.jsonl", chats(10))
    result = prepared(train, eval=str(write_lines(tmp_path / "b.jsonl", chats(4, start=8))))
    assert len(result.eval) == 4 and result.facts["eval_in_train"] == 2


def test_mixture_takes_samples_by_weight(tmp_path, prepared):
    many, few = write_lines(tmp_path / "a.jsonl", chats(60)), write_lines(tmp_path / "b.jsonl", chats(5, start=100))
    sources = [{"path": str(many), "weight": 3}, {"path": str(few), "weight": 1}]
    tokens = prepared(sources).train
    order = Order(tokens.shares, seed=0)
    seen = np.bincount(order.samples(0, np.arange(len(order))), minlength=65)
    assert (seen[:60] == 1).all() and (seen[60:] == 4).all()
    plain = prepared([str(many), str(few)]).train
    assert len(Order(plain.shares, seed=0)) == 65


@pytest.mark.parametrize("weights", [(1, 1), (1, None)])
def test_weights_are_shares_as_soon_as_one_is_given_and_missing_ones_are_one(tmp_path, prepared, weights):
    many, few = write_lines(tmp_path / "a.jsonl", chats(60)), write_lines(tmp_path / "b.jsonl", chats(5, start=100))
    tokens = prepared([{"path": str(many), "weight": weights[0]}, {"path": str(few), "weight": weights[1]}]).train
    assert Order(tokens.shares, seed=0).counts == [60, 60]


def test_second_run_opens_the_cache_and_reads_no_data_file(tmp_path, prepared, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", chats(300))
    cold = prepared(path, eval=0.1)

    def unexpected(*arguments):
        raise AssertionError("a data file was read")

    monkeypatch.setattr(tokenise_module, "read_records", unexpected)
    monkeypatch.setattr("luthier.artifacts.fingerprint.digest_file", unexpected)
    begin = time.perf_counter()
    warm = prepared(path, eval=0.1)
    assert time.perf_counter() - begin < 0.5
    assert not cold.facts["warm"] and warm.facts["warm"]
    assert cold.train.fingerprint == warm.train.fingerprint
    assert all(np.array_equal(cold.train[number][0], warm.train[number][0]) for number in range(len(warm.train)))


def test_whatever_changes_the_tokens_changes_the_cache(tmp_path, prepared):
    path = write_lines(tmp_path / "a.jsonl", chats(5))
    prints = {prepared(path).train.fingerprint}
    prints.add(prepared(path, train_on="last").train.fingerprint)
    prints.add(prepared(path, rows={"max_length": 64}).train.fingerprint)
    other_template = make_tokenizer(template=CHATML.replace("\n'", "\n\n'"))
    prints.add(prepared(path, with_tokenizer=other_template).train.fingerprint)
    prints.add(prepared(path, with_tokenizer=make_tokenizer(vocab=300)).train.fingerprint)
    write_lines(path, chats(5, start=1))
    prints.add(prepared(path).train.fingerprint)
    assert len(prints) == 6


def test_cache_that_was_cut_short_is_made_again(tmp_path, prepared):
    path = write_lines(tmp_path / "a.jsonl", chats(5))
    shard = prepared(path).train.parts[0].shard
    (shard.folder / "ids.bin").write_bytes(b"123")
    assert prepared(path).train[4][0].size > 10


def test_failed_run_leaves_nothing_in_the_cache(tmp_path, prepared):
    path = write_lines(tmp_path / "a.jsonl", [*chats(3), {"messages": []}])
    with pytest.raises(RequestError):
        prepared(path)
    assert not list((tmp_path / "cache-home/luthier/tokens").iterdir())


def test_cache_folder_can_be_given(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", chats(5))
    prepare(run_config(path), tokenizer, cache=tmp_path / "mine", say=lambda line: None)
    assert list((tmp_path / "mine").iterdir())


def test_batches_are_made_from_what_was_prepared(tmp_path, prepared):
    rows = {"batch_tokens": 200, "micro_batch": 2}
    result = prepared(write_lines(tmp_path / "a.jsonl", chats(40)), rows=rows)
    batches = Batches(result.train, run_config("x", rows=rows).train, pad_id=0)
    steps = [batches.step(number) for number in range(batches.steps_per_epoch)]
    assert sorted(index for step in steps for index in step.indices) == list(range(40))
    assert sum(step.trained_tokens for step in steps) == result.facts["trained_tokens"]
    assert steps[-1].epoch == 1.0
