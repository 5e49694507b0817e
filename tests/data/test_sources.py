"""Sources: every kind of file, encodings, and errors that name file and line."""

import gzip
import json
import random

import pytest
from conftest import chat, write_lines

from luthier.config.schema import SourceConfig
from luthier.data import encoding as encoding_module
from luthier.data import sources as sources_module
from luthier.data.encoding import BadText, read_lines
from luthier.data.offenders import Offenders
from luthier.data.sources import find_files, read_records
from luthier.errors import RequestError

CHINESE = "问题,回答\n今天天气怎么样？,今天天气很好，适合出门散步。\n你叫什么名字？,我是一个语言模型，可以回答问题。\n"


def read(path, encoding=None, on_bad="error", limit=None):
    offenders = Offenders(on_bad)
    records = list(read_records(SourceConfig(path=str(path), limit=limit), encoding, offenders))
    offenders.finish()
    return records, offenders


def values(path, **options):
    return [record.values for record in read(path, **options)[0]]


def lines(path, **options):
    return [record.place.line for record in read(path, **options)[0]]


def test_json_lines_are_read_with_their_line_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}')
    assert values(path) == [{"text": "a"}, {"text": "b"}]
    assert lines(path) == [1, 3]


def test_json_array_is_read_with_the_line_each_object_begins_on(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b,\n"}], indent=1))
    assert values(path) == [{"text": "a"}, {"text": "b,\n"}]
    assert lines(path) == [2, 5]


def test_json_lines_in_a_json_file_are_recognised(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert values(path) == [{"text": "a"}, {"text": "b"}]


def test_json_object_around_one_table_is_opened(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"version": 1, "data": [{"text": "a"}]}')
    assert values(path) == [{"text": "a"}]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_tables_are_read_with_fields_over_several_lines(tmp_path, name, delimiter):
    path = tmp_path / name
    path.write_text(f'prompt{delimiter}completion\n"a\nb"{delimiter}c\nd{delimiter}e\n', encoding="utf-8-sig")
    assert values(path) == [{"prompt": "a\nb", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    assert lines(path) == [2, 4]


def test_table_field_longer_than_csv_reads_by_default_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(values(path)[0]["text"]) == 200_000


def test_parquet_is_read_without_the_keys_that_other_rows_brought_in(tmp_path):
    import pyarrow
    import pyarrow.parquet

    samples = [chat("a", "b"), {"messages": [{"role": "user", "content": "c", "name": "n"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(samples), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == samples


def test_text_file_is_one_text_and_a_long_one_comes_in_portions(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert values(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]
    monkeypatch.setattr(sources_module, "TEXT_PORTION", 6)
    records, _ = read(tmp_path / "a.txt")
    assert "".join(record.values["text"] for record in records) == "one\n\ntwo\n"
    assert [record.whole for record in records] == [False, True]


def test_folders_and_globs_are_read_in_order_of_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden.jsonl"):
        write_lines(tmp_path / name, [{"text": name}])
    (tmp_path / "notes.md").write_text("not data")
    assert [each["text"] for each in values(tmp_path)] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert [each["text"] for each in values(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]


def test_limit_takes_the_first_samples(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": str(number)} for number in range(9)])
    assert values(path, limit=2) == [{"text": "0"}, {"text": "1"}]


def test_hub_id_is_not_mistaken_for_a_file_nor_a_file_for_a_hub_id(tmp_path):
    assert find_files(SourceConfig(path="owner/data-set")) is None
    with pytest.raises(RequestError, match=r"train\.jsonl does not exist"):
        find_files(SourceConfig(path="owner/train.jsonl"))


def test_misspelt_path_is_answered_with_the_near_one(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(RequestError, match=r"Did you mean .*train\.jsonl"):
        read(tmp_path / "trian.jsonl")


def test_hub_that_cannot_be_reached_is_an_error_that_names_the_ways_out():
    with pytest.raises(RequestError, match="HF_ENDPOINT") as caught:
        read("nobody/nothing-here")
    assert "HF_HUB_OFFLINE" in str(caught.value) and "local file" in str(caught.value)


def test_empty_file_and_folder_without_data_are_errors(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(RequestError, match=r"a\.jsonl is empty"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(RequestError, match="holds no data file"):
        read(tmp_path / "none")


def test_broken_lines_are_named_with_their_lines_and_can_be_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1]\n{"text": "b"}\n')
    with pytest.raises(RequestError) as caught:
        read(path)
    assert f"{path}:2: is not JSON (Expecting value at character 9)" in str(
        caught.value
    ) and f"{path}:3: holds a JSON array" in str(caught.value)
    assert "data.on_bad: skip" in str(caught.value)
    records, offenders = read(path, on_bad="skip")
    assert len(records) == 2 and offenders.count == 2


def test_table_row_with_too_few_fields_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc\n")
    with pytest.raises(RequestError, match=r"a\.csv:3: has 1 fields where the header has 2"):
        read(tmp_path / "a.csv")


def test_damaged_parquet_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(RequestError, match="not a whole parquet file"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["gbk", "gb18030"])
def test_chinese_encoding_is_detected_named_and_then_read(tmp_path, name):
    path = tmp_path / "a.csv"
    path.write_bytes(CHINESE.encode(name))
    with pytest.raises(RequestError, match=r"a\.csv:1 is not UTF-8; it looks like gb18030.*`data.encoding: gb18030`"):
        read(path)
    assert values(path, encoding="gb18030")[0] == {"问题": "今天天气怎么样？", "回答": "今天天气很好，适合出门散步。"}


def test_chinese_after_pages_of_english_is_detected(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\n" + b"hello there,fine thanks\n" * 20_000 + CHINESE.encode("gbk"))
    with pytest.raises(RequestError, match=r"a\.csv:20002 is not UTF-8; it looks like gb18030"):
        read(path)


def test_utf_16_is_detected_and_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(CHINESE.encode("utf-16"))
    with pytest.raises(RequestError, match="it looks like utf-16"):
        read(path)
    assert len(values(path, encoding="utf-16")) == 2


def test_latin_text_in_another_encoding_names_some_encoding_or_how_to(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(("text\n" + "Où est la bibliothèque, s'il vous plaît ? Très bien.\n" * 5).encode("latin-1"))
    with pytest.raises(RequestError, match=r"not UTF-8.*data\.encoding"):
        read(path)


def test_utf_8_with_a_mark_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "好"}\n', encoding="utf-8-sig")
    assert values(path) == values(path, encoding="utf-8") == [{"text": "好"}]


def test_one_bad_byte_in_utf_8_is_a_broken_line_and_not_an_encoding(tmp_path):
    path = tmp_path / "a.jsonl"
    good = ['{"text": "今天天气很好"}\n'.encode()] * 5
    path.write_bytes(b"".join([*good, b'{"text": "\xe4\xbb"}\n', *good]))
    with pytest.raises(RequestError, match=r"a\.jsonl:6: is not valid UTF-8 \(byte 11 of the line\)"):
        read(path)
    assert len(values(path, on_bad="skip")) == 10


def test_one_bad_line_in_plain_english_is_a_broken_line_too(tmp_path):
    lines = [b'{"text": "plain english %d"}' % number for number in range(40)]
    lines[7] = b'{"text": "\xff\xfe"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = list(read_lines(tmp_path / "a.jsonl", None))
    assert [number for number, line in found if isinstance(line, BadText)] == [8]
    assert len(found) == 40


def test_wrong_or_unknown_encoding_is_an_error_that_names_it(tmp_path):
    from luthier.data.encoding import check_encoding

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "今天天气很好适合出门"}\n', encoding="gb18030")
    with pytest.raises(RequestError, match=r"cannot be read as shift_jis.*data\.encoding: gb18030"):
        read(path, encoding="shift_jis")
    with pytest.raises(RequestError, match="'gbk18' is not an encoding"):
        check_encoding("gbk18")


def test_line_longer_than_a_sample_can_be_is_an_error_and_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding_module, "LONGEST_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 5000 + '"}\n')
    with pytest.raises(RequestError, match=r"a\.jsonl:1 is longer than"):
        read(path)


def test_random_bytes_give_a_clear_error_and_never_a_traceback(tmp_path):
    source = random.Random(0)
    for kind in (".jsonl", ".json", ".csv", ".parquet"):
        for number in range(10):
            path = tmp_path / f"{number}{kind}"
            path.write_bytes(source.randbytes(200))
            try:
                read(path)
            except RequestError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_compressed_files_are_read_as_what_is_in_them(tmp_path, kind):
    text = {"jsonl": '{"text": "好"}\n', "json": '[{"text": "好"}]', "csv": "text\n好\n", "txt": "好"}[kind]
    path = tmp_path / f"a.{kind}.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert values(path) == values(tmp_path) == [{"text": "好"}]


def test_compressed_file_in_another_encoding_is_named_and_then_read(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(CHINESE.encode("gbk")))
    with pytest.raises(RequestError, match=r"a\.csv\.gz:1 is not UTF-8; it looks like gb18030"):
        read(path)
    assert len(values(path, encoding="gb18030")) == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: b"plain text", lambda data: data[:20] + b"xxxx"]
)
def test_compressed_file_that_is_not_whole_is_an_error(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"text": "a b c"}\n' * 100)))
    with pytest.raises(RequestError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        read(path)


def test_kinds_that_cannot_be_read_are_refused_by_name(tmp_path):
    for name in ("a.parquet.gz", "a.jsonl.zst", "a.xlsx"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(RequestError, match=r"is not of a kind that can be read.*\.jsonl"):
            read(tmp_path / name)
