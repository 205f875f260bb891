"""Passage and question files: formats, and one-line errors that name file and line."""

import gzip
import json
from pathlib import Path

import pytest

from odqa.corpus.io import FileFormat, read_gold, read_passages, read_questions, save_passages, save_questions
from odqa.errors import DataError
from odqa.types import Gold, Passage, Query

DPR = 'id\ttext\ttitle\n1\t"""Aaron"" is a\nprophet"\tAaron\n2\tplain\t"""Weird Al"" Yankovic"\n'
DPR_PASSAGES = [Passage("1", '"Aaron" is a\nprophet', "Aaron"), Passage("2", "plain", '"Weird Al" Yankovic')]


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- passages


@pytest.mark.parametrize("name", ["psgs.tsv", "psgs.tsv.gz", "PSGS.TSV"])
def test_reads_dpr_with_quotes_and_line_breaks(tmp_path: Path, name: str) -> None:
    assert list(read_passages(write(tmp_path / name, DPR))) == DPR_PASSAGES


def test_the_header_decides_the_order_of_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "p.tsv", "title\tid\ttext\nAaron\t7\ta prophet\n")
    assert list(read_passages(file)) == [Passage("7", "a prophet", "Aaron")]


def test_the_title_column_may_be_missing(tmp_path: Path) -> None:
    assert list(read_passages(write(tmp_path / "p.tsv", "id\ttext\n7\ta prophet\n"))) == [Passage("7", "a prophet")]


def test_windows_line_ends_and_a_byte_order_mark_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "p.tsv"
    file.write_bytes("\ufeffid\ttext\r\n7\ta prophet\r\n".encode())
    assert list(read_passages(file)) == [Passage("7", "a prophet")]


@pytest.mark.parametrize(
    ("row", "passage"),
    [
        ({"id": "1", "contents": '"Aaron"\nA prophet.'}, Passage("1", "A prophet.", "Aaron")),  # FlashRAG, Pyserini
        ({"id": 1, "contents": "Aaron\nA prophet.\nOf old."}, Passage("1", "A prophet.\nOf old.", "Aaron")),
        ({"id": "1", "contents": "A prophet."}, Passage("1", "A prophet.")),
        ({"id": "1", "contents": '"\nA prophet.'}, Passage("1", "A prophet.", '"')),
        ({"id": "1", "title": "Aaron", "text": "A\nprophet."}, Passage("1", "A\nprophet.", "Aaron")),
        ({"id": "1", "title": None, "text": "A prophet."}, Passage("1", "A prophet.")),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json"])
def test_reads_the_kinds_of_jsonl(tmp_path: Path, name: str, row: object, passage: Passage) -> None:
    assert list(read_passages(write(tmp_path / name, "\n" + jsonl(row)))) == [passage]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.tsv", "", "p.tsv: the file is empty"),
        ("p.tsv", "id\ttext\ttitle\n", "p.tsv: the file has no passages"),
        ("p.tsv", "id\tbody\n1\tx\n", "p.tsv:1: no column text in the header .found: id, body"),
        ("p.tsv", "id\ttext\n1\tx\n2\n", "p.tsv:3: 1 columns, the header has 2"),
        ("p.tsv", "id\ttext\n\tx\n", "p.tsv:2: no id"),
        ("p.tsv", "id\ttext\n1\tx\n2\ty\n1\tz\n", "p.tsv:4: the id '1' stands twice .first in an earlier line"),
        ("p.tsv", "id\ttext\na\tx\nb\ty\na\tz\n", "p.tsv:4: the id 'a' stands twice .first in line 2"),
        ("p.tsv", 'id\ttext\ttitle\n1\tx\t"open\n2\ty\tz\n', "p.tsv:3: a line break inside an id or a title"),
        ("p.jsonl", "", "p.jsonl: the file has no passages"),
        ("p.jsonl", '{"id": 1, "text": "x"}\n{"id": ', "p.jsonl:2: not JSON"),
        ("p.jsonl", "[1]\n", "p.jsonl:1: expected a JSON object, found list"),
        ("p.jsonl", '{"text": "x"}\n', "p.jsonl:1: no id"),
        ("p.jsonl", '{"id": true, "text": "x"}\n', "p.jsonl:1: no id"),
        ("p.jsonl", '{"id": 1, "body": "x"}\n', "p.jsonl:1: neither 'text' nor 'contents' .* .found: id, body"),
        ("p.jsonl", '{"id": 1, "text": 5}\n', "p.jsonl:1: text and title must be strings"),
        ("p.jsonl", '{"id": 1, "contents": null}\n', "p.jsonl:1: text and title must be strings"),
        ("p.txt", "x", "p.txt: unknown kind of file '.txt'"),
    ],
)
def test_a_wrong_passage_file_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        list(read_passages(write(tmp_path / name, text)))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_reported_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_passages(tmp_path / "p.tsv")
    with pytest.raises(DataError, match="a folder, not a file"):
        read_passages(tmp_path)


def test_a_cut_gzip_file_is_a_data_error(tmp_path: Path) -> None:
    file = write(tmp_path / "p.tsv.gz", "id\ttext\n" + "".join(f"{n}\ttext of {n}\n" for n in range(1, 10_000)))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged gzip file after line"):
        list(read_passages(file))


