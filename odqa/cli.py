"""The command line: parses options, calls `odqa.jobs`, prints.

The result goes to stdout, progress and evidence to stderr. Exit codes: 0 ok, 1 an expected number was missed or
`doctor` misses something, 2 bad input (one line says what). Imports that take time happen inside the commands:
`odqa --help` loads no model library.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from odqa.errors import DataError, OdqaError, RecipeError

if TYPE_CHECKING:
    from odqa.jobs import EvaluationResult
    from odqa.recipes import Places
    from odqa.types import Trace

_HELP = "Open-domain question answering on frozen language models: index a Wikipedia dump, ask, evaluate, train."
_EMBEDDED = "pipelines/embedded.yaml"

_Name = TypeVar("_Name", bound=str)
_MATCHERS: tuple[Literal["string", "regex", "characters"], ...] = ("string", "regex", "characters")

app = typer.Typer(
    name="odqa",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Data = Annotated[
    Path | None, typer.Option("--data", help="The data folder that data:NAME in recipes means [env: ODQA_DATA].")
]
Artifacts = Annotated[
    Path | None,
    typer.Option("--artifacts", help="Where indexes and trained parts lie [env: ODQA_ARTIFACTS; ./artifacts]."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=C", help="Change one setting for this call (packer.budget=512); may be repeated."
    ),
]
Share = Annotated[
    bool,
    typer.Option("--share/--no-share", help="Take equal leading stages from finished runs, or compute all again."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        import odqa

        _print(odqa.__version__)
        raise typer.Exit


@app.callback(help=_HELP)
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print it.")
    ] = False,
) -> None:
    """Options of odqa itself; `--version` is done when they are read."""


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A recipe of any kind.")], changes: Set = None, as_json: Json = False
) -> None:
    """Validate a recipe, of an evaluation its pipelines too; print it with all defaults, and its hash."""
    from odqa.config import EvalRecipe
    from odqa.recipes import load_recipe, load_variants

    checked = load_recipe(recipe, changes=changes or ())
    if isinstance(checked.settings, EvalRecipe):
        load_variants(checked)
    if as_json:
        _print_json({"recipe": checked.resolved, "hash": checked.hash})
        return
    import yaml

    _print(yaml.safe_dump(checked.resolved, sort_keys=False, allow_unicode=True, width=120) + f"# hash: {checked.hash}")


@app.command()
def index(
    recipe: Annotated[str, typer.Argument(help="An index recipe, such as indexes/embedded.yaml.")],
    dump: Annotated[
        str | None, typer.Option(help="A MediaWiki dump (.xml, .xml.bz2) instead of the recipe's passages.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The index folder [artifacts/RECIPE].")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A damaged dump is an error, not a partial collection.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many processes read a dump [one a core]. The index is the same.")
    ] = None,
    data: Data = None,
    artifacts: Artifacts = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Build an index from a dump or passages; resumes after a kill.

    Makes the text store, BM25 and vectors that the recipe asks for, in DIR/artifacts/RECIPE or --out.
    """
    from odqa import jobs
    from odqa.recipes import load_recipe

    loaded = load_recipe(recipe, "index", changes=changes or ())
    built = jobs.build_index(
        loaded, places=_places(data, artifacts), dump=dump, out=out, strict=strict, processes=processes, log=_log
    )
    if as_json:
        _print_json({"path": str(built.path), "passages": len(built.store), "manifest": dict(built.artifact.manifest)})
    else:
        _print(str(built.path))


