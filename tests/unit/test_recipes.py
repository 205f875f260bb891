"""Recipes: what is accepted, what every mistake is told as, and that defaults mean what the constructors mean."""

import dataclasses
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odqa import config
from odqa.artifacts import MANIFEST
from odqa.errors import ArtifactError, DataError, RecipeError
from odqa.recipes import (
    FOLDERS,
    Places,
    check_index_recipe,
    describe_file,
    find_recipe,
    index_folder,
    load_recipe,
    load_variants,
    save_setting,
)

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.yaml"))
PIPELINE = """
kind: pipeline
index: indexes/embedded.yaml
retriever: {kind: hybrid}
reader: {kind: span, model: some/reader}
"""
EVAL = """
kind: eval
pipelines: [pipelines/a.yaml, pipelines/b.yaml]
questions:
  - {name: one, file: one.jsonl, split: dev}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


Write = Callable[[str], Path]


def mistakes(path: Path, *changes: str) -> list[str]:
    """The lines of the report, without the file's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, changes=changes)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_is_valid_and_fits_on_one_screen(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_resolved_recipe_is_the_same_recipe(path: Path, write: Write) -> None:
    recipe = load_recipe(path)
    again = load_recipe(write(yaml.safe_dump(recipe.resolved)))
    assert again.resolved == recipe.resolved and again.hash == recipe.hash


def test_every_pipeline_and_index_that_a_shipped_recipe_names_is_shipped() -> None:
    for path in SHIPPED:
        found = load_recipe(path).settings
        if isinstance(found, config.PipelineRecipe) and found.index is not None:
            assert load_recipe(ROOT / found.index, "index")
        if isinstance(found, config.EvalRecipe):
            assert all(load_recipe(ROOT / variant.recipe, "pipeline") for variant in found.pipelines)


def test_the_hash_depends_on_settings_not_on_how_they_are_written(write: Write) -> None:
    plain = load_recipe(write(PIPELINE)).hash
    assert load_recipe(write("# words\nk: 100\n" + PIPELINE)).hash == plain  # 100 is the default
    assert load_recipe(write(PIPELINE), changes=["k=99"]).hash != plain


def test_a_recipe_that_trims_by_terms_has_the_hash_that_it_had_before_there_was_a_choice(write: Write) -> None:
    trimmed = load_recipe(write(PIPELINE + "packer: {trim: {by: terms}}\n"))
    assert trimmed.resolved["packer"]["trim"] == {"sentences": 3, "around": 0, "whole": None}
    changes = ["packer.trim.by=reranker", "reranker={kind: cross-encoder, model: m}"]
    found = load_recipe(trimmed.path, changes=changes).resolved["packer"]["trim"]
    assert (found["by"], found["depth"]) == ("reranker", 4)


def test_sentences_are_scored_by_the_last_stage_of_a_cascade_which_must_read(write: Write) -> None:
    path = write(PIPELINE + "packer: {trim: {by: reranker}}\n")
    cross, scores = "{kind: cross-encoder, model: m, depth: 5}", "{kind: scores, run: r"
    assert load_recipe(path, changes=[f"reranker={{kind: cascade, stages: [{scores}}}, {cross}]}}"])
    for wrong in (f"{scores}}}", f"{{kind: cascade, stages: [{cross}, {scores}, depth: 2}}]}}"):
        (told,) = mistakes(path, f"reranker={wrong}")
        assert told.startswith("packer.trim.by is reranker, but a re-ranker of kind scores reads no sentences.")