def test_latin_1_is_a_data_error(tmp_path: Path) -> None:
    file = tmp_path / "p.tsv"
    file.write_bytes("id\ttext\n1\tcafé\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_passages(file))


# --- questions


def test_reads_jsonl_questions_and_gold(tmp_path: Path) -> None:
    text = jsonl(
        {"id": "a", "question": "who?", "answers": ["X", "Y"], "positive_ids": [3, "4"]},
        {"id": "b", "question": "what?", "golden_answers": ["Z"], "passage_ids": ["5"]},
        {"id": "c", "question": "why?", "answers": []},
    )
    file = write(tmp_path / "q.jsonl.gz", text)
    assert read_questions(file) == [Query("a", "who?"), Query("b", "what?"), Query("c", "why?")]
    assert read_gold(file) == [Gold("a", ("X", "Y"), ("3", "4")), Gold("b", ("Z",), ("5",)), Gold("c", ())]


def test_questions_need_no_answers_and_get_line_numbers_for_ids(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", jsonl({"question": "who?"}, {"question": "what?"}))
    assert read_questions(file) == [Query("1", "who?"), Query("2", "what?")]
    with pytest.raises(DataError, match=r"q\.jsonl:1: no answers"):
        read_gold(file)


@pytest.mark.parametrize("name", ["q.csv", "q.csv.gz", "q.tsv"])
def test_reads_dpr_questions(tmp_path: Path, name: str) -> None:
    # As in DPR's nq-test.qa.csv: list literals with either quote, csv quotes doubled around them.
    file = write(tmp_path / name, 'who sang it\t[\'Beyoncé\', "L\'Aura"]\nwhen\t"[\'""1999""\']"\n')
    assert read_questions(file) == [Query("1", "who sang it"), Query("2", "when")]
    assert read_gold(file) == [Gold("1", ("Beyoncé", "L'Aura")), Gold("2", ('"1999"',))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.jsonl", "", "the file has no questions"),
        ("q.jsonl", '{"id": 1, "query": "x"}', "q.jsonl:1: no string under the key 'question' .found: id, query"),
        ("q.jsonl", '{"id": 1, "question": " "}', "q.jsonl:1: the question is empty"),
        ("q.jsonl", jsonl(*[{"id": "a", "question": "x"}] * 2), "q.jsonl:2: the id 'a' stands twice .first in line 1"),
        ("q.jsonl", '{"id": 1, "question": "x", "answers": "y"}', "q.jsonl:1: 'answers' must be a list of strings"),
        ("q.csv", "who\t['a']\textra\n", "q.csv:1: expected question<TAB>list of answers, found 3 columns"),
        ("q.csv", "who\tnobody\n", "q.csv:1: the answers are not a Python list literal"),
        ("q.csv", "who\t__import__('os').getcwd()\n", "q.csv:1: the answers are not a Python list literal"),
        ("q.csv", "who\t[1]\n", "q.csv:1: the answers must be a list of strings"),
        ("q.csv", "\t['a']\n", "q.csv:1: the question is empty"),
        ("q.pdf", "x", "unknown kind of file '.pdf'"),
    ],
)
def test_a_wrong_question_file_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_questions(write(tmp_path / name, text))
    assert "\n" not in str(error.value)


# --- writing


AWKWARD = [
    Passage("1", '"Aaron" is a\nprophet,\tsee Exodus', 'Aaron "the" Levite'),
    Passage("b", "two\nlines, no title"),
    Passage("c", "", "a title alone"),
    Passage("d", 'a "quote'),
    Passage("e", "Ünïcödé \U0001f600\u2028x", '"'),
]


@pytest.mark.parametrize(
    ("name", "file_format"),
    [("p.tsv", "dpr"), ("p.tsv.gz", "dpr"), ("p.jsonl", "pyserini"), ("p.jsonl.gz", "flashrag")],
)
def test_written_passages_are_read_back(tmp_path: Path, name: str, file_format: FileFormat) -> None:
    assert save_passages(tmp_path / name, iter(AWKWARD), file_format) == len(AWKWARD)
    assert list(read_passages(tmp_path / name)) == AWKWARD


def test_passages_are_written_as_dpr_and_pyserini_have_them(tmp_path: Path) -> None:
    save_passages(tmp_path / "p.tsv", DPR_PASSAGES, "dpr")
    assert (tmp_path / "p.tsv").read_text() == DPR
    save_passages(tmp_path / "p.jsonl", DPR_PASSAGES[:1], "pyserini")
    assert (tmp_path / "p.jsonl").read_text() == jsonl({"id": "1", "contents": '"Aaron"\n"Aaron" is a\nprophet'})


def test_a_title_with_a_line_break_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the title of passage 'x' has a line break"):
        save_passages(tmp_path / "p.tsv", [*DPR_PASSAGES, Passage("x", "y", "a\nb")], "dpr")
    assert not list(tmp_path.iterdir())


def test_written_questions_are_read_back(tmp_path: Path) -> None:
    queries = [Query("1", "who sang it"), Query("2", 'when "exactly"')]
    gold = [Gold("1", ("Beyoncé", "L'Aura")), Gold("2", ('"1999"',))]
    save_questions(tmp_path / "q.csv", queries, gold, "dpr")
    save_questions(tmp_path / "q.jsonl", queries, gold, "flashrag")
    for name in ("q.csv", "q.jsonl"):
        assert read_questions(tmp_path / name) == queries
        assert read_gold(tmp_path / name) == gold
    first = {"id": "1", "question": "who sang it", "golden_answers": ["Beyoncé", "L'Aura"]}
    assert (tmp_path / "q.jsonl").read_text(encoding="utf-8").startswith(jsonl(first))
    assert (tmp_path / "q.csv").read_text(encoding="utf-8").startswith("who sang it\t")
