"""The full Natural Questions run of eval/nq-open.yaml, step by step, on small files in the same formats.

The recipes are the shipped ones. What is changed is what a person without the hub changes on the command line: the
models, the data set, and the size of the FAISS index.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from odqa import config
from odqa.artifacts import load_artifact
from odqa.recipes import build_retriever, load_recipe
from odqa.retrieve.index import AlphaHybridRetriever, load_index
from tests.command_line import ok, refused
from tests.small_world import TOWNS, World, questions, tiny_dpr, write_jsonl, write_psgs, write_qa_csv
from tests.tiny_models import tiny_bert

ROOT = Path(__file__).parents[2]
INDEX, PIPELINE, EVAL = (ROOT / folder / "nq-open.yaml" for folder in ("indexes", "pipelines", "eval"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` caches what it loads; not in the home of who runs the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder: psgs_w100.tsv.gz, DPR's nq-test.csv, and the data set of the hub as a local folder."""
    folder = tmp_path_factory.mktemp("data")
    write_psgs(folder / "psgs_w100.tsv.gz")
    write_qa_csv(folder / "nq-test.csv")
    (folder / "nq_open").mkdir()
    rows = [{"question": row["question"], "answer": row["answers"]} for row in questions()]
    write_jsonl(folder / "nq_open/validation.jsonl", rows)
    write_jsonl(folder / "nq_open/train.jsonl", rows[:3])
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """DPR's question and context encoders, and a plain encoder."""
    folder = tmp_path_factory.mktemp("models")
    return *tiny_dpr(folder, window=512), tiny_bert(folder / "plain", window=512)