def test_a_shipped_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("pipelines/nq-mini.yaml").is_file()
    with pytest.raises(RecipeError, match=r"pipelines/nq-mni\.yaml: no such recipe .* mean pipelines/nq-mini.yaml"):
        find_recipe("pipelines/nq-mni.yaml")
    with pytest.raises(RecipeError, match=r"no such recipe .* Shipped are eval/embedded.yaml"):
        find_recipe("qqqqqq")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_of_a_file_are_told_at_once(write: Write) -> None:
    text = """
kind: pipeline
index: i.yaml
retriever: {kind: hybrid, dpth: 5, fusion: sum}
packer: {budget: 0}
reader: {kind: span}
k: many
"""
    found = mistakes(write(text))
    assert found[0].startswith("retriever.fusion is 'sum': Input should be 'weighted' or 'rrf'")
    assert found[1] == (
        "retriever.dpth is not a setting of hybrid (kind, depth, fusion, weights, normalise, c). Did you mean depth?"
    )
    assert [line.split(":")[0] for line in found[2:]] == [
        "k is 'many'",
        "packer.budget is 0",
        "reader.model is missing.",
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "retriever.kind=bm52",
            "retriever.kind is 'bm52'; expected one of bm25, dense, hybrid, alpha-hybrid. Did you mean bm25?",
        ),
        ("retriever={depth: 5}", "retriever.kind is missing (bm25, dense, hybrid, alpha-hybrid)."),
        ("retriver=null", "retriver is not a setting of pipeline"),
        (
            "packer.bugdet=5",
            "packer.bugdet is not a setting of packer (budget, windows, max_passages, order, duplicates, resemblance, "
            "trim).",
        ),
        ("reader.kind=lm", None),  # a model is all that it needs
        ("index=null", "a hybrid retriever needs an index. Name one under index."),
        ("packer.windows=2", "packer.windows is 2, but this reader sees every passage apart. Set windows: 1."),
        ("retriever.weights=[1]", "retriever.weights.1 is missing."),
        (
            "packer.trim={by: reranker}",
            "packer.trim.by is reranker, but there is no re-ranker. Set by: terms, or name one that reads.",
        ),
        (
            "packer.trim={depth: 5}",
            "packer.trim: depth says whose sentences the re-ranker scores. Set by: reranker, or remove depth.",
        ),
        (
            "reranker={kind: cross}",
            "reranker.kind is 'cross'; expected one of cross-encoder, question-likelihood, scores, cascade.",
        ),
        ("reranker={kind: scores, rum: x, run: y}", "reranker.rum is not a setting of scores (kind, run, tag, depth)."),
        ("reranker={kind: cascade, stages: [{kind: scores, run: x}]}", "reranker.stages is [{'kind': 'scores',"),
        (
            "reranker={kind: cascade, stages: [{kind: scores, run: x}, {kind: scores, rn: x, run: y}]}",
            "reranker.stages.1.rn is not a setting of scores (kind, run, tag, depth). Did you mean run?",
        ),
        (
            "reranker={kind: cascade, stages: [{kind: scores, run: x, depth: 5}, {kind: scores, run: x, depth: 5}]}",
            "reranker: stage 1 has the depth 5, the one before 5: nothing of that one's order would be left.",
        ),
        (
            "reranker={kind: cascade, stages: [{kind: scores, run: x}, {kind: scores, run: x}]}",
            "reranker: stage 1 has the depth all, the one before all: nothing",
        ),
        ("reader.model=[1]", "reader.model is [1]: Input should be a valid string."),
    ],
)
def test_a_mistake_in_a_pipeline_names_the_place_as_the_recipe_has_it(
    write: Write, change: str, told: str | None
) -> None:
    path = write(PIPELINE)
    if told is None:
        assert load_recipe(path, changes=[change])
    else:
        (found,) = mistakes(path, change)
        assert found.startswith(told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("questions.0.hub=nq_open", "questions.0: question set one needs either a file or a data set (hub)."),
        ("questions.0.file=null", "questions.0: question set one needs either a file or a data set (hub)."),
        ("questions.0.name=../up", "questions.0.name is '../up': String should match pattern"),
        ("questions.0.expected={a: {recal@5: {value: 1}}}", "questions.0.expected: 'recal@5' is not a metric of odqa"),
        ("questions.0.expected={c: {em: {value: 1}}}", "numbers are expected of c on one; pipelines are a, b."),
        (
            "questions.0.expected={a: {em: {valu: 1, value: 1}}}",
            "questions.0.expected.a.em.valu is not a setting of em",
        ),
        ("pipelines=[x/a.yaml, y/a.yaml]", "pipelines need names of their own (found: a, a)."),
        (
            "pipelines=[{recipe: x/a.yaml, name: b}, x/b.yaml]",
            "pipelines need names of their own (found: b, b).",
        ),
        ("pipelines.1={recipe: x.yaml}", "pipelines.1.name is missing."),
        ("pipelines.1={recipe: x.yaml, name: ../up}", "pipelines.1.name is '../up': String should match pattern"),
        ("pipelines.1={recip: x.yaml, recipe: y, name: z}", "pipelines.1.recip is not a setting of pipelines"),
        ("pipelines.1=5", "pipelines.1: found 5; expected the path of a pipeline recipe, or {recipe, name, set}."),
        ("gains=[{from: a, to: c}]", "a gain names c; pipelines are a, b."),
        ("gains=[{from: a}]", "gains.0.to is missing."),
        ("gains=[{to: a}]", "gains.0.from is missing."),
        ("gains=[{from: a, to: b, form: c}]", "gains.0.form is not a setting of gains (from, to, expected). Did you"),
        ("gains=[{from: a, to: b, expected: {two: {}}}]", "a gain from a to b is expected on two; question sets are"),
        ("gains=[{from: a, to: b, expected: {one: {mrr: {value: 1}}}}]", "gains.0.expected: 'mrr' is not a metric"),
        ("published=[{name: x, metric: mrr, value: 1, source: y}]", "published.0.metric: 'mrr' is not a metric"),
        ("questions.0.expected={a: {em: {}}}", "questions.0.expected.a.em: give either a value (with a tolerance) or"),
        ("questions.0.expected={a: {em: {at_least: 1, tolerance: 2}}}", "questions.0.expected.a.em: at_least takes no"),
        ("questions=[]", "questions is []: Tuple should have at least 1 item"),
        ("recall_at=[0]", "recall_at.0 is 0: Input should be greater than or equal to 1."),
    ],
)
def test_a_mistake_in_an_evaluation_is_told_before_anything_runs(write: Write, change: str, told: str) -> None:
    (found,) = mistakes(write(EVAL), change)
    assert found.startswith(told)


