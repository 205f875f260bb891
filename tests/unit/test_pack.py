"""The greedy packer, with a reader that charges a token a word."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odqa.errors import DataError, RecipeError
from odqa.pack import PRICED_AT_ONCE, GreedyPacker, show_passages
from odqa.pack.duplicates import resemblance
from odqa.pack.trim import GAP, Cut, Found, ModelScores, SentenceTrimmer, TermOverlap, term_weights
from odqa.sentences import split_sentences
from odqa.stages import Packer
from odqa.types import Answer, Dropped, Hit, PackedContext, Passage, Query, TokenCosts
from tests.unit.conformance_read import HITS, QUERIES, PackerConformance, ranked

QUESTION = Query("q", "who built it")


class WordReader:
    """Charges one token a word, and one a passage for its separator; remembers which passages were priced."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.priced: list[str] = []

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        self.priced += [hit.passage.id for hit in hits if hit.passage.id]  # the empty passage has no name
        fixed = len(query.text.split())
        prices = [1 + len(hit.passage.title.split()) + len(hit.passage.text.split()) for hit in hits]
        limit = self.limit
        fits = (price if limit is None or fixed + price <= limit else None for price in prices)
        return TokenCosts(fixed, tuple(fits), limit)

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        return [Answer(context.query.id, "", 0.0) for context in contexts]


class TestGreedyPackerConforms(PackerConformance):
    @pytest.fixture
    def make(self) -> Callable[[int], GreedyPacker]:
        return lambda budget: GreedyPacker(WordReader(), budget)


class TestReversedPackerConforms(PackerConformance):
    @pytest.fixture
    def make(self) -> Callable[[int], GreedyPacker]:
        return lambda budget: GreedyPacker(WordReader(), budget, 2, "reverse")


class TestWindowPackerConforms(PackerConformance):
    @pytest.fixture
    def make(self) -> Callable[[int], GreedyPacker]:
        return lambda budget: GreedyPacker(WordReader(limit=100), budget, windows=2)

    def test_never_exceeds_the_share_of_a_window(self, make: Callable[[int], Packer]) -> None:
        for context in make(60).pack(QUERIES, HITS):
            for hits in context.by_window():
                costs = WordReader(limit=100).costs(context.query, hits)
                assert costs.fixed + sum(price or 0 for price in costs.passages) <= 30


class TestTrimmingPackerConforms(PackerConformance):
    @pytest.fixture
    def make(self) -> Callable[[int], GreedyPacker]:
        return lambda budget: GreedyPacker(WordReader(), budget, duplicates="near", trim=SentenceTrimmer(2))


def passage(name: str, words: int) -> Passage:
    """A passage of this many words that no other name shares; its price is one more."""
    return Passage(name, " ".join([name] * words))


def pack(budget: int, *passages: Passage, reader: WordReader | None = None, **settings: object) -> PackedContext:
    packer = GreedyPacker(reader or WordReader(), budget, **settings)  # type: ignore[arg-type]
    return packer.pack([QUESTION], [ranked(*passages)])[0]


def kept(context: PackedContext) -> str:
    return "".join(hit.passage.id for hit in context.hits)


def test_packs_in_order_of_score_while_passages_fit() -> None:
    context = pack(3 + 5 + 5, passage("a", 4), passage("b", 4), passage("c", 4))
    assert kept(context) == "ab"
    assert context.tokens == 13


def test_skips_a_passage_that_does_not_fit_and_goes_on() -> None:
    context = pack(3 + 5 + 4, passage("a", 4), passage("b", 9), passage("c", 3))
    assert kept(context) == "ac"
    assert context.dropped == (Dropped("b", "does not fit", 10),)
    assert context.tokens == 12


def test_reverse_order_puts_the_best_passage_next_to_the_question() -> None:
    context = pack(100, passage("a", 4), passage("b", 4), passage("c", 4), order="reverse")
    assert kept(context) == "cba"


def test_drops_duplicates_before_counting_tokens() -> None:
    reader = WordReader()
    copies = [
        Passage("a", "The Tower of\nLondon", "one"),
        Passage("b", "the tower  of london ", "two"),
        passage("c", 2),
    ]
    context = pack(3 + 6 + 3, *copies, reader=reader)
    assert kept(context) == "ac"
    assert context.dropped == (Dropped("b", "duplicate", 0),)
    assert "b" not in reader.priced