@app.command()
def ask(
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe; may be left out.")],
    question: Annotated[str | None, typer.Argument(help="The question.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No evidence on stderr.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also each pass: its candidates, and what it changed.")
    ] = False,
    passes: Annotated[
        int | None, typer.Option(min=1, help="At most so many passes of the recipe's recursion; 1: none [the recipe].")
    ] = None,
    build: Annotated[bool, typer.Option("--build", help="Build the index first if it is missing.")] = False,
    data: Data = None,
    artifacts: Artifacts = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Answer one question, and show the evidence.

    The answer is on stdout, the evidence and the stages' times are on stderr. With the question alone, the embedded
    pipeline answers, and builds its index if it is missing.
    """
    from odqa import jobs, report

    if question is None:
        pipeline, question, build = _EMBEDDED, pipeline, True
    if not question.strip():
        raise DataError("the question is empty. Ask something.")
    recipe = jobs.load_with_passes(pipeline, passes, changes=changes or ())
    loaded = jobs.load_pipeline(recipe, places=_places(data, artifacts), build=build, log=_log)
    trace = loaded.ask(question)
    if as_json:
        _print_json(_trace_json(trace))
        return
    _print(trace.answer.text)
    if not quiet:
        sys.stderr.write("\n" + report.evidence(trace, terminal=sys.stderr.isatty(), verbose=verbose))


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe.")],
    questions: Annotated[str, typer.Argument(help='jsonl with {"id", "question"}, or DPR\'s question/answers csv.')],
    out: Annotated[Path | None, typer.Option(help="The run folder [runs/PIPELINE/QUESTIONS].")] = None,
    build: Annotated[bool, typer.Option("--build", help="Build the index first if it is missing.")] = False,
    share: Share = True,
    data: Data = None,
    artifacts: Artifacts = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Answer a file of questions into a run folder; resumes after a kill."""
    from odqa import jobs

    places = _places(data, artifacts)
    out = out or Path("runs") / Path(pipeline).stem / Path(questions).name.split(".")[0]
    made = jobs.run(pipeline, questions, out, places=places, build=build, changes=changes or (), share=share, log=_log)
    if as_json:
        _print_json({"path": str(made.path), "manifest": dict(made.manifest)})
    else:
        _print(str(made.path))


@app.command("eval")
def evaluate(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN",
            help="An eval recipe, such as eval/nq-mini.yaml; a finished run folder; or another system's run: DPR "
            "retrieval json, Pyserini's, FlashRAG's intermediate_data.json, a TREC run (.trec, .run, .txt).",
        ),
    ],
    questions: Annotated[
        str | None, typer.Option(help="For a run: the question file with its answers; DPR's json may do without.")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(help="For another system's run without texts: an index recipe or folder that has its passages."),
    ] = None,
    matcher: Annotated[
        str, typer.Option(help="For a run: string; regex where answers are patterns; characters for Chinese.")
    ] = "string",
    tag: Annotated[str | None, typer.Option(help="For a TREC file that holds several runs: which one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the folder RECIPE/PIPELINE-VERSION/SET goes [runs].")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Also write the report, FILE.md and FILE.json, and its figure if it has one.")
    ] = None,
    share: Share = True,
    data: Data = None,
    artifacts: Artifacts = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Answer and score question sets; exit 1 if a number is missed.

    Recall, recall in context, EM, F1, and where each answer was lost. A missing index is built first. Of another
    system's run: recall at k, and EM and F1 if it holds answers.
    """
    from odqa import jobs, report

    places = _places(data, artifacts)
    judged_by = _one_of("--matcher", matcher, _MATCHERS)
    if _is_run_file(recipe, places):
        from odqa import foreign

        if save is not None or changes or not share:
            raise RecipeError("--save, --set and --no-share go with an eval recipe, not with a run. Leave them out.")
        found = foreign.score_rankings(recipe, questions, index=index, matcher=judged_by, tag=tag, places=places)
        name = Path(recipe).name
        if as_json:
            record = found.to_json()
            _print_json({key: record[key] for key in ("question_set", "matcher", "interval", "scores", "notes")})
        else:
            _print(report.score_table(name, [(name, found)]).text())
        return
    if index is not None or tag is not None:
        raise RecipeError("--index and --tag go with another system's run file. Leave them out.")
    if questions is not None:
        found = jobs.score(Path(recipe), questions, places=places, matcher=judged_by)
        _print_json(found.to_json()) if as_json else _print(report.render([(recipe, found)]))
        return
    if judged_by != "string":
        raise RecipeError("--matcher goes with a run; an eval recipe names it beside its questions. Leave it out.")
    result = jobs.run_evaluation(recipe, places=places, out=out, changes=changes or (), share=share, log=_log)
    _report(result, save, as_json)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN|INDEX|FILE", help="A run folder, an index, a file of questions or examples.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write; gzipped if its name ends in .gz.")],
    file_format: Annotated[
        str, typer.Option("--format", help="trec, dpr, pyserini, flashrag, dpr-training or dpr-embeddings.")
    ],
    questions: Annotated[
        str | None, typer.Option(help="For a run, unless to trec: the question file with the gold answers.")
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="For training examples: an index recipe or folder that has their passages.")
    ] = None,
    stage: Annotated[
        str, typer.Option(help="For a run: whose ranking: final, retrieve, rerank or pack, of the first pass.")
    ] = "final",
    matcher: Annotated[
        str, typer.Option(help="For a run: who decides has_answer: string, regex (CuratedTREC) or characters.")
    ] = "string",
    tag: Annotated[str | None, typer.Option(help="For trec: the name of the run [that of its folder].")] = None,
    data: Data = None,
    artifacts: Artifacts = None,
) -> None:
    """Write a run, an index or a file as other systems read it.

    A run: trec, dpr (retrieval json), pyserini, flashrag. An index: dpr (tsv), pyserini, flashrag (jsonl), its vectors
    dpr-embeddings. A question file: dpr (csv), flashrag. Training examples: dpr-training.
    """
    from odqa import foreign

    written = foreign.export(
        source,
        out,
        _one_of("--format", file_format, foreign.EXPORT_FORMATS),
        questions=questions,
        index=index,
        stage=_one_of("--stage", stage, foreign.STAGES),
        tag=tag,
        matcher=_one_of("--matcher", matcher, _MATCHERS),
        places=_places(data, artifacts),
    )
    _log(f"{written:,} records")
    _print(str(out))


@app.command()
def mine(
    recipe: Annotated[str, typer.Argument(help="A mining recipe, such as pipelines/rankings-hybrid.yaml.")],
    out: Annotated[Path | None, typer.Option(help="The artifact folder [artifacts/RECIPE].")] = None,
    data: Data = None,
    artifacts: Artifacts = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Rank passages for training questions: hard negatives; resumes after a kill."""
    from odqa import training

    made = training.mine(recipe, places=_places(data, artifacts), out=out, changes=changes or (), log=_log)
    if as_json:
        _print_json({"path": str(made.path), "manifest": dict(made.manifest)})
    else:
        _print(str(made.path))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A training recipe, such as pipelines/span-reader-lora.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="The artifact folder [artifacts/RECIPE; with --sweep artifacts/RECIPE-sweep].")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="RATES",
            help="Compare learning rates (0.01,0.03,0.1; around: five around the recipe's) of a generative reader's "
            "method on tune.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="With --sweep: steps of each training [a quarter of the recipe's].")
    ] = None,
    data: Data = None,
    artifacts: Artifacts = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Train a method, reader, re-ranker, retriever or small language model; resumes after a kill.

    The artifact has the loss and the tune scores on the way: curve.json, and with matplotlib curve.svg. With --sweep
    learning rates are compared by short trainings, into RECIPE-sweep; RECIPE's own artifact is not touched.
    """
    from odqa import training

    places = _places(data, artifacts)
    if steps is not None and sweep is None:
        raise RecipeError("--steps goes with --sweep. For a whole training: --set fit.steps=N.")
    if sweep is not None:
        swept = training.sweep(
            recipe, _rates(sweep), steps=steps, places=places, out=out, changes=changes or (), log=_log
        )
        _report_sweep(swept.path, as_json)
        return
    made = training.train(recipe, places=places, out=out, changes=changes or (), log=_log)
    if as_json:
        _print_json({"path": str(made.path), "manifest": dict(made.manifest)})
    else:
        _print(str(made.path))


@app.command()
def lab(
    recipe: Annotated[str, typer.Argument(help="A lab, such as eval/lab-calm.yaml.")],
    out: Annotated[Path | None, typer.Option(help="The artifact folder [artifacts/RECIPE].")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Also write the report, FILE.md and FILE.json, and its figures.")
    ] = None,
    data: Data = None,
    artifacts: Artifacts = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Prove a paper's claim in a small world; exit 1 if a claim does not hold.

    Trains and measures everything from nothing, a few minutes a seed; a killed lab goes on with the next seed.
    """
    from odqa.labs.runner import run_lab

    result = run_lab(recipe, places=_places(data, artifacts), out=out, changes=changes or (), log=_log)
    if save is not None:
        result.save(save, _log)
    _print_json(result.to_json()) if as_json else _print(result.render())
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def explain(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    question_id: Annotated[str | None, typer.Option("--id", help="One question: its whole trace.")] = None,
    as_json: Json = False,
) -> None:
    """Show a scored run's funnel, or one question's whole trace."""
    from odqa import jobs

    _print(jobs.explain(run_folder, question_id, as_json=as_json))


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="A scored run folder.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one, on the same questions.")],
    as_json: Json = False,
) -> None:
    """Compare two scored runs: paired intervals, and what changed."""
    from odqa import jobs

    _print(jobs.diff(first, second, as_json=as_json))