def test_pipelines_of_an_evaluation_are_paths_or_variants_with_names_of_their_own(write: Write) -> None:
    variant = "{recipe: pipelines/embedded.yaml, name: small, set: {packer.budget: 160, retriever: {kind: bm25}}}"
    path = write(EVAL.replace("[pipelines/a.yaml, pipelines/b.yaml]", f"[pipelines/embedded.yaml, {variant}]"))
    recipe = load_recipe(path)
    plain, small = load_variants(recipe)
    assert (plain.name, small.name) == ("embedded", "small")
    assert isinstance(small.settings, config.PipelineRecipe) and small.settings.packer.budget == 160
    assert small.settings.retriever == config.Bm25Retriever(kind="bm25")
    assert plain.resolved == load_recipe("pipelines/embedded.yaml").resolved
    assert recipe.resolved["pipelines"][0] == "pipelines/embedded.yaml"  # a path stays one
    again = load_recipe(write(yaml.safe_dump(recipe.resolved)))
    assert again.hash == recipe.hash


def test_mistakes_of_all_variants_are_told_at_once_with_their_places(write: Write) -> None:
    wrong = "{recipe: pipelines/embedded.yaml, name: one, set: {packer.budgit: 5, k: many}}"
    lost = "{recipe: pipelines/embeded.yaml, name: two}"
    path = write(EVAL.replace("[pipelines/a.yaml, pipelines/b.yaml]", f"[{wrong}, pipelines/embedded.yaml, {lost}]"))
    with pytest.raises(RecipeError) as caught:
        load_variants(load_recipe(path))
    first, second, third = str(caught.value).splitlines()
    assert first.startswith(f"{path}: pipelines.0 (one): ") and "k is 'many'" in first
    assert second.startswith(f"{path}: pipelines.0 (one): ") and "Did you mean budget?" in second
    assert third.startswith(f"{path}: pipelines.2 (two): pipelines/embeded.yaml: no such recipe")


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"packer.budget.x": 5}, "set packer.budget.x: 'x' is to be set in"), ({"": 5}, "set : expected KEY or KEY.KEY")],
)
def test_a_setting_in_no_place_is_told(write: Write, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(write(PIPELINE + "packer: {budget: 5}\n"), settings=settings)


def test_settings_are_put_one_after_the_other_and_stay_as_they_were(write: Write) -> None:
    scores = {"kind": "scores", "run": "x"}
    recipe = load_recipe(write(PIPELINE), settings={"reranker": scores, "reranker.depth": 3})
    assert recipe.resolved["reranker"]["depth"] == 3 and scores == {"kind": "scores", "run": "x"}


def test_two_question_sets_of_one_name_are_refused(write: Write) -> None:
    text = EVAL + "  - {name: one, file: two.jsonl, split: dev}\n"
    assert mistakes(write(text)) == ["question sets need names of their own (found: one, one)."]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("k: 1\nkind: pipeline\nk: 2\n", "line 3: key 'k' is given twice. Remove one."),
        ("kind: pipeline\nreader:\n  kind: span\n  kind: lm\n", "line 4: key 'kind' is given twice. Remove one."),
        ("kind: pipeline\n1: 2\n", "line 2: key 1 is not a name. Put it into quotes if it is meant as one."),
        ("? [a]\n: 2\n", "line 1: key ['a'] is not a name."),
        ("kind: [unclosed", "not YAML: "),
        ("- kind: pipeline\n", "a recipe is a mapping with a kind; found list."),
        ("", "a recipe is a mapping with a kind; found NoneType."),
        (
            "index: x\n",
            "kind is None; expected one of index, vectors, pipeline, eval, train-span-reader, train-reranker, ",
        ),
        ("kind: [pipeline]\n", "kind is ['pipeline']; expected one of index,"),
        ("kind: !!python/object/apply:os.system [ls]\n", "not YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(write: Write, text: str, told: str) -> None:
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path)) and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_of_the_wrong_kind_is_refused(write: Write) -> None:
    with pytest.raises(RecipeError, match="of kind 'pipeline'; a recipe of kind 'index' is needed here"):
        load_recipe(write(PIPELINE), "index")
    with pytest.raises(RecipeError, match="a recipe of kind 'train' is needed here"):
        load_recipe(write(EVAL), "train")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00kind")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)