def test_drops_a_second_hit_with_the_same_id() -> None:
    context = pack(100, passage("a", 2), Passage("a", "other words"))
    assert kept(context) == "a"
    assert context.dropped[0].reason == "duplicate"


def test_packs_at_most_max_passages_and_asks_for_no_more_prices() -> None:
    reader = WordReader()
    context = pack(100, *(passage(name, 2) for name in "abcde"), reader=reader, max_passages=2)
    assert kept(context) == "ab"
    assert [drop.reason for drop in context.dropped] == ["over the limit"] * 3
    assert reader.priced == ["a", "b"]


def test_the_readers_own_limit_holds_below_the_budget() -> None:
    # Window of 10: question 3, a 4; b (4) would make 11.
    context = pack(1000, passage("a", 3), passage("b", 3), reader=WordReader(limit=10))
    assert kept(context) == "a"
    assert (context.tokens, context.budget) == (7, 1000)


def test_a_passage_that_the_reader_can_never_read_whole_does_not_fit() -> None:
    context = pack(1000, passage("a", 50), passage("b", 3), reader=WordReader(limit=10))
    assert kept(context) == "b"
    assert context.dropped == (Dropped("a", "does not fit", 0),)


def test_does_not_price_a_hundred_passages_when_four_fit() -> None:
    # Each costs 21, so four fit beside the question in 3 + 4 * 21 + 10, and the 10 left are too few for any other.
    reader = WordReader()
    names = [f"p{number:03}" for number in range(100)]
    context = pack(97, *(passage(name, 20) for name in names), reader=reader)
    assert [hit.passage.id for hit in context.hits] == names[:4]
    assert len(reader.priced) == PRICED_AT_ONCE
    reasons = [drop.reason for drop in context.dropped]
    assert reasons == ["does not fit"] * (PRICED_AT_ONCE - 4) + ["over the limit"] * (100 - PRICED_AT_ONCE)


def test_prices_a_late_passage_that_is_short_enough_to_fit() -> None:
    reader = WordReader()
    names = [f"p{number:03}" for number in range(50)]
    context = pack(97, *(passage(name, 20) for name in names), passage("tiny", 1), reader=reader)
    assert context.hits[-1].passage.id == "tiny"
    assert len(reader.priced) == PRICED_AT_ONCE + 1


def test_a_question_over_the_budget_names_query_tokens_and_budget() -> None:
    with pytest.raises(DataError, match=r"query q: the question alone takes 3 tokens .* the\s+budget is 2"):
        pack(2, passage("a", 1))


def test_shows_title_and_text_of_packed_passages_only() -> None:
    context = pack(8, Passage("a", "It is {old}.", "Tower"), passage("b", 50), Passage("c", "x"))
    assert context.text == "Tower\nIt is {old}."


def test_shows_the_context_as_the_reader_words_it_if_it_can() -> None:
    class Wording(WordReader):
        def show(self, hits: Sequence[Hit]) -> str:
            return " | ".join(hit.passage.text for hit in hits)

    assert pack(100, Passage("a", "one"), Passage("b", "two"), reader=Wording()).text == "one | two"


def test_show_passages_of_nothing_is_empty() -> None:
    assert show_passages(()) == ""


# --- orders -----------------------------------------------------------------------------------------------------------


def test_sides_put_the_best_passages_at_both_ends() -> None:
    context = pack(100, *(passage(name, 2) for name in "abcde"), order="sides")
    assert kept(context) == "acedb"


# --- windows ----------------------------------------------------------------------------------------------------------


def windows(context: PackedContext) -> list[str]:
    return ["".join(hit.passage.id for hit in hits) for hits in context.by_window()]


def test_a_passage_goes_into_the_first_window_that_has_room() -> None:
    # Two windows of 16 with a question of 3 each. a (6) and b (6) fill the first to 15; c (8) opens the second; d (5)
    # is too long for the 1 left in the first and makes the second 16; e (2) fits nowhere.
    passages = (passage("a", 5), passage("b", 5), passage("c", 7), passage("d", 4), passage("e", 1))
    context = pack(32, *passages, reader=WordReader(limit=100), windows=2)
    assert windows(context) == ["ab", "cd"]
    assert context.windows == (1, 1, 2, 2)
    assert (context.tokens, context.budget) == (15 + 16, 32)
    assert [drop.passage_id for drop in context.dropped] == ["e"]


