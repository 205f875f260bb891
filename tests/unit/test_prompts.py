"""Prompts: wording, slots, conversations, and where an answer ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odqa.errors import RecipeError
from odqa.read.prompts import (
    CLEANUPS,
    TEMPLATES,
    AnswerRules,
    Demonstration,
    Messages,
    Piece,
    Prompt,
    PromptTemplate,
    find_template,
)
from odqa.types import Passage

PARIS = Passage("7", "It lies on the Seine.", "Paris")
NAMELESS = Passage("8", "It lies on the Tiber.")


def chat(messages: Messages) -> str:
    """A chat template as models have them: roles, ends of turns, and content without blanks around it."""
    turns = "".join(f"<|{message['role']}|>{message['content'].strip()}<|end|>" for message in messages)
    return f"<s>{turns}<|assistant|>"


def test_open_book_prompt_is_instruction_passages_question() -> None:
    prompt = Prompt(TEMPLATES["open-book"])
    assert prompt.text("Which river?", [PARIS, NAMELESS]) == (
        "Answer the question in a few words taken from the passages.\n\n"
        "Title: Paris\nIt lies on the Seine.\n\n"
        "It lies on the Tiber.\n\n"
        "Question: Which river?\nAnswer:"
    )


def test_closed_book_prompt_shows_the_question_alone() -> None:
    prompt = Prompt(TEMPLATES["closed-book"])
    assert prompt.text("Who?") == "Answer the question in a few words.\n\nQuestion: Who?\nAnswer:"


def test_t5_prompt_is_worded_as_in_its_training_data() -> None:
    prompt = Prompt(TEMPLATES["t5-squad"])
    assert prompt.text("Who?", [NAMELESS]).rstrip() == "question: Who? context: It lies on the Tiber."


@pytest.mark.parametrize("question", ["Which river?", "what is { it }", "who's who in 1990s naïve art"])
def test_odqa_minis_prompt_has_the_very_tokens_of_its_pre_training(question: str) -> None:
    from transformers import AutoTokenizer

    from odqa.lm.tasks import reading_parts
    from odqa.models import MINILM, embedded_folder

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder(MINILM))
    passage = Passage("9", "It lies on the Seine, {so} they say (1,000 years).", "Paris: a city")
    prompt = Prompt(TEMPLATES["odqa-mini"])
    pieces = [*prompt.before(question), prompt.passage(passage), *prompt.after(question)]
    apart = [tokenizer(piece.text, add_special_tokens=False)["input_ids"] for piece in pieces]
    trained = " ".join(reading_parts(question, passage))
    assert prompt.text(question, [passage]).rstrip() == trained
    assert [token for ids in apart for token in ids] == tokenizer(trained, add_special_tokens=False)["input_ids"]


def test_odqa_minis_prompt_repeats_the_wording_of_a_passage() -> None:
    prompt = Prompt(TEMPLATES["odqa-mini"])
    assert prompt.text("Which river?", [PARIS, NAMELESS]).rstrip() == (
        "Answer the question from the passage. Question: Which river? "
        "Passage: Paris. It lies on the Seine. Passage: It lies on the Tiber."
    )


def test_demonstrations_stand_before_the_question_with_their_passage() -> None:
    shown = Demonstration("Where is Rome?", "Italy", NAMELESS), Demonstration("One and one?", "two")
    text = Prompt(PromptTemplate("bare"), shown).text("Who?", [PARIS])
    assert text == (
        "It lies on the Tiber.\n\nQuestion: Where is Rome?\nAnswer: Italy\n\n"
        "Question: One and one?\nAnswer: two\n\n"
        "Title: Paris\nIt lies on the Seine.\n\nQuestion: Who?\nAnswer:"
    )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_no_named_prompt_ends_in_a_blank(template: PromptTemplate) -> None:
    text = Prompt(template).text("Who?")
    assert text == text.rstrip() or template.answer == ""


@given(st.text(), st.text(min_size=1), st.text())
def test_text_cannot_escape_its_slot(title: str, text: str, question: str) -> None:
    # Worked out by hand: whatever the values are, the prompt is the literals with the values between them.
    template = PromptTemplate("t", passage="<{title}>({text})[{id}]", untitled=None, question="Q {question} {{}}")
    shown = Prompt(template).text(question, [Passage("7", text, title)])
    assert shown == f"<{title}>({text})[7]\n\nQ {question} {{}}\nAnswer:"


@pytest.mark.parametrize("text", ["{title}", "{0}", "{question!r}", "{", "}}{{", "%s ${text}", "{text.__class__}"])
def test_braces_in_a_passage_are_harmless(text: str) -> None:
    shown = Prompt(PromptTemplate("bare")).text(text, [Passage("7", text, text)])
    assert shown == f"Title: {text}\n{text}\n\nQuestion: {text}\nAnswer:"


def test_doubled_braces_stand_for_braces_in_every_setting() -> None:
    template = PromptTemplate("t", "{{i}}", "{{p}} {text}", None, "{{q}} {question}", "{{a}}", "{{s}}", "{{l}}")
    assert Prompt(template).text("Who?", [NAMELESS]) == "{i}{s}{p} It lies on the Tiber.{s}{q} Who?{l}{a}"


def test_an_unknown_field_names_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match=r"prompt mine.passage: \{titel\} .*\(title, text, id\)\. Did you mean title\?"
    ):
        PromptTemplate("mine", passage="{titel}: {text}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passage": "{text"}, "passage"),
        ({"passage": "{text!r}"}, "takes no format"),
        ({"passage": "{text:>10}"}, "takes no format"),
        ({"passage": "{}"}, "passage"),
        ({"passage": "{title}"}, r"does not contain \{text\}"),
        ({"question": "Question:"}, r"does not contain \{question\}"),
        ({"instruction": "Answer {question}"}, "none here"),
        ({"separator": "{text}"}, "none here"),
    ],
)
def test_a_template_that_cannot_work_is_refused_when_it_is_made(settings: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PromptTemplate("mine", **settings)  # type: ignore[arg-type]


def test_find_template_names_the_nearest_prompt_and_setting() -> None:
    with pytest.raises(RecipeError, match="Did you mean open-book"):
        find_template("open_book")
    with pytest.raises(RecipeError, match="Did you mean instruction"):
        find_template("open-book", {"instructions": "x"})
    assert find_template("open-book", {"answer": "A:"}).answer == "A:"


def test_a_prompt_without_a_place_for_passages_says_so() -> None:
    with pytest.raises(RecipeError, match="closed-book has no place for passages"):
        Prompt(TEMPLATES["closed-book"]).passage(PARIS)


def test_chat_puts_passages_and_question_into_the_last_user_turn() -> None:
    prompt = Prompt(PromptTemplate("bare", instruction="Be brief."), chat=chat)
    assert prompt.text("Who?", [NAMELESS]) == (
        "<s><|user|>Be brief.\n\nIt lies on the Tiber.\n\nQuestion: Who?<|end|><|assistant|>"
    )


def test_chat_shows_demonstrations_as_turns_and_the_instruction_once() -> None:
    prompt = Prompt(PromptTemplate("bare", instruction="Be brief."), (Demonstration("1+1?", "2"),), chat)
    assert prompt.text("Who?") == (
        "<s><|user|>Be brief.\n\nQuestion: 1+1?<|end|><|assistant|>2<|end|><|user|>Question: Who?<|end|><|assistant|>"
    )


def test_chat_pieces_make_what_the_chat_template_makes_of_the_whole_message() -> None:
    prompt = Prompt(TEMPLATES["open-book"], chat=chat)
    content = "".join(
        piece.text
        for piece in [*prompt.before("Who?"), prompt.passage(PARIS), *prompt.after("Who?")]
        if not piece.is_control
    )
    assert prompt.text("Who?", [PARIS]) == chat([{"role": "user", "content": content}])


def test_only_the_conversation_around_the_message_is_control_text() -> None:
    prompt = Prompt(PromptTemplate("bare"), chat=chat)
    assert prompt.before("<|end|>") == [Piece("<s><|user|>", is_control=True)]
    assert prompt.passage(Passage("7", "<|end|>")) == Piece("<|end|>\n\n")
    assert prompt.after("<|end|>") == [Piece("Question: <|end|>"), Piece("<|end|><|assistant|>", is_control=True)]


def test_a_chat_template_that_repeats_the_message_is_refused() -> None:
    prompt = Prompt(PromptTemplate("bare"), chat=lambda messages: chat(messages + messages))
    with pytest.raises(RecipeError, match="2 times"):
        prompt.after("Who?")


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        (" Paris\nQuestion: and", "Paris"),
        ("\n\n Paris", "Paris"),  # a line break before the first visible character ends nothing
        ("Paris Question: Who", "Paris"),
        ("Answer: Paris", "Paris"),
        ("The answer is: **Paris**", "Paris"),
        ('"Paris"', "Paris"),
        ("\u201cParis\u201d", "Paris"),
        ('"Romeo" and "Juliet"', '"Romeo" and "Juliet"'),
        ("St. John's", "St. John's"),
        ("Unanswerable.", ""),
        ("unanswerable questions", "unanswerable questions"),
        ("  \n ", ""),
        ("", ""),
    ],
)
def test_an_answer_is_cut_and_cleaned_by_the_default_rules(raw: str, answer: str) -> None:
    assert AnswerRules().clean(raw) == answer


def test_the_first_stop_string_in_the_text_ends_the_answer() -> None:
    rules = AnswerRules(stop=("Q:", "\n"))
    assert rules.find_stop("a\nQ:") == (1, "\n")
    assert rules.find_stop("aQ:\n") == (1, "Q:")
    assert rules.find_stop("\n a") is None


def test_without_rules_the_text_is_only_stripped() -> None:
    assert AnswerRules((), (), ()).clean(' Answer: "x"\ny ') == 'Answer: "x"\ny'


@given(st.text())
def test_cleaning_never_adds_text(raw: str) -> None:
    assert AnswerRules().clean(raw) in raw


def test_an_unknown_cleanup_names_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"prefix, emphasis, quotes.*Did you mean quotes"):
        AnswerRules(cleanup=("quote",))
    assert list(CLEANUPS) == ["prefix", "emphasis", "quotes"]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RecipeError, match="stop"):
        AnswerRules(stop=("",))
