"""Rankings of other systems: their formats as their own code writes and reads them, round trips, one-line errors."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from odqa.errors import DataError
from odqa.interchange import RUN_FORMATS, Judge, RankedPassage, RankedQuestion, RunFormat, read_run, save_ranked

TIBER = RankedPassage("7", 2.5, "Rome", "The Tiber runs\nthrough Rome.", True)
ARNO = RankedPassage("b-9", 1.0, "", "Florence lies on the Arno.", False)
QUESTIONS = [
    RankedQuestion("q: 1", "q1", "which river\nruns through rome", ("Tiber", 'the "Tevere"'), (TIBER, ARNO), "Tiber"),
    RankedQuestion("q: 2", "q2", "which river runs through prague", (), (ARNO,), ""),
    RankedQuestion("q: 3", "q3", "nothing found", ("x",), (), ""),
]


def save(path: Path, run_format: RunFormat, questions: list[RankedQuestion] = QUESTIONS) -> Path:
    assert save_ranked(path, iter(questions), run_format) == len(questions)
    return path


# --- as others write them: from their code, by hand


def dpr_results(questions: list[RankedQuestion]) -> str:
    """What save_results of DPR's dense_retriever.py writes: indented, scores as strings."""
    rows = [
        {
            "question": found.question,
            "answers": list(found.answers or ()),
            "ctxs": [
                {"id": p.id, "title": p.title, "text": p.text, "score": str(p.score), "has_answer": p.holds}
                for p in found.passages
            ],
        }
        for found in questions
    ]
    return json.dumps(rows, indent=4) + "\n"


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_reads_what_dpr_writes(tmp_path: Path, name: str) -> None:
    text = dpr_results(QUESTIONS).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    found = list(read_run(tmp_path / name))
    assert [(item.id, item.question, item.answers) for item in found] == [
        (None, item.question, item.answers) for item in QUESTIONS
    ]
    assert [item.passages for item in found] == [item.passages for item in QUESTIONS]
    assert found[1].where == f"{tmp_path / name}: record 2"


def test_reads_dpr_records_a_line_and_those_without_texts(tmp_path: Path) -> None:
    row = {"question": "q", "answers": ["a"], "ctxs": [{"id": 3, "has_answer": True}, {"id": "4", "score": 0.5}]}
    (tmp_path / "run.jsonl").write_text("\n" + json.dumps(row) + "\n")
    (found,) = read_run(tmp_path / "run.jsonl")
    # Without a score the rank stands for it: minus 1 for the first.
    assert found.passages == (RankedPassage("3", -1.0, holds=True), RankedPassage("4", 0.5))


def test_reads_what_pyserini_converts(tmp_path: Path) -> None:
    row = {"docid": "7", "score": "9.1", "text": '"Rome"\nThe Tiber.', "has_answer": True}
    bare = {"docid": "8", "score": "9.0", "has_answer": False}  # without --store-raw
    run = {"0": {"question": "which river", "answers": ["Tiber"], "contexts": [row, bare]}}
    (tmp_path / "run.json").write_text(json.dumps(run, indent=4))
    (found,) = read_run(tmp_path / "run.json")
    assert (found.id, found.question, found.answers) == ("0", "which river", ("Tiber",))
    assert found.passages == (
        RankedPassage("7", 9.1, "Rome", "The Tiber.", True),
        RankedPassage("8", 9.0, holds=False),
    )


def test_reads_flashrags_intermediate_data(tmp_path: Path) -> None:
    row = {
        "id": "test_0",
        "question": "which river",
        "golden_answers": ["Tiber"],
        "output": {
            "retrieval_result": [
                {"id": "7", "contents": '"Rome"\nThe Tiber.'},
                {"id": "8", "contents": "x", "score": 3},
            ],
            "prompt": "...",
            "pred": "Tiber",
            "metric_score": {"em": 1.0},
        },
    }
    (tmp_path / "intermediate_data.json").write_text(json.dumps([row, row | {"id": "1", "output": {"pred": "x"}}]))
    first, closed_book = read_run(tmp_path / "intermediate_data.json")
    assert first.id == "test_0" and first.answers == ("Tiber",) and first.prediction == "Tiber"
    assert first.passages == (RankedPassage("7", -1.0, "Rome", "The Tiber."), RankedPassage("8", 3.0, "", "x"))
    assert closed_book.passages == () and closed_book.prediction == "x"


