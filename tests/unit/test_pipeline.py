"""The pipeline's order of stages, its passes, and what it writes down, with stages that are a few lines each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from odqa.pipeline import Pipeline
from odqa.types import Answer, Dropped, Hit, LatentContext, PackedContext, Passage, Query, TokenCosts, Trace

QUERIES = [Query("q1", "first"), Query("q2", "second"), Query("q3", "third")]


@dataclass
class WordRetriever:
    """One passage a word of the query; counts its calls."""

    calls: list[tuple[list[str], int]] = field(default_factory=list)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        self.calls.append(([query.text for query in queries], k))
        return [
            [
                Hit(Passage(f"p-{word}", f"text of {word}"), 10.0 - rank, "words")
                for rank, word in enumerate(q.text.split())
            ]
            for q in queries
        ]


class Reverse:
    """A re-ranker that turns every list around."""

    def rerank(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        return [[Hit(h.passage, float(r), "reverse") for r, h in enumerate(reversed(found), 1)][::1] for found in hits]


class PackTwo:
    """Packs the first two passages, at ten tokens each."""

    def pack(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[PackedContext]:
        return [
            PackedContext(
                query,
                "",
                tuple(found[:2]),
                10 * len(found[:2]),
                20,
                tuple(Dropped(hit.passage.id, "does not fit", 10) for hit in found[2:]),
            )
            for query, found in zip(queries, hits, strict=True)
        ]


class SayIds:
    """Answers with the ids of the packed passages."""

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        return [Answer(c.query.id, " ".join(hit.passage.id for hit in c.hits), -1.0) for c in contexts]

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        return TokenCosts(0, tuple(10 for _ in hits), None)


@dataclass
class Script:
    """A recursion that does what it is told: for pass n, one decision a query id (None if not named)."""

    passes: dict[int, dict[str, Query | PackedContext | LatentContext]]
    seen: list[tuple[int, list[str], list[str]]] = field(default_factory=list)

    def again(
        self, contexts: Sequence[PackedContext], answers: Sequence[Answer], pass_no: int
    ) -> list[Query | PackedContext | LatentContext | None]:
        self.seen.append((pass_no, [c.query.id for c in contexts], [a.text for a in answers]))
        return [self.passes.get(pass_no, {}).get(context.query.id) for context in contexts]


def answer(queries: Sequence[Query] = QUERIES, **stages: object) -> list[Trace]:
    made = Pipeline(**({"reader": SayIds(), "packer": PackTwo(), "retriever": WordRetriever()} | stages))  # type: ignore[arg-type]
    return made.answer(queries)


def stages_of(trace: Trace) -> list[tuple[str, int]]:
    return [(step.stage, step.pass_no) for step in trace.steps]


# --- one pass ---------------------------------------------------------------------------------------------------------


def test_queries_go_through_the_stages_together_and_come_back_in_order() -> None:
    retriever = WordRetriever()
    traces = answer(retriever=retriever, reranker=Reverse(), k=7)
    assert retriever.calls == [(["first", "second", "third"], 7)]
    assert [trace.query for trace in traces] == QUERIES
    assert [trace.answer.text for trace in traces] == ["p-first", "p-second", "p-third"]
    assert all(
        stages_of(trace) == [("retrieve", 1), ("rerank", 1), ("pack", 1), ("read", 1)] and trace.answer.passes == 1
        for trace in traces
    )


def test_the_reranker_decides_what_is_packed() -> None:
    (trace,) = answer([Query("q", "a b c")], reranker=Reverse())
    retrieve, rerank, pack, read = trace.steps
    assert retrieve.ids == ("p-a", "p-b", "p-c") and retrieve.scores == (10.0, 9.0, 8.0)
    assert rerank.ids == ("p-c", "p-b", "p-a")
    assert pack.ids == ("p-c", "p-b") and pack.tokens == (10, 10)
    assert pack.notes == {"tokens": 20, "budget": 20, "dropped": {"does not fit": ["p-a"]}}
    assert read.ids == () and trace.answer.text == "p-c p-b"


def test_the_trace_of_packing_says_which_window_a_passage_is_in() -> None:
    class TwoWindows(PackTwo):
        def pack(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[PackedContext]:
            return [replace(one, windows=tuple(range(1, len(one.hits) + 1))) for one in super().pack(queries, hits)]

    (trace,) = answer([Query("q", "a b")], packer=TwoWindows())
    (pack,) = [step for step in trace.steps if step.stage == "pack"]
    assert pack.notes["windows"] == [1, 2]


def test_closed_book_is_the_pipeline_without_a_retriever() -> None:
    (trace,) = answer(QUERIES[:1], retriever=None)
    assert stages_of(trace) == [("pack", 1), ("read", 1)]
    assert trace.contexts[0].hits == () and trace.answer.text == ""


def test_who_watches_gets_each_step_as_it_ends() -> None:
    """Both passes, with the answer and the context of a reading; and the traces are those of nobody watching."""
    again = Script({2: {"q1": Query("q1", "more words")}})
    seen: list[Trace] = []
    made = Pipeline(SayIds(), PackTwo(), WordRetriever(), recursion=again, max_passes=2)  # type: ignore[arg-type]
    traces = made.answer(QUERIES[:2], seen.append)
    first = [found for found in seen if found.query.id == "q1"]
    assert [len(found.steps) for found in first] == list(range(1, len(traces[0].steps) + 1))
    assert [[a.text for a in found.answers] for found in first if found.steps[-1].stage == "read"] == [
        ["p-first"],
        ["p-first", "p-more p-words"],
    ]
    assert first[-1] == traces[0] and [f for f in seen if f.query.id == "q2"][-1].answers == traces[1].answers
    assert [trace.answers for trace in made.answer(QUERIES[:2])] == [trace.answers for trace in traces]


def test_what_a_watcher_raises_ends_the_answering_between_two_stages() -> None:
    def refuse(trace: Trace) -> None:
        if trace.steps[-1].stage == "pack":
            raise InterruptedError

    class Unread(SayIds):
        def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
            raise AssertionError("the reader is not reached")

    with pytest.raises(InterruptedError):
        Pipeline(Unread(), PackTwo(), WordRetriever()).answer(QUERIES, refuse)


def test_seconds_are_shares_of_the_batch() -> None:
    traces = answer()
    assert {step.batch for trace in traces for step in trace.steps} == {3}
    for number in range(len(traces[0].steps)):
        assert len({trace.steps[number].seconds for trace in traces}) == 1 and traces[0].steps[number].seconds >= 0


def test_no_queries_give_no_traces() -> None:
    assert answer([]) == []


def test_batches_give_the_same_answers_as_all_at_once() -> None:
    pipeline = Pipeline(SayIds(), PackTwo(), WordRetriever())
    batches = list(pipeline.batches(QUERIES, 2))
    assert [len(batch) for batch in batches] == [2, 1]
    together = [trace.answer for trace in pipeline.answer(QUERIES)]
    assert [trace.answer for batch in batches for trace in batch] == together


def test_a_stage_that_loses_a_query_is_found_out() -> None:
    class Loses(SayIds):
        def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
            return super().read(contexts)[1:]

    with pytest.raises(ValueError, match="zip"):
        answer(reader=Loses())


# --- more passes ------------------------------------------------------------------------------------------------------


def test_a_second_pass_sees_new_passages() -> None:
    recursion = Script({2: {"q1": Query("q1", "new words")}})
    first, second, third = answer(recursion=recursion, max_passes=2)
    once = [("retrieve", 1), ("pack", 1), ("read", 1), ("recurse", 2)]
    assert stages_of(first) == [*once, ("retrieve", 2), ("pack", 2), ("read", 2)]
    assert [a.text for a in first.answers] == ["p-first", "p-new p-words"]
    assert [[hit.passage.id for hit in c.hits] for c in first.contexts] == [["p-first"], ["p-new", "p-words"]]
    assert first.answer.passes == 2 and first.query == QUERIES[0]  # the trace is that of the question as it was asked
    assert [stages_of(t) for t in (second, third)] == [once] * 2
    assert (first.steps[3].batch, first.steps[4].batch) == (3, 1)
    assert first.steps[3].notes == {"decision": "retrieve again", "query": "new words"}
    assert second.steps[3].notes == {"decision": "stop"}


def test_a_recursion_sees_the_last_pass_of_the_queries_that_still_run() -> None:
    recursion = Script({2: {"q3": Query("q3", "x"), "q1": Query("q1", "y z")}, 3: {"q3": Query("q3", "w")}})
    answer(recursion=recursion, max_passes=5)
    assert recursion.seen == [
        (2, ["q1", "q2", "q3"], ["p-first", "p-second", "p-third"]),
        (3, ["q1", "q3"], ["p-y p-z", "p-x"]),
        (4, ["q3"], ["p-w"]),
    ]


def test_none_stops_and_nobody_is_asked_when_all_have_stopped() -> None:
    recursion = Script({})
    traces = answer(recursion=recursion, max_passes=9)
    assert [pass_no for pass_no, _, _ in recursion.seen] == [2]
    assert all(len(trace.answers) == 1 for trace in traces)


def test_the_last_pass_is_not_followed_by_a_question_to_the_recursion() -> None:
    decisions: dict[str, Query | PackedContext | LatentContext] = {query.id: query for query in QUERIES}
    always = dict.fromkeys(range(2, 10), decisions)
    recursion = Script(dict(always))
    traces = answer(recursion=recursion, max_passes=3)
    assert [pass_no for pass_no, _, _ in recursion.seen] == [2, 3]
    assert all(len(trace.answers) == 3 and trace.answer.passes == 3 for trace in traces)
    unasked = Script(dict(always))
    answer(recursion=unasked, max_passes=1)
    assert unasked.seen == []


def test_a_packed_context_is_read_again_without_retrieving() -> None:
    hits = (Hit(Passage("own", "text"), 1.0, "recursion"),)
    retriever = WordRetriever()
    recursion = Script({2: {"q2": PackedContext(QUERIES[1], "", hits, 10, 20)}})
    _, second, _ = answer(retriever=retriever, recursion=recursion, max_passes=2)
    assert stages_of(second)[3:] == [("recurse", 2), ("read", 2)]
    assert second.steps[3].notes == {"decision": "read again", "tokens": 10}
    assert second.answer.text == "own" and second.contexts[-1].hits == hits
    assert len(retriever.calls) == 1


def test_queries_may_part_ways_within_a_pass() -> None:
    hits = (Hit(Passage("own", "text"), 1.0, "recursion"),)
    recursion = Script({2: {"q1": PackedContext(QUERIES[0], "", hits, 10, 20), "q3": Query("q3", "again")}})
    traces = answer(recursion=recursion, max_passes=2)
    assert [trace.query.id for trace in traces] == ["q1", "q2", "q3"]
    assert [trace.answer.text for trace in traces] == ["own", "p-second", "p-again"]


@dataclass
class SeesQueries(PackTwo):
    """Notes which queries it packs for."""

    seen: list[list[str]] = field(default_factory=list)

    def pack(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[PackedContext]:
        self.seen.append([query.text for query in queries])
        return super().pack(queries, hits)


def test_a_new_query_is_searched_for_and_the_question_as_asked_is_packed_and_read() -> None:
    packer = SeesQueries()
    (trace,) = answer([QUERIES[0]], packer=packer, recursion=Script({2: {"q1": Query("q1", "x y")}}), max_passes=2)
    assert packer.seen == [["first"], ["first"]]
    assert trace.contexts[1].query == QUERIES[0]


def test_what_a_second_pass_finds_is_fused_with_what_the_first_found_before_it_is_reranked() -> None:
    def new_first(found: Sequence[Sequence[Hit]]) -> list[Hit]:
        return [*found[1], *found[0]]

    stages = {"recursion": Script({2: {"q": Query("q", "c d")}}), "fuse": new_first, "max_passes": 2, "k": 3}
    (trace,) = answer([Query("q", "a b")], **stages)
    second = {step.stage: step for step in trace.steps if step.pass_no == 2}
    assert second["retrieve"].ids == ("p-c", "p-d") and second["fuse"].ids == ("p-c", "p-d", "p-a")
    assert [hit.passage.id for hit in trace.contexts[1].hits] == ["p-c", "p-d"]  # seen by the reader
    assert trace.answer.text == "p-c p-d"
    (reranked,) = answer(
        [Query("q", "a b")], reranker=Reverse(), **{**stages, "recursion": Script(stages["recursion"].passes)}
    )
    assert [hit.passage.id for hit in reranked.contexts[1].hits] == ["p-a", "p-d"]


def test_a_context_of_the_recursion_is_read_by_the_second_reader() -> None:
    class Shouts(SayIds):
        def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
            return [replace(one, text=one.text.upper()) for one in super().read(contexts)]

    hits = (Hit(Passage("own", "text"), 1.0, "recursion"),)
    recursion = Script({2: {"q1": PackedContext(QUERIES[0], "", hits, 10, 20), "q2": Query("q2", "more")}})
    first, second, _ = answer(recursion=recursion, rereader=Shouts(), max_passes=2)
    assert (first.answer.text, second.answer.text) == ("OWN", "p-more")


def test_the_first_pass_may_be_served_by_others_than_the_later_ones() -> None:
    first, later = WordRetriever(), WordRetriever()
    stages = {"retriever": later, "first_retriever": first, "reranker": Reverse(), "first_reranker": None}
    answer(QUERIES[:1], recursion=Script({2: {"q1": Query("q1", "x")}}), max_passes=2, **stages)
    assert [texts for texts, _ in first.calls] == [["first"]]
    assert [texts for texts, _ in later.calls] == [["x"]]


def test_a_recursion_that_says_why_sees_all_passes() -> None:
    class Explains(Script):
        def decide(self, passes: Sequence[Sequence[tuple[PackedContext, Answer]]], pass_no: int) -> list:
            texts = [" / ".join(answer.text for _, answer in past) for past in passes]
            last = [past[-1] for past in passes]
            found = self.again([context for context, _ in last], [answer for _, answer in last], pass_no)
            return [(one, {"so far": text}) for one, text in zip(found, texts, strict=True)]

    recursion = Explains({2: {"q1": Query("q1", "x")}})
    (trace,) = answer(QUERIES[:1], recursion=recursion, max_passes=3)
    notes = [step.notes for step in trace.steps if step.stage == "recurse"]
    assert notes == [
        {"decision": "retrieve again", "query": "x", "so far": "p-first"},
        {"decision": "stop", "so far": "p-first / p-x"},
    ]


class ReadsVectors(SayIds):
    """A reader whose handles are words; it says how long they are."""

    def read_latent(self, contexts: Sequence[LatentContext]) -> list[tuple[Answer, Mapping[str, object]]]:
        return [(Answer(c.query.id, f"from {c.handle}", -2.0), {"length": len(str(c.handle))}) for c in contexts]


def test_vectors_of_an_earlier_pass_are_read_again_by_the_reader_that_made_them() -> None:
    recursion = Script(
        {
            2: {"q1": LatentContext(QUERIES[0], "vectors"), "q3": Query("q3", "new words")},
            3: {"q1": LatentContext(QUERIES[0], "more")},
        }
    )
    first, second, third = answer(reader=ReadsVectors(), recursion=recursion, max_passes=3)
    assert stages_of(first)[3:] == [("recurse", 2), ("read latent", 2), ("recurse", 3), ("read latent", 3)]
    assert [a.text for a in first.answers] == ["p-first", "from vectors", "from more"]
    assert [a.passes for a in first.answers] == [1, 2, 3]
    assert [step.notes for step in first.steps if step.stage == "read latent"] == [{"length": 7}, {"length": 4}]
    assert first.contexts == (first.contexts[0],) * 3  # a context a pass: the one that the vectors came from
    assert recursion.seen[1][1:] == (["q3", "q1"], ["p-new p-words", "from vectors"])
    assert second.answer.text == "p-second" and third.answer.text == "p-new p-words"


def test_vectors_for_a_reader_of_text_alone_are_a_type_error_that_names_it() -> None:
    recursion = Script({2: {"q1": LatentContext(QUERIES[0], object())}})
    with pytest.raises(TypeError, match=r"pass 2.*SayIds reads text only"):
        answer(recursion=recursion, max_passes=2)