# --- a number written into a file -------------------------------------------------------------------------------------

ALPHA = """# Ours. alpha: 7 is a comment
kind: pipeline
index: indexes/x.yaml
retriever: {kind: alpha-hybrid, alpha: 1.20, depth: 1000}  # chosen on tune
reader:   {kind: span, model: "embedded:span-reader-1"} # größer
"""


def test_one_number_of_a_recipe_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(ALPHA.replace("\n", "\r\n").encode())
    save_setting(file, "retriever.alpha", 0.7)
    assert file.read_bytes() == ALPHA.replace("1.20", "0.7").replace("\n", "\r\n").encode()
    assert list(tmp_path.iterdir()) == [file]
    save_setting(file, "retriever.alpha", 0.00001)  # YAML 1.1 would read 1e-05 as a text
    assert b"alpha: 0.00001, depth" in file.read_bytes()
    save_setting(file, "retriever.alpha", 0.7)
    save_setting(file, "retriever.depth", 50)
    assert b"alpha: 0.7, depth: 50}  # chosen" in file.read_bytes()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("retriever.alpha", -1.0, "retriever.alpha is -1.0: Input should be greater than or equal to 0."),
        ("retriever.alfa", 1.0, "retriever.alfa is not a setting of alpha-hybrid"),
        ("k", 7, "k is not written there as a number"),
        ("retriever.normalise", 1, "retriever.normalise is not written there as a number"),
    ],
)
def test_a_number_that_cannot_be_replaced_leaves_the_file_as_it_is(
    tmp_path: Path, key: str, value: float, told: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(ALPHA, encoding="utf-8")
    with pytest.raises(RecipeError, match=re.escape(told)):
        save_setting(file, key, value)
    assert file.read_text(encoding="utf-8") == ALPHA
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such file to write"):
        save_setting(tmp_path / "nowhere.yaml", key, value)


FULL_WIKIPEDIA = [
    f
    for f in sorted((ROOT / "indexes").glob("nq-open*.yaml"))
    if isinstance(load_recipe(f).settings, config.IndexRecipe)
]


@pytest.mark.parametrize("file", FULL_WIKIPEDIA, ids=lambda file: file.stem)
def test_recipes_for_full_wikipedia_leave_nothing_about_their_encoder_open(file: Path) -> None:
    settings = load_recipe(file).settings
    assert isinstance(settings, config.IndexRecipe) and settings.dense is not None
    assert settings.dense.pooling != "auto"
    assert None not in (settings.dense.normalize, settings.dense.query_max_tokens, settings.dense.passage_max_tokens)
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 40


# --- changes from the command line ------------------------------------------------------------------------------------


def test_a_change_reaches_nested_settings_and_items_of_lists(write: Write) -> None:
    changes = ["packer.budget=77", "retriever.weights=[1, 0.5]", "retriever.weights.0=2", "reader={kind: lm, model: m}"]
    found = load_recipe(write(PIPELINE), changes=changes).settings
    assert isinstance(found, config.PipelineRecipe)
    assert (found.packer.budget, found.retriever) == (77, config.HybridRetriever(kind="hybrid", weights=(2, 0.5)))
    assert isinstance(found.reader, config.LmReaderSettings)


def test_a_change_may_hold_an_equals_sign_and_a_colon(write: Write) -> None:
    found = load_recipe(write(PIPELINE), changes=["reader.model=embedded:a=b"]).settings
    assert isinstance(found, config.PipelineRecipe) and isinstance(found.reader, config.SpanReaderSettings)
    assert found.reader.model == "embedded:a=b"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("k", "expected KEY=VALUE or KEY.KEY=VALUE."),
        ("=5", "expected KEY=VALUE or KEY.KEY=VALUE."),
        ("packer..budget=5", "expected KEY=VALUE or KEY.KEY=VALUE."),
        ("k.depth=5", "'depth' is to be set in 100, which is a value, not settings."),
        ("kind.x.y=5", "'x' is to be set in 'pipeline', which is a value, not settings."),
        ("retriever.weights.2=5", "'2' is not an item of the list; items are 0 to 1."),
        ("retriever.weights.²=5", "'²' is not an item of the list; items are 0 to 1."),
        ("k=[1", "'[1' is not a YAML value."),
        ("k={a: 1, a: 2}", "key 'a' is given twice. Remove one."),
    ],
)
def test_a_change_that_means_nothing_is_refused(write: Write, change: str, told: str) -> None:
    path = write(PIPELINE + "k: 100\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, changes=["retriever.weights=[1, 1]", change])
    assert told in str(caught.value) and str(caught.value).startswith(f"--set {change}: ")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "model", "k", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([PIPELINE, EVAL, "kind: index\npassages: {kind: dump, file: d}\n"]),
    changed=st.dictionaries(
        st.sampled_from(
            ["kind", "index", "retriever", "reader", "packer", "k", "questions", "passages", "bm25", "dense"]
        ),
        _VALUES,
        max_size=4,
    ),
)
def test_whatever_a_recipe_says_it_is_accepted_or_refused_as_a_recipe(
    write: Write, base: str, changed: dict[str, Any]
) -> None:
    path = write(yaml.safe_dump(yaml.safe_load(base) | changed))
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        assert str(path) in str(error)
    else:
        assert recipe.hash


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.text(alphabet="k.=[]{}:,'\"!&*0 \n²é", max_size=12))
def test_whatever_set_says_it_is_accepted_or_refused_as_a_recipe(write: Write, change: str) -> None:
    path = write(PIPELINE)
    try:
        load_recipe(path, changes=[change])
    except RecipeError:
        return