def test_in_a_trec_run_the_scores_decide_and_ties_keep_their_order(tmp_path: Path) -> None:
    lines = ["q1 Q0 a 1 1.0 bm25", "q1 Q0 b 2 3.0 bm25", "q1 Q0 c 3 1.0 bm25", "", "q2\tQ0\ta\t1\t-2e-1\tbm25"]
    (tmp_path / "run.trec").write_text("\n".join(lines) + "\n")
    first, second = read_run(tmp_path / "run.trec")
    assert [(p.id, p.score) for p in first.passages] == [("b", 3.0), ("a", 1.0), ("c", 1.0)]
    assert second.id == "q2" and second.passages == (RankedPassage("a", -0.2),)


def test_a_file_of_several_trec_runs_needs_a_tag(tmp_path: Path) -> None:
    (tmp_path / "run.txt").write_text("q1 Q0 a 1 1.0 x\nq1 Q0 a 1 1.0 y\nq2 Q0 b 1 2.0 y\n")
    with pytest.raises(DataError, match=r"line 2: a second run, 'y', begins. Name one of them: --tag"):
        list(read_run(tmp_path / "run.txt"))
    assert [found.id for found in read_run(tmp_path / "run.txt", tag="y")] == ["q1", "q2"]
    with pytest.raises(DataError, match=r"no lines of tag 'z' \(there is x, y\)"):
        list(read_run(tmp_path / "run.txt", tag="z"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.trec", "", "run.trec: an empty run"),
        ("run.trec", "q1 Q0 a 1 1.0\n", "line 1 has 5 columns; a TREC run has 6: query Q0 passage rank score tag"),
        ("run.trec", "q1 Q0 a 1 x t\n", "line 1: the score 'x' is not a finite number"),
        ("run.trec", "q1 Q0 a 1 nan t\n", "line 1: the score 'nan' is not a finite number"),
        ("run.trec", "q1 Q0 a 1 1 t\nq1 Q0 a 2 1 t\n", "line 1: passage 'a' stands twice"),
        (
            "run.trec",
            "q1 Q0 a 1 1 t\nq2 Q0 a 1 1 t\nq1 Q0 b 2 1 t\n",
            "line 3: question 'q1' comes again, after line 1. Sort its lines by query: sort -s -k1,1 run.trec",
        ),
        ("run.json", "[]", "run.json: an empty run"),
        ("run.json", "[3]", "record 1: expected an object, found int"),
        ("run.json", '[{"q": 1}]', "record 1: none of ctxs, contexts, output among its keys .found: q"),
        ("run.json", '[{"ctxs": 1}]', "record 1: expected a list of passages under ctxs"),
        ("run.json", '[{"ctxs": [1]}]', "record 1: expected a list of passages under ctxs"),
        ("run.json", '[{"ctxs": [{"score": 1}]}]', r"record 1: ctxs\[0\]: no id .expected .* under id, found None"),
        ("run.json", '[{"ctxs": [{"id": 1, "score": "high"}]}]', "the score 'high' is not a finite number"),
        ("run.json", '[{"ctxs": [{"id": 1, "text": 5}]}]', "title and text must be strings"),
        ("run.json", '[{"ctxs": [{"id": 1, "has_answer": "yes"}]}]', "has_answer must be true or false, found 'yes'"),
        ("run.json", '[{"ctxs": [{"id": 1}, {"id": "1"}]}]', "record 1: passage '1' stands twice"),
        ("run.json", '[{"ctxs": [], "answers": "x"}]', "record 1: answers must be a list of strings"),
        ("run.json", '[{"ctxs": [], "question": 5}]', "record 1: expected a string under question, found int"),
        ("run.json", '[{"output": 5}]', "record 1: expected an object under output, found int"),
        (
            "run.json",
            '[{"ctxs": [], "id": "a"}, {"ctxs": [], "id": "a"}]',
            "record 2: question 'a' comes again, after r",
        ),
        ("run.jsonl", "{}\n{", "record 1: none of ctxs"),
        ("run.pkl", "x", "unknown kind of run '.pkl' .expected .trec, .run, .txt, .res for TREC's; .json or .jsonl"),
    ],
)
def test_a_file_that_is_no_run_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        list(read_run(tmp_path / name))
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_missing_run_is_reported_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_run(tmp_path / "run.json")
    with pytest.raises(DataError, match="a folder, not a run file"):
        read_run(tmp_path)