def test_a_later_passage_may_fill_an_earlier_window() -> None:
    # Windows of 12: a (6) leaves 3 in the first, b (8) opens the second, c (3) goes back into the first.
    context = pack(24, passage("a", 5), passage("b", 7), passage("c", 2), reader=WordReader(limit=100), windows=2)
    assert windows(context) == ["ac", "b"]
    assert context.ranks == (1, 3, 2)


def test_each_window_is_no_longer_than_the_readers() -> None:
    context = pack(1000, *(passage(name, 4) for name in "abc"), reader=WordReader(limit=8), windows=2)
    assert windows(context) == ["a", "b"]
    assert context.tokens == 16


def test_the_order_is_kept_within_a_window() -> None:
    context = pack(26, *(passage(name, 4) for name in "abcd"), reader=WordReader(limit=100), windows=2, order="reverse")
    assert windows(context) == ["ba", "dc"]
    assert context.ranks == (2, 1, 4, 3)


def test_a_window_that_nothing_is_left_for_costs_nothing() -> None:
    context = pack(100, passage("a", 4), reader=WordReader(limit=100), windows=4)
    assert (windows(context), context.tokens) == (["a"], 3 + 5)


def test_the_context_shows_the_windows_one_after_the_other() -> None:
    context = pack(20, passage("a", 4), passage("b", 4), reader=WordReader(limit=100), windows=2)
    assert context.text == "a a a a\n\nb b b b"


def test_one_window_is_as_no_window() -> None:
    passages = [passage(name, 4) for name in "abcd"]
    assert pack(16, *passages, windows=1) == pack(16, *passages)
    assert pack(16, *passages).windows == ()


def test_a_question_longer_than_its_share_of_the_budget_is_told() -> None:
    with pytest.raises(DataError, match="takes 3 tokens with its prompt, the budget is 8 for 4 windows"):
        pack(8, passage("a", 1), reader=WordReader(limit=100), windows=4)


def test_a_reader_that_sees_passages_apart_has_no_windows() -> None:
    with pytest.raises(RecipeError, match="sees every passage apart already"):
        pack(100, passage("a", 1), windows=2)
    with pytest.raises(ValueError, match="windows is 0"):
        GreedyPacker(WordReader(), 100, windows=0)


def test_a_reader_of_passages_apart_still_pays_for_a_question_alone() -> None:
    class Apart(WordReader):
        """Charges the question with every passage; without one, the question."""

        def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
            together = super().costs(query, hits)
            prices = (price and together.fixed + price for price in together.passages)
            return TokenCosts(0 if hits else together.fixed, tuple(prices), None)

    assert pack(100, passage("a", 4), passage("b", 2), reader=Apart()).tokens == 8 + 6
    assert pack(5, passage("a", 4), reader=Apart()).tokens == 3  # it does not fit: the question is read alone
    with pytest.raises(DataError, match="question alone takes 3 tokens"):
        pack(2, passage("a", 1), reader=Apart())


# --- near duplicates --------------------------------------------------------------------------------------------------

TOWER = "the tower was built by william in the year of the conquest"


def test_resemblance_is_the_share_of_common_shingles() -> None:
    # "a b c d" has the shingles abc, bcd; "b c d e" has bcd, cde: one of three is common.
    assert resemblance("a b c d", "B, c d: e!") == pytest.approx(1 / 3)
    assert resemblance("a b", "a b") == 1
    assert resemblance("a b", "b a") == 0
    assert resemblance("", "?") == 1


def test_a_near_duplicate_of_a_packed_passage_is_left_out_unless_told_otherwise() -> None:
    copies = [Passage("a", TOWER), passage("b", 3), Passage("c", TOWER + " of england")]
    assert kept(pack(100, *copies)) == "abc"
    context = pack(100, *copies, duplicates="near")
    assert kept(context) == "ab"
    assert context.dropped == (Dropped("c", "near duplicate", 0),)


def test_what_counts_as_near_is_a_setting() -> None:
    # 10 shingles of 12 words; 12 shingles of 14 words; 10 of 12 are common.
    copies = [Passage("a", TOWER), Passage("c", TOWER + " of england")]
    assert kept(pack(100, *copies, duplicates="near", resemblance=10 / 12)) == "a"
    assert kept(pack(100, *copies, duplicates="near", resemblance=0.84)) == "ac"


