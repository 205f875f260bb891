"""The ceiling of a collection: which questions have an answer in any of its passages, found or not.

No retriever over the collection can do better. It is exact, not a deep ranking: every passage is looked at, with the
matching of `has_answer`. What makes one pass enough: a question is dropped at its first passage with an answer, and an
answer is looked for only in passages that have its longest token. What is never found costs the most.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from odqa.text import Matcher, has_answer, token_string
from odqa.types import Gold

_Waiting = dict[str, list[tuple[str, str]]]  # the longest token of an answer: its token string, and whose it is


class AnswerSearch:
    """Sees the passages of a collection one by one; `found` are the ids of the questions that have had an answer.

    Questions without gold answers are never found. With the regex matcher every open question is tried on every
    passage: 40 seconds for the 694 of CuratedTREC on 48,852 passages, one or two for as many with strings.
    """

    def __init__(self, gold: Iterable[Gold], matcher: Matcher = "string") -> None:
        self.found: set[str] = set()
        self._open = {item.query_id: item.answers for item in gold if item.answers} if matcher == "regex" else {}
        self._matcher = matcher
        self._waiting = {} if matcher == "regex" else _by_longest_token(gold, matcher)

    def see(self, text: str) -> None:
        """Look for every answer that is still missing in a passage's text (without its title)."""
        if self._open:
            found = [query_id for query_id, answers in self._open.items() if has_answer(text, answers, "regex")]
            self.found.update(found)
            for query_id in found:
                del self._open[query_id]
        if self._waiting:
            haystack = token_string(text, self._matcher)
            for token in self._waiting.keys() & set(haystack.split()):
                self._look_for(token, haystack)

    def _look_for(self, token: str, haystack: str) -> None:
        self.found.update(query_id for needle, query_id in self._waiting[token] if needle in haystack)
        left = [entry for entry in self._waiting[token] if entry[1] not in self.found]
        if left:
            self._waiting[token] = left
        else:
            del self._waiting[token]


def _by_longest_token(gold: Iterable[Gold], matcher: Matcher) -> _Waiting:
    """Answers without tokens are left out: `has_answer` finds them nowhere."""
    waiting: _Waiting = defaultdict(list)
    for item in gold:
        for needle in dict.fromkeys(token_string(answer, matcher) for answer in item.answers):
            if tokens := needle.split():
                waiting[max(tokens, key=len)].append((needle, item.query_id))
    return dict(waiting)


def questions_with_answer(texts: Iterable[str], gold: Sequence[Gold], matcher: Matcher = "string") -> set[str]:
    """The ids of the questions that have an answer in one of the texts."""
    search = AnswerSearch(gold, matcher)
    for text in texts:
        search.see(text)
    return search.found