# --- round trips


@pytest.mark.parametrize("run_format", [name for name in RUN_FORMATS if name != "trec"])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_what_is_written_is_read_back(tmp_path: Path, run_format: RunFormat, suffix: str) -> None:
    found = list(read_run(save(tmp_path / f"run{suffix}", run_format)))
    texts = {"7": "The Tiber runs through Rome." if run_format == "pyserini" else TIBER.text, "b-9": ARNO.text}
    for item, given in zip(found, QUESTIONS, strict=True):
        assert (item.id, item.question, item.answers) == (given.id, given.question, given.answers)
        assert [(p.id, p.score, p.title, p.text) for p in item.passages] == [
            (p.id, p.score, p.title, texts[p.id]) for p in given.passages
        ]
        assert item.prediction == (given.prediction if run_format == "flashrag" else None)
        if run_format != "flashrag":
            assert [p.holds for p in item.passages] == [p.holds for p in given.passages]


def test_writing_twice_gives_the_same_bytes_and_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    first = save(tmp_path / "run.json.gz", "dpr").read_bytes()
    assert save(tmp_path / "run.json.gz", "dpr").read_bytes() == first
    with pytest.raises(DataError, match="name the question file"):
        save_ranked(tmp_path / "run.json.gz", [*QUESTIONS, RankedQuestion("w", "q", "x", None, ())], "dpr")
    assert [file.name for file in tmp_path.iterdir()] == ["run.json.gz"]
    assert (tmp_path / "run.json.gz").read_bytes() == first


def test_has_answer_is_computed_where_nobody_says_it(tmp_path: Path) -> None:
    passages = (RankedPassage("1", 2.0, "Tiber", "A river."), RankedPassage("2", 1.0, "", "the tiber, twice"))
    save(tmp_path / "run.json", "dpr", [RankedQuestion("w", "q", "which", ("Tiber",), passages)])
    (record,) = json.loads((tmp_path / "run.json").read_text())
    assert [ctx["has_answer"] for ctx in record["ctxs"]] == [False, True]  # on the text, not the title
    assert record["ctxs"][0] == {"id": "1", "title": "Tiber", "text": "A river.", "score": "2", "has_answer": False}


def trec_eval_order(lines: list[str]) -> list[str]:
    """trec_eval's: by score as a 32-bit float, equal ones by passage id, the larger first (form_res_rels.c)."""
    rows = [line.split() for line in lines]
    return [row[2] for row in sorted(rows, key=lambda row: (np.float32(row[4]), row[2]), reverse=True)]


@pytest.mark.parametrize(
    "scores",
    [
        [3.0, 3.0, 3.0, 2.0],
        [0.0163934, 0.0163934, 0.0161290],  # sums of reciprocal ranks
        [5.1, 4.0, 88.0, 87.0, 87.0],  # a re-ranker scored two of five
        [-1.0, -1.0, -2.0],
        [0.0, 0.0, 0.0, -1e-7],
        [123456.0, 123456.0, 123455.0],
    ],
)
def test_who_sorts_a_trec_run_by_score_finds_our_order(tmp_path: Path, scores: list[float]) -> None:
    passages = tuple(RankedPassage(str(place), score) for place, score in enumerate(scores))
    save_ranked(tmp_path / "run.trec", [RankedQuestion("w", "q", None, None, passages)], "trec", tag="mine")
    lines = (tmp_path / "run.trec").read_text().splitlines()
    assert trec_eval_order(lines) == [p.id for p in passages]
    assert [line.split()[3] for line in lines] == [str(rank) for rank in range(1, len(scores) + 1)]
    assert all(re.fullmatch(r"q Q0 \S+ \d+ \S+ mine", line) for line in lines)
    (found,) = read_run(tmp_path / "run.trec")
    assert [p.id for p in found.passages] == [p.id for p in passages]
    assert found.passages[0].score == scores[0]