@app.command()
def report(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|EVAL...", help="Scored run folders, or the folder of an evaluation (runs/RECIPE)."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file, .html or .md [report.html in the folder; of several: here].")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Questions of each set to show with their passages.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the choice of those questions.")] = 0,
    data: Data = None,
    artifacts: Artifacts = None,
    as_json: Json = False,
) -> None:
    """Write one HTML or markdown file about a run or a comparison.

    Funnel, recall and budget curves, exact match by question word and answer type, the slowest stages, and a sample of
    questions with their passages. The file needs no network.
    """
    from odqa import jobs

    written = jobs.report(sources, out, places=_places(data, artifacts), sample=sample, seed=seed)
    if as_json:
        _print_json(written.to_json())
    else:
        _print(str(written.path))


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe: what it will need is compared, too.")] = None,
    data: Data = None,
    artifacts: Artifacts = None,
    as_json: Json = False,
) -> None:
    """Look at the machine, and at what a recipe will need; exit 1 if something that is needed is missing.

    Versions, devices, processor features, extras, Java, free disk and memory; for what is missing the line that brings
    it. Nothing is installed, built or downloaded.
    """
    from odqa.doctor import examine

    diagnosis = examine(recipe, places=_places(data, artifacts))
    _print_json(diagnosis.to_json()) if as_json else _print(diagnosis.render())
    if not diagnosis.ok:
        raise typer.Exit(1)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A language model: a folder, a hub name or an embedded one.")],
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but this machine's own needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: a free one, named in the log.")] = 8000,
    folder: Annotated[Path, typer.Option(help="Where keys, marks and the users' artifacts lie.")] = Path("served"),
    pipeline: Annotated[
        str, typer.Option(metavar="RECIPE", help="The pipeline that answers at /ask and on the page at /.")
    ] = _EMBEDDED,
    ask: Annotated[bool, typer.Option("--ask/--no-ask", help="Without it there is no pipeline, and no page.")] = True,
    build: Annotated[
        bool, typer.Option("--build", help="Build the pipeline's index first if it is missing [the embedded one].")
    ] = False,
    data: Data = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model [the last part of MODEL].")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file that renders chats [the tokenizer's own template].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, float16 or auto; below float32 a text may depend on its neighbours."),
    ] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of an operation [torch's choice].")] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds in which a shutdown finishes what runs.")] = 30.0,
    open_to_all: Annotated[bool, typer.Option("--open", help="Listen on any address without keys.")] = False,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Write prompts and answers into the log.")] = False,
    rows: Annotated[int, typer.Option(min=1, help="Texts computed together.")] = 64,
    cache_tokens: Annotated[int, typer.Option(min=1, help="Tokens of their key/value cache, padding too.")] = 32_768,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts read between two steps.")] = 4096,
    waiting_rows: Annotated[int, typer.Option(min=1, help="Texts that may wait.")] = 4096,
    waiting_bytes: Annotated[int, typer.Option(min=1, help="Bytes of vectors that may wait.")] = 256 << 20,
    user_rows: Annotated[int, typer.Option(min=1, help="Texts of one user that may wait.")] = 2048,
    request_rows: Annotated[int, typer.Option(min=1, help="Texts of one request: prompts times n.")] = 1024,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Until a request is answered, or given up.")] = 120.0,
    new_tokens: Annotated[int, typer.Option(min=1, help="The largest max_tokens.")] = 1024,
    logprobs: Annotated[int, typer.Option(min=0, help="The largest logprobs and top_logprobs.")] = 20,
    requests_a_minute: Annotated[int, typer.Option(min=0, help="Of one user; 0: any number.")] = 3000,
    artifacts: Annotated[int, typer.Option(min=0, help="Artifacts a user may register.")] = 100,
    artifact_bytes: Annotated[int, typer.Option(min=1, help="Bytes of one's tensors.")] = 4 << 20,
    body_bytes: Annotated[int, typer.Option(min=1024, help="Bytes of a request's body.")] = 8 << 20,
    body_seconds: Annotated[float, typer.Option(min=0.1, help="Until a body must be there.")] = 30.0,
    reading_bytes: Annotated[int, typer.Option(min=1024, help="Bytes of all bodies under way.")] = 256 << 20,
    connections: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 1024,
    question_characters: Annotated[int, typer.Option(min=1, help="The longest question at /ask.")] = 2000,
    waiting_asks: Annotated[int, typer.Option(min=1, help="Questions that may wait for the pipeline.")] = 64,
    user_asks: Annotated[int, typer.Option(min=1, help="Questions of one user that may wait.")] = 8,
) -> None:
    """Serve a frozen language model over OpenAI's protocol: completions, chats, soft prompts, many users in one batch.

    A pipeline answers questions with their evidence: at /ask, and on a page at /.
    Log lines are JSON on stderr; the one with the event "ready" has the address. Stops at SIGTERM or Ctrl-C.
    """
    from odqa.serve.command import run_server
    from odqa.serve.limits import Limits

    limits = Limits(
        rows=rows,
        cache_tokens=cache_tokens,
        prefill_tokens=prefill_tokens,
        waiting_rows=waiting_rows,
        waiting_bytes=waiting_bytes,
        user_rows=user_rows,
        request_rows=request_rows,
        request_seconds=request_seconds,
        new_tokens=new_tokens,
        logprobs=logprobs,
        requests_a_minute=requests_a_minute,
        artifacts=artifacts,
        artifact_bytes=artifact_bytes,
        body_bytes=body_bytes,
        body_seconds=body_seconds,
        reading_bytes=reading_bytes,
        connections=connections,
        question_characters=question_characters,
        waiting_asks=waiting_asks,
        user_asks=user_asks,
    )
    run_server(
        model,
        folder,
        limits,
        host=host,
        port=port,
        name=name,
        chat_template=chat_template,
        device=device,
        dtype=dtype,
        threads=threads,
        grace=grace,
        open_to_all=open_to_all,
        log_texts=log_texts,
        pipeline=pipeline if ask else None,
        build=build or pipeline == _EMBEDDED,
        data=data,
    )