def test_a_passage_like_one_that_did_not_fit_is_packed() -> None:
    # Room for 12 beside the question of 3: the long one costs 15, its near duplicate 12.
    context = pack(15, Passage("a", TOWER + " of england"), Passage("b", TOWER.removeprefix("the ")), duplicates="near")
    assert kept(context) == "b"


# --- trimming ---------------------------------------------------------------------------------------------------------

ROME = Passage("rome", "Rome is old. The bridge was built by Fabricius. It has two arches. People who love it visit.")


def test_term_weights_are_inverse_document_frequencies_among_the_hits() -> None:
    weights = term_weights(Query("q", "Who built it?"), ranked(Passage("a", "It rains."), Passage("b", "It snows.")))
    # "it" is in 2 of 2: ln(1 + 0.5 / 2.5); the others in none: ln(1 + 2.5 / 0.5).
    assert weights == pytest.approx({"it": 0.18232, "built": 1.79176, "who": 1.79176}, abs=1e-5)


def forms(*passages: Passage, rank: int = 0, **settings: int | None) -> list[str]:
    """What is offered of a hit, in this order."""
    hits = ranked(*passages)
    trimmer = SentenceTrimmer(**settings)  # type: ignore[arg-type]
    (scores,) = TermOverlap().scores([Cut(Found(QUESTION, hits), rank)])
    whole = [hits[rank].passage.text] if trimmer.is_offered_whole(rank) else []
    return list(dict.fromkeys([*whole, *(hit.passage.text for hit in trimmer.forms(hits[rank], scores))]))


def test_offers_the_whole_passage_then_ever_fewer_of_its_best_sentences() -> None:
    # Of "who built it": sentence 4 has who and it, 2 has built, 3 has it, 1 nothing. With one hit that has all three
    # terms, all weigh the same.
    assert forms(ROME, sentences=3) == [
        ROME.text,
        "The bridge was built by Fabricius. It has two arches. People who love it visit.",
        "The bridge was built by Fabricius. … People who love it visit.",
        "People who love it visit.",
    ]


def test_keeps_neighbours_and_marks_gaps_only_between_sentences() -> None:
    assert forms(ROME, sentences=1, around=1) == [ROME.text, "It has two arches. People who love it visit."]
    assert forms(ROME, sentences=4) == forms(ROME, sentences=3)


def test_only_the_first_hits_are_offered_whole() -> None:
    other = Passage("other", "Who built it? Nobody knows.")
    assert forms(ROME, other, rank=1, sentences=1, whole=1) == ["Who built it?"]
    assert forms(ROME, other, rank=0, sentences=1, whole=1)[0] == ROME.text


def test_a_passage_without_the_questions_terms_keeps_its_beginning() -> None:
    assert forms(Passage("a", "One. Two. Three."), sentences=2) == ["One. Two. Three.", "One. Two.", "One."]


@pytest.mark.parametrize("text", ["", "no full stop", "Only one."])
def test_what_cannot_be_trimmed_is_offered_once(text: str) -> None:
    assert forms(Passage("a", text)) == [text]


def test_a_passage_that_does_not_fit_whole_is_packed_with_its_best_sentences() -> None:
    # Question 3, whole 1 + 18; the best two sentences with the mark between them 1 + 12, the best one 1 + 5.
    whole, two, one = (pack(budget, ROME, trim=SentenceTrimmer(2)) for budget in (22, 16, 15))
    assert whole.hits[0].passage is ROME
    assert two.hits[0].passage == Passage("rome", "The bridge was built by Fabricius. … People who love it visit.")
    assert two.tokens == 3 + 13 == two.budget
    assert one.hits[0].passage.text == "People who love it visit."
    assert pack(8, ROME, trim=SentenceTrimmer(2)).dropped[0].passage_id == "rome"


