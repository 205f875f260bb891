"""Search over texts: the best of what was tried on tune, within the budget, through texts alone."""

from collections.abc import Sequence
from typing import Any

import pytest

from odqa.errors import DataError
from odqa.frozen.engine import Ask, Written
from odqa.frozen.textsearch import Example, TextPrompt, TextTask, answer_all, right_share, search_texts

TRAIN = [Example(f"text {number}", "yes" if number % 2 else "no") for number in range(8)]
TUNE = [Example(f"other {number}", "yes" if number % 2 else "no") for number in range(8)]


def render(instruction: str, shown: Sequence[Example], text: str) -> str:
    return "\n".join([instruction, *(f"{one.text}: {one.answer}" for one in shown), f"{text}:"])


class Api:
    """A text API that answers right if the prompt shows example 3 last, under an instruction with "please"."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, asks: Sequence[Ask]) -> list[list[Written]]:
        return [[Written(self._answer(str(ask.source.text)), (1,), (0.0,), "stop")] for ask in asks]

    def _answer(self, text: str) -> str:
        self.asked.append(text)
        *before, last = text.split("\n")
        number = int(last.split()[1].rstrip(":"))
        knows = "please" in before[0] and before[-1].startswith("text 3")
        return ("yes" if number % 2 else "no") if knows else "no"


def task(**changes: Any) -> TextTask:
    settings: dict[str, Any] = {"train": TRAIN, "tune": TUNE, "render": render}
    settings |= {"is_right": lambda written, answer: written == answer, **changes}
    return TextTask(**settings)


def find(api: Any, **changes: Any) -> Any:
    return search_texts(
        api, task(), ["answer", "please answer", "say"], **{"calls": 80, "demonstrations": 3, **changes}
    )


def test_it_finds_instruction_demonstration_and_order_within_the_budget() -> None:
    api = Api()
    result = find(api)
    assert result.best.instruction == "please answer" and result.best.shown[-1] == 3
    assert result.quality == 1.0 and result.calls <= 80
    assert [entry["tune"] for entry in result.curve] == sorted(entry["tune"] for entry in result.curve)
    # At most eight texts a call, and eight a trial on tune; less where a prompt shows some.
    assert len(api.asked) <= 8 * (result.calls + result.tune_calls)
    assert answer_all(api, task(), result.best, ["other 1", "other 2"]) == ["yes", "no"]  # type: ignore[arg-type]


def test_the_same_seed_tries_the_same() -> None:
    first, second = Api(), Api()
    assert find(first, seed=4) == find(second, seed=4) and first.asked == second.asked
    third = Api()
    find(third, seed=5)
    assert third.asked != first.asked


def test_an_example_that_is_shown_is_not_asked_about() -> None:
    api = Api()
    right_share(api, task(), TextPrompt("answer", (3, 5)), TRAIN)  # type: ignore[arg-type]
    assert sorted(text.split("\n")[-1] for text in api.asked) == [f"text {number}:" for number in (0, 1, 2, 4, 6, 7)]


def test_bad_input_is_one_clear_error() -> None:
    for changes, message in (
        ({"calls": 2}, "budget of 2 calls is smaller than the first round, one for each of 3 instructions"),
        ({"demonstrations": 8}, "8 demonstrations of 8 training examples leave nothing to ask about"),
    ):
        with pytest.raises(DataError, match=message):
            find(Api(), **changes)
    api: Any = Api()
    with pytest.raises(DataError, match="there are no instructions"):
        search_texts(api, task(), [], calls=9)
    with pytest.raises(DataError, match="there are no tune examples"):
        search_texts(api, task(tune=[]), ["a"], calls=9)
    with pytest.raises(DataError, match="an instruction is there twice"):
        search_texts(api, task(), ["a", "a"], calls=9)