# --- defaults ---------------------------------------------------------------------------------------------------------


def _keywords(constructor: Any) -> dict[str, Any]:
    """Keyword and default of every parameter that has one."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _pairs() -> dict[str, tuple[type[config.Settings], Any, set[str]]]:
    """Settings, what they are given to, and the settings that the builder uses up or turns into something else."""
    from odqa.frozen.blackbox import SearchSettings
    from odqa.frozen.fit import FitSettings
    from odqa.pack import GreedyPacker
    from odqa.read.api import ApiReader
    from odqa.read.endpoint import Endpoint
    from odqa.read.lm import LmReader
    from odqa.read.span import SpanReader
    from odqa.read.train import GroupSettings
    from odqa.rerank.cross import CrossEncoderReranker
    from odqa.rerank.likelihood import QuestionLikelihoodReranker
    from odqa.retrieve.bm25 import Analyzer, Bm25Settings
    from odqa.retrieve.dense import EncoderSettings
    from odqa.retrieve.index import AlphaHybridRetriever, HybridRetriever
    from odqa.retrieve.train import BatchSettings
    from odqa.retrieve.vectors import VectorSettings

    backbone = {"model", "device", "dtype"}
    patience = {"timeout", "retries", "longest_wait"}
    server = {"base_url", "key_variable", "endpoint", "tokenizer", "bytes_per_token", "cache"}
    return {
        "hybrid": (config.HybridRetriever, HybridRetriever, set()),
        "alpha-hybrid": (config.AlphaHybridRetriever, AlphaHybridRetriever, {"alpha"}),
        "bm25": (config.Bm25, Bm25Settings, {"analyzer"}),
        "analyzer": (config.AnalyzerSettings, Analyzer, {"stop_words"}),
        "dense": (config.Dense, EncoderSettings, {"vectors", "question_model", "device", "method"}),
        "vectors": (config.Vectors, VectorSettings, {"search", "given"}),
        "cross-encoder": (config.CrossEncoder, CrossEncoderReranker, {"model"}),
        "likelihood": (config.QuestionLikelihood, QuestionLikelihoodReranker, {"model", "load_options"}),
        "packer": (config.PackerSettings, GreedyPacker, {"budget"}),
        "span": (config.SpanReaderSettings, SpanReader, backbone | {"backbone"}),
        "lm": (
            config.LmReaderSettings,
            LmReader,
            backbone | {"architecture", "template", "load_options", "chat_options"},
        ),
        "api": (config.ApiReaderSettings, ApiReader, server | patience | {"model", "window", "template", "options"}),
        "endpoint": (
            config.ApiReaderSettings,
            Endpoint,
            set(config.ApiReaderSettings.model_fields) - patience,
        ),
        "fit": (config.FitRecipe, FitSettings, {"steps", "learning_rates"}),
        "blackbox": (config.BlackboxTrainer, SearchSettings, set()),
        "groups": (config.GroupRecipe, GroupSettings, {"source_weights"}),
        "contrast": (config.ContrastRecipe, BatchSettings, {"source_weights"}),
    }


@pytest.mark.parametrize("name", _pairs())
def test_a_setting_that_is_left_out_means_what_the_constructor_means(name: str) -> None:
    """Python and recipes give the same stage; a setting that the constructor lacks would fail when it is built."""
    chosen, constructor, special = _pairs()[name]
    keywords = _keywords(constructor)
    for key, field in chosen.model_fields.items():
        if key == "kind" or key in special:
            continue
        assert key in keywords, f"{name}.{key} is not a keyword of {constructor.__name__}"
        assert field.get_default(call_default_factory=True) == keywords[key], key


@pytest.mark.parametrize("cls", [config.Dense, config.PackerSettings, config.LmReaderSettings])
def test_settings_do_not_change(cls: type[config.Settings]) -> None:
    made = cls.model_construct()
    with pytest.raises(ValueError, match="frozen"):
        made.dtype = "x"  # type: ignore[attr-defined]


# --- places -----------------------------------------------------------------------------------------------------------


def test_places_take_arguments_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODQA_DATA", "env-data")
    monkeypatch.setenv("ODQA_ARTIFACTS", "env-artifacts")
    assert Places.from_environment() == Places(Path("env-data"), Path("env-artifacts"))
    assert Places.from_environment(Path("d"), Path("a")) == Places(Path("d"), Path("a"))
    monkeypatch.delenv("ODQA_ARTIFACTS")
    monkeypatch.setenv("ODQA_DATA", "")
    assert Places.from_environment() == Places(None, Path("artifacts"))


def test_a_file_is_embedded_or_in_the_data_folder_or_where_it_says(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("x")
    assert Places(tmp_path).file("data:x.tsv") == tmp_path / "x.tsv"
    assert Places().file(str(tmp_path / "x.tsv")) == tmp_path / "x.tsv"
    assert Places().file("embedded:questions.jsonl").is_file()


@pytest.mark.parametrize(
    ("places", "name", "told"),
    [
        (Places(), "data:x", "data:x lies in the data folder, which is not known. Give --data DIR or set ODQA_DATA."),
        (Places(Path("nowhere")), "data:x", "The data folder itself is not there: check --data and ODQA_DATA."),
        (Places(Path()), "data:x", "data:x: no such file"),
        (Places(), "embedded:x", "embedded:x: no such file"),
        (Places(), "nowhere/x", "nowhere/x: no such file"),
    ],
)
def test_a_file_that_is_not_there_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: Places, name: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        places.file(name)
    assert told in str(caught.value)


def test_an_input_file_is_described_by_its_content_and_a_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert describe_file("data:x", tmp_path / "x") == {"name": "data:x", "sha256": expected}
    with pytest.raises(DataError, match="a folder; a file is needed"):
        describe_file("data:", tmp_path)


def test_an_index_is_named_by_its_folder_or_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder, recipe = index_folder("indexes/embedded.yaml", Places(artifacts=tmp_path))
    assert folder == tmp_path / "embedded" and recipe is not None
    folder.mkdir()
    with pytest.raises(ArtifactError, match="neither an index folder nor an index recipe"):
        index_folder(os.fspath(folder), Places())
    (folder / MANIFEST).write_text("{}")
    assert index_folder(os.fspath(folder), Places()) == (folder, None)


def test_an_index_of_other_settings_is_refused_and_one_of_another_dump_is_not() -> None:
    recipe = load_recipe(ROOT / "indexes/embedded.yaml")
    built = recipe.resolved | {"passages": {"kind": "dump", "file": "my-wiki.xml"}}
    check_index_recipe(built, recipe, Path("folder"))
    with pytest.raises(ArtifactError, match=r"folder: built with other settings of bm25, dense than .* odqa index"):
        check_index_recipe(built | {"bm25": None, "dense": None}, recipe, Path("folder"))


def test_an_index_that_is_older_than_a_setting_has_its_default() -> None:
    recipe = load_recipe(ROOT / "indexes/embedded.yaml")
    older = recipe.resolved
    older["dense"] = {key: value for key, value in older["dense"].items() if key not in ("segments", "prompts")}
    check_index_recipe(older, recipe, Path("folder"))
    changed = load_recipe(ROOT / "indexes/embedded.yaml", changes=["dense.segments=zero"])
    with pytest.raises(ArtifactError, match="other settings of dense"):
        check_index_recipe(older, changed, Path("folder"))


def test_recipes_as_values_compare_by_their_settings() -> None:
    first, second = load_recipe(ROOT / "indexes/embedded.yaml"), load_recipe(ROOT / "indexes/embedded.yaml")
    assert first == second and dataclasses.replace(first, path=Path("x")).hash == second.hash


@pytest.mark.parametrize(
    ("written", "size"), [("4 GB", 4 * 10**9), ("1500MB", 15 * 10**8), ("2.5 tb", 25 * 10**11), (10**9, 10**9)]
)
def test_a_memory_budget_is_written_with_its_unit(written: object, size: int) -> None:
    recipe = load_recipe("indexes/nq-open.yaml", settings={"memory_budget": written})
    assert isinstance(recipe.settings, config.IndexRecipe)
    assert recipe.settings.memory_budget == size


@pytest.mark.parametrize("written", ["4 GiB", "much", "-4 GB", "1e9", "999 MB", "٤ GB"])
def test_a_memory_budget_that_is_none_is_one_line(written: str) -> None:
    with pytest.raises(RecipeError, match="memory_budget") as error:
        load_recipe("indexes/nq-open.yaml", settings={"memory_budget": written})
    assert "\n" not in str(error.value)


def test_where_and_within_what_an_index_is_built_is_not_what_it_is() -> None:
    plain = load_recipe("indexes/nq-open.yaml")
    other = load_recipe("indexes/nq-open.yaml", settings={"memory_budget": "64 GB", "dense.device": "cuda:1"})
    assert other.hash == plain.hash


def test_recipes_without_refinement_keep_their_hash() -> None:
    resolved = load_recipe("indexes/nq-open.yaml").resolved["dense"]["vectors"]
    assert not {"refine", "refine_factor"} & set(resolved)
    refined = load_recipe("indexes/nq-open.yaml", settings={"dense.vectors.refine": "int8"})
    assert (
        refined.resolved["dense"]["vectors"]["refine"] == "int8"
        and refined.hash != load_recipe("indexes/nq-open.yaml").hash
    )
    with pytest.raises(RecipeError, match=r"dense\.vectors: refine is for a FAISS index"):
        load_recipe("indexes/nq-mini.yaml", settings={"dense.vectors": {"refine": "int8"}})