@app.command("serve-key")
def serve_key(
    user: Annotated[str, typer.Argument(help="Whose key: a-z, 0-9, - and _.")],
    folder: Annotated[Path, typer.Option(help="The folder of odqa serve.")] = Path("served"),
    revoke: Annotated[bool, typer.Option("--revoke", help="Take all keys of the user away.")] = False,
) -> None:
    """Make a key for a user of odqa serve, or revoke theirs; a running server heeds it at once.

    The key is printed once; on disk is its hash alone.
    """
    from odqa.serve.keys import Keys

    keys = Keys(folder)
    if revoke:
        _print(f"{keys.revoke(user)} revoked")
        return
    folder.mkdir(parents=True, exist_ok=True)
    _print(keys.make(user))


@app.command()
def demo(artifacts: Artifacts = None) -> None:
    """Index the embedded dump, ask, evaluate. Offline."""
    from odqa import jobs, report

    places = _places(None, artifacts)
    _log("1. the embedded dump becomes an index")
    loaded = jobs.load_pipeline("pipelines/embedded.yaml", places=places, build=True, log=_log)
    _log("2. questions are answered")
    for question in jobs.DEMO_QUESTIONS:
        trace = loaded.ask(question)
        top = trace.contexts[-1].hits[0].passage.title if trace.contexts[-1].hits else "nothing"
        _print(f"   {question}?  {trace.answer.text}  ({report.confidence(trace.answer)}; best passage: {top})")
    _log("3. the evaluation")
    result = jobs.run_evaluation("eval/embedded.yaml", places=places, log=lambda line: None)
    _report(result, None, as_json=False)