class Model:
    """Scores a sentence by its letters h, and remembers what it was asked in each call."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, Passage]]] = []

    def score_pairs(self, pairs: Sequence[tuple[Query, Passage]]) -> list[float]:
        self.calls.append([(query.id, passage) for query, passage in pairs])
        return [float(passage.text.count("h")) for _, passage in pairs]


def test_a_model_chooses_the_sentences_and_is_shown_each_under_the_title_of_its_passage() -> None:
    # h: "Rome is old." 0, "The bridge was built ..." 1, "It has two arches." 2, "People who love it visit." 1.
    rome, model = Passage("rome", ROME.text, "City"), Model()
    context = pack(3 + 2 + 5, rome, trim=SentenceTrimmer(1, scorer=ModelScores(model)))
    assert context.hits[0].passage == Passage("rome", "It has two arches.", "City")
    assert model.calls == [[("q", Passage("rome", sentence, "City")) for sentence in split_sentences(ROME.text)]]
    # The question's terms choose another one.
    assert pack(3 + 2 + 5, rome, trim=SentenceTrimmer(1)).hits[0].passage.text == "People who love it visit."


def test_a_model_is_asked_once_a_round_and_only_for_passages_that_have_to_be_cut() -> None:
    # Question 3, whole 1 + 18. The first query packs ROME whole, and nothing more has room; the second has to cut it
    # and still has room for a sentence of another one; the third has no hits at all.
    model = Model()
    packer = GreedyPacker(WordReader(), 24, trim=SentenceTrimmer(1, scorer=ModelScores(model)))
    other = Passage("other", "One two four. " + "Four five six seven eight nine ten eleven twelve. " * 3)
    queries = [
        Query("fits", "who built it"),
        Query("cut", "who built it then and there"),
        Query("none", "who built it"),
    ]
    contexts = packer.pack(queries, [ranked(ROME), ranked(ROME, other), []])
    assert [[hit.passage.text for hit in context.hits] for context in contexts] == [
        [ROME.text],
        ["It has two arches.", "Four five six seven eight nine ten eleven twelve."],
        [],
    ]
    assert [[name for name, _ in call] for call in model.calls] == [["cut"] * 4, ["cut"] * 4]


def test_behind_its_depth_a_model_is_not_asked_and_terms_choose() -> None:
    # Two passages of 1 + 18, room for neither: of the first the model chooses, of the second the question's terms.
    model = Model()
    trim = SentenceTrimmer(1, scorer=ModelScores(model, depth=1))
    context = pack(3 + 5 + 6, ROME, Passage("again", f"{ROME.text} Rome!"), trim=trim)
    assert [hit.passage.text for hit in context.hits] == ["It has two arches.", "People who love it visit."]
    assert len(model.calls) == 1 and {passage.id for _, passage in model.calls[0]} == {"rome"}
    with pytest.raises(ValueError, match="depth is 0"):
        ModelScores(model, depth=0)


def test_the_sentences_of_several_queries_are_scored_together() -> None:
    model = Model()
    packer = GreedyPacker(WordReader(), 15, trim=SentenceTrimmer(1, scorer=ModelScores(model)))
    queries = [Query(name, "who built it") for name in "abc"]
    together = packer.pack(queries, [ranked(ROME)] * 3)
    assert len(model.calls) == 1 and len(model.calls[0]) == 12
    apart = [packer.pack([query], [ranked(ROME)])[0] for query in queries]
    assert together == apart


def test_what_has_no_shorter_form_is_not_scored() -> None:
    model = Model()
    packer = GreedyPacker(WordReader(), 10, trim=SentenceTrimmer(3, scorer=ModelScores(model)))
    (context,) = packer.pack([QUESTION], [ranked(passage("a", 20))])
    assert model.calls == []
    assert context.dropped == (Dropped("a", "does not fit", 21),)


def test_no_answer_is_found_across_a_gap() -> None:
    from odqa.text import has_answer

    text = f"He met Marie{GAP}Curie was there."
    assert has_answer(text, ["Curie was"]) and not has_answer(text, ["Marie Curie"])


def test_trimming_prices_a_few_passages_of_a_hundred() -> None:
    # Whole 1 + 20, trimmed 1 + 10: four whole and one trimmed fit beside the question in 3 + 4 * 21 + 11.
    reader = WordReader()
    names = [f"p{number:03}" for number in range(100)]
    found = [Passage(name, " ".join(["Built"] + [name] * 8 + ["it."] + ["Then"] + [name] * 9)) for name in names]
    context = pack(98, *found, reader=reader, trim=SentenceTrimmer(1))
    assert [hit.passage.id for hit in context.hits] == names[:5]
    assert context.tokens == 98
    assert context.hits[4].passage.text.startswith("Built p004") and "Then" not in context.hits[4].passage.text
    assert len(reader.priced) <= 2 * PRICED_AT_ONCE


@pytest.mark.parametrize("settings", [{"sentences": 0}, {"around": -1}, {"whole": -1}])
def test_a_trimmer_refuses_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SentenceTrimmer(**settings)  # type: ignore[arg-type]


# --- whatever comes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"budget": 0}, {"max_passages": 0}, {"order": "random"}, {"duplicates": "no"}, {"resemblance": 0.0}],
)
def test_refuses_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GreedyPacker(WordReader(), **{"budget": 10, **settings})  # type: ignore[arg-type]


passages = st.lists(
    st.builds(
        Passage,
        st.text("abcdefgh", min_size=1, max_size=2),
        st.lists(st.sampled_from(["x", "y", "Y", "river"]), max_size=12).map(" ".join),
        st.sampled_from(["", "title", "two words"]),
    ),
    max_size=40,
)


@given(passages, st.integers(3, 80), st.none() | st.integers(1, 5), st.none() | st.integers(3, 60))
def test_whatever_the_hits_the_context_is_within_budget_complete_and_in_order(
    found: list[Passage], budget: int, most: int | None, limit: int | None
) -> None:
    hits = ranked(*found)
    reader = WordReader(limit)
    (context,) = GreedyPacker(reader, budget, most).pack([QUESTION], [hits])
    # Within budget, and the total is the sum of the prices.
    prices = reader.costs(QUESTION, context.hits)
    assert context.tokens == prices.fixed + sum(price or 0 for price in prices.passages)
    assert context.tokens <= min(budget, limit or budget)
    assert most is None or len(context.hits) <= most
    # Complete: every hit is kept or dropped, with its reason.
    names = [hit.passage.id for hit in context.hits] + [drop.passage_id for drop in context.dropped]
    assert sorted(names) == sorted(passage.id for passage in found)
    # In order of score, no text twice.
    ranks = [hit.score for hit in context.hits]
    assert ranks == sorted(ranks, reverse=True)
    texts = [" ".join(hit.passage.text.casefold().split()) for hit in context.hits]
    assert len(set(texts)) == len(texts)


sentences = st.sampled_from(["It rains.", "Who built it?", "The river is long.", "x.", "Built by x."])
prose = st.lists(
    st.builds(
        Passage,
        st.text("abcdefgh", min_size=1, max_size=2),
        st.lists(sentences, max_size=6).map(" ".join),
        st.sampled_from(["", "two words"]),
    ),
    max_size=30,
)
trimmers = st.builds(SentenceTrimmer, st.integers(1, 4), around=st.integers(0, 2), whole=st.none() | st.integers(0, 5))


@given(prose, st.integers(3, 60), trimmers, st.sampled_from(["exact", "near"]), st.none() | st.integers(1, 4))
def test_whatever_is_trimmed_the_context_is_within_budget_complete_and_made_of_whole_sentences(
    found: list[Passage], budget: int, trim: SentenceTrimmer, duplicates: Literal["exact", "near"], most: int | None
) -> None:
    reader = WordReader()
    packer = GreedyPacker(reader, budget, most, "sides", duplicates=duplicates, trim=trim)
    hits = ranked(*found)
    (context,) = packer.pack([QUESTION], [hits])
    assert packer.pack([QUESTION], [hits]) == [context]
    # What is packed is what the reader sees, to the token.
    prices = reader.costs(QUESTION, context.hits)
    assert context.tokens == prices.fixed + sum(price or 0 for price in prices.passages) <= budget
    names = [hit.passage.id for hit in context.hits] + [drop.passage_id for drop in context.dropped]
    assert sorted(names) == sorted(passage.id for passage in found)
    # The score says which hit it was; kept text is sentences of that passage in their order, or all of it.
    for hit in context.hits:
        origin = found[round(-hit.score)]
        assert (hit.passage.id, hit.passage.title) == (origin.id, origin.title)
        remaining = iter(split_sentences(origin.text))
        assert all(sentence in remaining for part in hit.passage.text.split(GAP) for sentence in split_sentences(part))


def test_importing_the_packer_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, odqa.pack, odqa.read.prompts; print({'torch', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