@pytest.fixture(scope="module")
def index(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the shipped recipe: DPR's two encoders, and an IVF-PQ index of the same kind with 4 lists."""
    question, context = tiny_dpr(tmp_path_factory.mktemp("dpr"))
    folder = tmp_path_factory.mktemp("indexes") / "nq-open"
    changes = {
        "dense.question_model": question,
        "dense.passage_model": context,
        "dense.dtype": "float32",
        "dense.vectors.faiss": "IVF4,PQ8x4",  # 60 vectors train codes of 4 bits
        "dense.vectors.search": "{nprobe: 4}",
    }
    ok("index", INDEX, "--data", data, "--out", folder, *_set(changes))
    return folder


@pytest.fixture(scope="module")
def pipeline(world: World, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pipeline over the small index with a tiny chat model, saved as `odqa check` prints it."""
    changes = {"index": index, "reader.model": world.lm, "reader.max_new_tokens": 4, "reader.dtype": "float32"}
    changes["retriever.alpha"] = 1000  # random encoders score in the thousands
    path = tmp_path_factory.mktemp("pipelines") / "nq-open.yaml"
    path.write_text(ok("check", PIPELINE, *_set(changes)).out, encoding="utf-8")
    return path


def _set(changes: dict[str, object]) -> list[str]:
    return [argument for key, value in changes.items() for argument in ("--set", f"{key}={value}")]


def test_the_recipes_name_the_full_run() -> None:
    index, pipeline, evaluation = (load_recipe(path).settings for path in (INDEX, PIPELINE, EVAL))
    assert isinstance(index, config.IndexRecipe) and index.dense is not None and index.bm25 is not None
    assert index.passages.file == "data:psgs_w100.tsv.gz"
    assert (index.dense.question_model, index.dense.passage_model) == (
        "facebook/dpr-question_encoder-single-nq-base",
        "facebook/dpr-ctx_encoder-single-nq-base",
    )
    assert (index.dense.pooling, index.dense.titles, index.dense.segments) == ("pooler", "pair", "zero")
    lists = int(str(index.dense.vectors.faiss).split(",")[0].removeprefix("IVF"))
    assert index.dense.vectors.train_rows >= 39 * lists  # FAISS warns below 39 vectors a list
    assert isinstance(pipeline, config.PipelineRecipe) and isinstance(pipeline.retriever, config.AlphaHybridRetriever)
    assert isinstance(pipeline.reader, config.LmReaderSettings) and pipeline.reader.model.count("/") == 1
    assert isinstance(evaluation, config.EvalRecipe)
    assert [variant.recipe for variant in evaluation.pipelines] == ["pipelines/nq-open.yaml"]
    (questions_of,) = evaluation.questions
    assert (questions_of.hub, questions_of.split) == ("google-research-datasets/nq_open", "validation")


def test_psgs_w100_becomes_an_index_of_terms_and_compressed_vectors(index: Path) -> None:
    artifact = load_artifact(index, "index", verify=True)
    assert artifact.manifest["counts"]["passages"] == 60
    names = set(artifact.manifest["files"])
    assert "dense/search/index.faiss" in names and "bm25/postings/data.csc.index.npy" in names
    assert not any(name.startswith("dense/vectors") for name in names)  # FAISS has its codes; the vectors are gone
    encoder = json.loads((index / "dense/encoder.json").read_text())
    assert (encoder["settings"]["pooling"], encoder["settings"]["titles"]) == ("pooler", "pair")
    assert encoder["weights"]["question"] != encoder["weights"]["passage"]
    assert json.loads((index / "dense/search/search.json").read_text()) == {
        "rows": 60, "width": 16, "faiss": "IVF4,PQ8x4", "search": {"nprobe": 4},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["nq-open", "nq-open-spider", "nq-open-spider-nq", "nq-open-contriever", "nq-open-e5"])
def test_every_encoders_recipe_builds_an_index_that_its_questions_fit(
    data: Path, name: str, tmp_path: Path, models: tuple[Path, Path, Path]
) -> None:
    """The shipped recipes with small models in the layout of theirs; what each fixes is what the index then has."""
    question, context, bert = models
    wanted = load_recipe(ROOT / "indexes" / f"{name}.yaml").settings
    assert isinstance(wanted, config.IndexRecipe) and wanted.dense is not None
    is_plain = wanted.dense.titles == "space"
    towers = wanted.dense.passage_model is not None
    changes: dict[str, object] = {"dense.question_model": bert if is_plain else question if towers else context}
    if towers:
        changes["dense.passage_model"] = context
    changes |= {"dense.dtype": "float32", "dense.vectors": "{}"}
    ok("index", ROOT / "indexes" / f"{name}.yaml", "--data", data, "--out", tmp_path / "index", *_set(changes))
    index = load_index(tmp_path / "index")
    built, kept = index.dense.encoder.settings, wanted.dense
    fixed = (
        "pooling",
        "titles",
        "segments",
        "query_prefix",
        "passage_prefix",
        "query_max_tokens",
        "passage_max_tokens",
    )
    assert {key: getattr(built, key) for key in fixed} == {key: getattr(kept, key) for key in fixed}
    assert built.normalize is kept.normalize
    # The retriever of the shipped pipelines, against the rule of arXiv 2104.05740 written down passage by passage.
    shipped = "nq-open-spider" if "spider" in name else "nq-open"
    pipeline = load_recipe(ROOT / "pipelines" / f"{shipped}.yaml").settings
    assert isinstance(pipeline, config.PipelineRecipe)
    retriever = build_retriever(pipeline, index)
    assert isinstance(retriever, AlphaHybridRetriever) and isinstance(pipeline.retriever, config.AlphaHybridRetriever)
    texts = [row["question"] for row in questions()]
    found = retriever.rank(texts, 20)
    both = [searcher.search(texts, 60) for searcher in (index.bm25, index.dense)]
    for query in range(len(texts)):
        sparse, dense = (
            {
                row: score
                for row, score in zip(run.rows[query].tolist(), run.scores[query].tolist(), strict=True)
                if row >= 0
            }
            for run in both
        )
        rule = {
            row: dense.get(row, min(dense.values())) + pipeline.retriever.alpha * sparse.get(row, min(sparse.values()))
            for row in {*sparse, *dense}
        }
        assert found.scores[query] == pytest.approx(sorted(rule.values(), reverse=True)[:20], rel=1e-5)
        assert [rule[row] for row in found.rows[query].tolist()] == pytest.approx(found.scores[query], rel=1e-5)


def test_csv_quotes_of_psgs_w100_are_read_as_dpr_writes_them(data: Path, index: Path, pipeline: Path) -> None:
    with gzip.open(data / "psgs_w100.tsv.gz", "rt", encoding="utf-8") as file:
        assert '""' in file.read()
    found = ok("ask", pipeline, f"what is called {TOWNS[7]}", "--json").json
    passage = next(p for p in found["trace"]["passages"] if p["title"] == TOWNS[7])
    assert passage["text"].endswith(f'It is called "{TOWNS[7]}".') and passage["id"] == "8"


def test_ask_fuses_both_retrievers_and_a_frozen_lm_answers(pipeline: Path) -> None:
    found = ok("ask", pipeline, questions()[2]["question"], "--json").json
    retrieve, pack, _ = found["trace"]["steps"]
    assert len(retrieve["ids"]) > 20 and pack["ids"]
    assert found["trace"]["contexts"][0]["hits"][0]["source"] == "bm25+dense"
    assert "<|user|>" not in found["text"]


@pytest.mark.parametrize("source", ["data set", "DPR csv"])
def test_the_evaluation_runs_on_the_data_set_and_on_dprs_file(
    data: Path, pipeline: Path, tmp_path: Path, source: str
) -> None:
    changes: dict[str, object] = {"pipelines": f"[{pipeline}]"}
    if source == "data set":
        changes["questions.0.hub"] = data / "nq_open"
    else:
        changes |= {"questions.0.hub": "null", "questions.0.file": "data:nq-test.csv"}
    found = ok("eval", EVAL, "--data", data, "--out", tmp_path, *_set(changes), "--json").json
    (system,) = found["systems"]
    values = {score["name"]: score["value"] for score in system["scores"]}
    assert (system["question_set"], system["split"], system["n"]) == ("nq-open", "validation", 12)
    assert {"em", "f1", "recall@1", "recall@5", "recall@20", "recall_in_context", "tokens"} <= set(values)
    assert values["recall@1"] == values["recall@20"] == 100  # BM25 finds the rare names
    again = ok("eval", EVAL, "--data", data, "--out", tmp_path, *_set(changes))
    assert "answered already" in again.err


def test_both_sources_ask_the_same_questions(data: Path, pipeline: Path, tmp_path: Path) -> None:
    """Answers do not depend on where the questions came from."""
    common = (
        "eval",
        EVAL,
        "--data",
        data,
        "--set",
        f"pipelines=[{pipeline}]",
        "--set",
        f"questions.0.hub={data}/nq_open",
    )
    ok(*common, "--out", tmp_path / "set")
    file = ("--set", "questions.0.hub=null", "--set", "questions.0.file=data:nq-test.csv")
    ok(*common, *file, "--out", tmp_path / "csv")
    (one,), (two,) = ([*(tmp_path / name).rglob("answers.jsonl")] for name in ("set", "csv"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"questions.0.split": "dev"}, "does not load"),
        ({"questions.0.hub": "nobody/nothing"}, "does not load"),
        ({"questions.0.hub": "nowhere/at/all"}, "does not load"),
    ],
)
def test_a_data_set_that_does_not_load_is_told_in_one_line(
    data: Path, pipeline: Path, changes: dict[str, object], told: str
) -> None:
    arguments = _set({"questions.0.hub": data / "nq_open", "pipelines": f"[{pipeline}]"} | changes)
    line = refused("eval", EVAL, *arguments)
    assert line.startswith("DataError: data set ") and told in line and line.endswith("or use a file.")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"query": "who", "answer": ["x"]}, "row 1 has no text under question (found: query, answer)."),
        ({"question": " ", "answer": ["x"]}, "row 1 has no text under question (found: question, answer)."),
        ({"question": "who", "answer": "x"}, "row 1 has no list of strings under answers or answer."),
        ({"question": "who"}, "row 1 has no list of strings under answers or answer."),
    ],
)
def test_a_data_set_of_other_columns_is_told_in_one_line(
    pipeline: Path, tmp_path: Path, row: dict[str, object], told: str
) -> None:
    write_jsonl(tmp_path / "validation.jsonl", [row])
    line = refused("eval", EVAL, *_set({"questions.0.hub": tmp_path, "pipelines": f"[{pipeline}]"}))
    assert line == f"DataError: {tmp_path}/validation: {told}"


def test_the_shipped_pipeline_without_its_index_says_how_to_build_it(tmp_path: Path) -> None:
    line = refused("ask", PIPELINE, "who", "--artifacts", tmp_path)
    assert line.endswith("the index is not built yet. Build it with: odqa index indexes/nq-open.yaml")


def test_the_shipped_encoders_without_the_hub_are_told_in_one_line(data: Path, tmp_path: Path) -> None:
    """Offline and not in the cache: the name that was asked for, and why it could not be had."""
    line = refused(
        "index", INDEX, "--data", data, "--out", tmp_path / "i", "--set", "dense.question_model=nobody/nothing"
    )
    assert line.startswith("DataError: encoder 'nobody/nothing': no such folder here, and the hub does not give it")


def test_the_small_pipeline_differs_from_the_shipped_one_in_what_was_changed_alone(pipeline: Path) -> None:
    small, shipped = (yaml.safe_load(ok("check", path).out) for path in (pipeline, PIPELINE))
    assert {key for key in shipped if small[key] != shipped[key]} == {"index", "retriever", "reader"}