def main() -> None:
    """The entry point: errors that are the input's fault become one line and exit code 2."""
    try:
        app(prog_name="odqa")
    except OdqaError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        sys.exit(130)


def _places(data: Path | None, artifacts: Path | None) -> "Places":
    from odqa.recipes import Places

    return Places.from_environment(data, artifacts)


def _is_run_file(name: str, places: "Places") -> bool:
    """Whether `odqa eval` was given a run of another system: a file that is no recipe."""
    if Path(name).suffix in (".yaml", ".yml"):
        return False
    return Path(name).is_file() or (":" in name and places.file(name).is_file())


def _one_of(option: str, value: str, valid: Sequence[_Name]) -> _Name:
    for name in valid:
        if name == value:
            return name
    raise RecipeError(f"{option} {value}: expected one of {', '.join(valid)}.")


def _report(result: "EvaluationResult", save: Path | None, as_json: bool) -> None:
    if save is not None:
        result.save(save, _log)
    _print_json(result.to_json()) if as_json else _print(result.render())
    if not result.ok:
        raise typer.Exit(1)


def _rates(text: str) -> list[float]:
    """What --sweep says; none for "around"."""
    if text == "around":
        return []
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise RecipeError(f"--sweep {text}: expected learning rates above 0 such as 0.01,0.03,0.1, or around.")
    return rates


def _report_sweep(folder: Path, as_json: bool) -> None:
    found = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    if as_json:
        _print_json({"path": str(folder), **found})
        return
    for rate, score in sorted(found["scores"].items(), key=lambda item: float(item[0])):
        is_best = rate == f"{found['best']:g}"
        _print(f"{rate:>8}  {'diverged' if score is None else f'{score:.1f}'}{'  best' if is_best else ''}")
    _print(f"{found['metric']} after {found['steps']} steps: {folder / 'sweep.json'}")


def _trace_json(trace: "Trace") -> dict[str, Any]:
    from odqa.runs import answer_to_json, timing_to_json, trace_to_json

    return {**answer_to_json(trace), "trace": trace_to_json(trace), "timings": timing_to_json(trace)["steps"]}


def _print(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")


def _print_json(value: Any) -> None:
    _print(json.dumps(value, ensure_ascii=False, indent=1))


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
