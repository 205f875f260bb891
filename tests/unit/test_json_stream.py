"""Records of one big JSON value: every cut of the file gives the same ones, and every fault is one line."""

import gzip
import json
from pathlib import Path

import pytest

from odqa.corpus import json_stream
from odqa.corpus.json_stream import Record, stream_records
from odqa.errors import DataError

VALUES = [
    {"question": 'who said "no]"?', "ctxs": [{"score": "1.5", "text": "caf\u00e9 \U0001f600 \\ / {"}]},
    {},
    [],
    12,
    -1.5e-3,
    True,
    None,
    "a, b",
]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("style", [{}, {"indent": 4}, {"ensure_ascii": False}])
def test_the_blocks_that_a_file_is_read_in_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, style: dict[str, object]
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    file = tmp_path / "list.json"
    file.write_text(json.dumps(VALUES, **style), encoding="utf-8")  # type: ignore[arg-type]
    assert list(stream_records(file)) == [Record(number, None, value) for number, value in enumerate(VALUES, 1)]
    named = {str(number): value for number, value in enumerate(VALUES, 1)}
    file.write_text(json.dumps(named, **style) + "\n", encoding="utf-8")  # type: ignore[arg-type]
    assert list(stream_records(file)) == [Record(int(key), key, value) for key, value in named.items()]


def test_an_empty_list_has_no_records_and_a_gzipped_one_is_read_alike(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(" [ ] \n")
    assert list(stream_records(tmp_path / "empty.json")) == []
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(b"[1, 2]"))
    assert [record.value for record in stream_records(tmp_path / "list.json.gz")] == [1, 2]


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a JSON list or object of records, found an empty file"),
        ("  3", "found '3' at its beginning"),
        ('[{"a": 1}', r"record 1: not JSON \(expected a comma or \], found the end of the file\)"),
        ('[{"a": 1}, ', r"record 2: not JSON \(the file ends where a value is expected\)"),
        ('[{"a": 1}, {"b": ', r"record 2: not JSON \(Expecting value\)"),
        ('[{"a": 1}, {"b": "x', r"record 2: not JSON \(Unterminated string"),
        ("[1, 2,]", "record 3: not JSON"),
        ("[1 2]", r"record 1: not JSON \(expected a comma or \], found '2'\)"),
        ('{"a": 1, 2: 3}', "record 2: not JSON .expected a name in quotes, found '2'"),
        ('{"a" 1}', "record 1: not JSON .expected a colon, found '1'"),
        ("[1] [2]", "text after the end of the JSON value"),
        ("[" * 200_000, "record 1: not JSON .nested too deeply"),
    ],
)
def test_what_is_no_list_of_records_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, block: int
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    file = tmp_path / "list.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        list(stream_records(file))
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_fault_in_the_middle_is_found_without_reading_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", 64)
    read = []
    fill = json_stream._Scanner._fill
    monkeypatch.setattr(json_stream._Scanner, "_fill", lambda scanner: read.append(1) or fill(scanner))
    file = tmp_path / "list.json"
    file.write_text('[{"a": nothing}' + ", {}" * 100_000 + "]")
    with pytest.raises(DataError, match="record 1: not JSON"):
        list(stream_records(file))
    assert len(read) < 5


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('["café"]'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(stream_records(tmp_path / "latin.json"))
    whole = gzip.compress(json.dumps(list(range(100_000))).encode())
    (tmp_path / "cut.json.gz").write_bytes(whole[:-50])
    with pytest.raises(DataError, match="damaged gzip file"):
        list(stream_records(tmp_path / "cut.json.gz"))
