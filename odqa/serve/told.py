"""What is told of a question as JSON values: a step as it ends, and the answer with its evidence.

Places of the answer in a passage are told as numbers of characters (Unicode's, not UTF-16's), never as markup: texts of
a collection are data, and stay as they are.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from odqa.runs import answer_to_json, timing_to_json, trace_to_json
from odqa.text import answer_spans
from odqa.types import Answer, Candidate, PackedContext, Passage, Step, Trace

if TYPE_CHECKING:
    from odqa.corpus.store import PassageStore

Json = dict[str, Any]
_LISTED = 10  # our choice: passages that are named of a ranking


def step_told(trace: Trace, store: "PassageStore | None") -> Json:
    """The last step of a trace.

    All have `stage`, `pass`, `seconds`, `notes`. A ranking has the `count` of its passages and the first of them (id,
    title, score, source); packing has all that it packed, with texts and tokens; reading has answer and evidence.
    """
    step = trace.steps[-1]
    told: Json = {
        "event": "step",
        "stage": step.stage,
        "pass": step.pass_no,
        "seconds": None if math.isnan(step.seconds) else round(step.seconds, 6),
        "notes": _plain(step.notes),
    }
    if step.stage.startswith("read"):
        return told | _reading(trace)
    if step.stage == "pack":
        return told | {"count": len(step.ids), "passages": _packed(step, store)}
    if step.ids:
        return told | {"count": len(step.ids), "passages": _ranked(step, store)}
    return told


def answer_told(trace: Trace, *, with_trace: bool = False) -> Json:
    """The answer of the last pass. `with_trace`: with all that a run folder keeps of a question."""
    told = {"question": trace.query.text, **_reading(trace), "passes": trace.answer.passes}
    if with_trace:
        told |= {"trace": trace_to_json(trace), "timings": timing_to_json(trace)["steps"]}
    return told


def _reading(trace: Trace) -> Json:
    said = answer_to_json(trace)
    del said["id"], said["passage_ids"]
    context = trace.contexts[-1]
    packed = next((step for step in reversed(trace.steps) if step.stage == "pack"), None)
    prices = {} if packed is None else dict(zip(packed.ids, packed.tokens, strict=True))
    return {
        "answer": said,
        "tokens": context.tokens,
        "budget": context.budget,
        "evidence": _evidence(context, trace.answer, prices),
    }


def _evidence(context: PackedContext, answer: Answer, prices: Mapping[str, int]) -> list[Json]:
    """The packed passages in reading order, the kept text of each.

    `found`: where the reader took the answer from, if it says so. `marks`: that place, and all others where the
    answer's words stand.
    """
    first = answer.candidates[0] if answer.candidates and answer.text else None
    evidence = []
    for rank, hit in enumerate(context.hits, start=1):
        told = {
            **_passage(hit.passage),
            "rank": context.ranks[rank - 1] if context.ranks else rank,
            "score": _number(hit.score),
            "source": hit.source,
            "tokens": prices.get(hit.passage.id),
        }
        spans = set(answer_spans(hit.passage.text, [answer.text])) if answer.text else set()
        place = _place(first, hit.passage)
        if place is not None:
            told["found"] = list(place)
            spans.add(place)
        evidence.append(told | {"marks": [list(span) for span in sorted(spans)]})
    return evidence


def _place(found: Candidate | None, passage: Passage) -> tuple[int, int] | None:
    """Where a candidate stands in a passage, if it was taken from it as it was packed last."""
    if found is None or found.passage_id != passage.id or found.start is None or found.end is None:
        return None
    is_there = passage.text[found.start : found.end].casefold() == found.text.casefold()
    return (found.start, found.end) if is_there else None


def _packed(step: Step, store: "PassageStore | None") -> list[Json]:
    """As they are in the collection; a passage that was trimmed is told with its kept text when it has been read."""
    rows = zip(step.ids, step.scores, step.tokens, strict=True)
    return [
        {**_passage(_look_up(store, passage_id)), "score": _number(score), "tokens": tokens}
        for passage_id, score, tokens in rows
    ]


def _ranked(step: Step, store: "PassageStore | None") -> list[Json]:
    rows = zip(step.ids[:_LISTED], step.scores, step.sources or ("",) * len(step.ids), strict=False)
    return [
        {"id": passage_id, "title": _look_up(store, passage_id).title, "score": _number(score), "source": source}
        for passage_id, score, source in rows
    ]


def _look_up(store: "PassageStore | None", passage_id: str) -> Passage:
    return Passage(passage_id, "") if store is None else store[store.row_of(passage_id)]


def _passage(passage: Passage) -> Json:
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Notes as JSON can say them: what is not a number is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value