def test_scores_that_fall_are_written_as_they_are(tmp_path: Path) -> None:
    passages = (RankedPassage("a", 12.3457), RankedPassage("b", 12.3456), RankedPassage("c", -4.0))
    save_ranked(tmp_path / "run.trec", [RankedQuestion("w", "q", None, None, passages)], "trec")
    (found,) = read_run(tmp_path / "run.trec")
    assert found.passages == passages


@pytest.mark.parametrize(
    ("query_id", "passage_id", "tag"), [("q 1", "a", "t"), ("q", "a b", "t"), ("q", "a", "my run")]
)
def test_a_trec_run_cannot_hold_blanks(tmp_path: Path, query_id: str, passage_id: str, tag: str) -> None:
    found = RankedQuestion("w", query_id, None, None, (RankedPassage(passage_id, 1.0),))
    with pytest.raises(DataError, match="cannot stand in a TREC run"):
        save_ranked(tmp_path / "run.trec", [found], "trec", tag=tag)
    assert not list(tmp_path.iterdir())


# --- their scorers, as they are written


def pyserini_accuracy(retrieval: dict[str, Any], k: int) -> float:
    """pyserini/eval/evaluate_dpr_retrieval.py: has_answer where it is there, else the second line of the text."""
    token = regex.compile(r"([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])", flags=regex.IGNORECASE | regex.UNICODE)
    hits = 0
    for found in retrieval.values():
        for ctx in found["contexts"][:k]:
            words = [match.group().lower() for match in token.finditer(ctx["text"].split("\n")[1])]
            answers = [[match.group().lower() for match in token.finditer(answer)] for answer in found["answers"]]
            inside = any(words[i : i + len(a)] == a for a in answers for i in range(len(words) - len(a) + 1))
            assert inside == ctx["has_answer"]
            if inside:
                hits += 1
                break
    return hits / len(retrieval)


def test_pyserinis_scorer_finds_the_same_in_what_we_write_for_it(tmp_path: Path) -> None:
    retrieval = json.loads(save(tmp_path / "run.json", "pyserini").read_text())
    assert pyserini_accuracy(retrieval, 20) == pytest.approx(1 / 3)  # q1 alone has its answer


def test_dprs_reader_takes_what_we_write(tmp_path: Path) -> None:
    """dpr/data/reader_data.py and FiD's data.py: these keys, scores that float() takes."""
    for sample in json.loads(save(tmp_path / "run.json", "dpr").read_text()):
        assert isinstance(sample["question"], str) and isinstance(sample["answers"], list)
        for ctx in sample["ctxs"]:
            assert {"id", "title", "text", "score", "has_answer"} <= set(ctx) and isinstance(float(ctx["score"]), float)


# --- judging


def test_the_first_passage_with_an_answer_gives_the_rank() -> None:
    judge = Judge("string")
    assert [judge.rank(found, found.answers or ()) for found in QUESTIONS] == [1, None, None]
    assert judge.rank(QUESTIONS[0], ("Arno",)) == 2
    # Looked at: the Tiber, then the Tiber (the file says it has the answer; Arno it has not) and the Arno.
    assert judge.notes == ["has_answer in the file is not ours for 2 of 3 passages looked at; ours counts"]


def test_without_a_text_the_index_is_asked_and_without_an_index_the_file_believed() -> None:
    bare = RankedQuestion(
        "w: record 1", "q", None, None, (RankedPassage("1", 2.0), RankedPassage("2", 1.0, holds=True))
    )
    assert Judge("string", {"1": "x", "2": "the Tiber"}.__getitem__).rank(bare, ("Tiber",)) == 2
    with pytest.raises(DataError, match=r"w: record 1: passage '1' has neither a text nor has_answer.*--index"):
        Judge("string").rank(bare, ("Tiber",))
    judge = Judge("string")
    assert judge.rank(RankedQuestion("w", "q", None, None, bare.passages[1:]), ("Tiber",)) == 1
    assert judge.notes == ["1 of 1 passages have no text: has_answer is the file's"]
