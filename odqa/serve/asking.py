"""Questions of all users, answered one after the other by one pipeline: who is next, and what is told meanwhile.

    asker.submit("alice", "who wrote it?", report)     # from any thread; `report` is called from the pipeline's
    ...                                                # job.cancel() when the client has left

One thread owns the pipeline: its models and tokenizers are not made to be entered twice at once, and two readings at
once would take twice as long each. Users take turns; a user's own questions are answered in their order. What may wait
is bounded (`odqa.serve.limits`). Between two stages a question that was cancelled or is overdue is let go.

What is told of a question is JSON (`odqa.serve.told`): one step after each stage, then the answer or an exception.
"""

import logging
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odqa.errors import DataError
from odqa.serve.errors import ApiError, bad, closing, too_late
from odqa.serve.limits import Limits
from odqa.serve.marks import Mark, Marks
from odqa.serve.metrics import Metrics
from odqa.serve.told import answer_told, step_told
from odqa.types import PackedContext, Trace

if TYPE_CHECKING:
    from odqa.jobs import Loaded
    from odqa.recipes import Places

Json = dict[str, Any]
News = Json | Exception
Report = Callable[[News], None]

_KEPT = 1000  # our choice: answers that can still be marked, over all users
_FOLDERS = re.compile(r"(?<!\S)/(?:[^\s/]+/)+(?=[^\s/])")
_STAGE_SECONDS = 60  # our choice: how long the end waits for a stage that runs

log = logging.getLogger("odqa.serve")


class Job:
    """A question that was handed in. After `cancel` nothing more is reported."""

    def __init__(self, user: str, question: str, report: Report, *, with_trace: bool, seconds: float) -> None:
        self.id = f"ask-{secrets.token_hex(12)}"
        self.user, self.question, self.with_trace, self.seconds = user, question, with_trace, seconds
        self._report = report
        self.arrived = time.monotonic()
        self.is_cancelled = False

    @property
    def age(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self.arrived

    def cancel(self) -> None:
        self.is_cancelled = True

    def tell(self, news: News) -> None:
        if not self.is_cancelled:
            self._report(news)


class _LetGo(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class _Answered:
    """What a mark needs to know of an answer."""

    user: str
    mark: Mark


class Asker:
    """See the module. `close` ends its thread; nothing else may use the pipeline meanwhile."""

    def __init__(self, loaded: "Loaded", marks: Marks, limits: Limits, metrics: Metrics | None = None) -> None:
        self.loaded, self.marks, self.limits = loaded, marks, limits
        self.metrics = Metrics() if metrics is None else metrics
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by user, whose turn comes first first
        self._running: Job | None = None
        self._answered: OrderedDict[str, _Answered] = OrderedDict()  # by the question's id, the oldest first
        self._changed = threading.Condition()
        self._is_closing = self._is_over = False
        self.metrics.gauges["odqa_asks_waiting"] = lambda: self.waiting
        self._thread = threading.Thread(target=self._run, name="odqa-asker", daemon=True)
        self._thread.start()

    # --- for any thread ---

    @property
    def waiting(self) -> int:
        """Questions that wait for their turn."""
        return sum(len(queue) for queue in list(self._waiting.values()))

    def submit(self, user: str, question: str, report: Report, *, with_trace: bool = False) -> tuple[Job, int]:
        """Hand in a question; how many are before it. Raises ApiError if there is no room or nothing is asked."""
        if not question.strip():
            raise bad("The question is empty. Ask something.", "question")
        job = Job(user, question, report, with_trace=with_trace, seconds=self.limits.request_seconds)
        with self._changed:
            if self._is_closing:
                raise closing()
            own, before = len(self._waiting.get(user, ())), self.waiting
            if own >= self.limits.user_asks or before >= self.limits.waiting_asks:
                said = f"{before} questions wait already, {own} of them yours. Ask again later."
                raise ApiError(429, said, code="queue_full", wait=1)
            self._waiting.setdefault(user, deque()).append(job)
            self._changed.notify()
            return job, before + (self._running is not None)

    def mark(self, user: str, ask_id: str, *, is_right: bool) -> Mark:
        """Keep what a user says of an answer that they got. Raises ApiError for one that is not known (any more)."""
        with self._changed:
            found = self._answered.get(ask_id)
        if found is None or found.user != user:
            said = "This answer is not known here (any more). Ask the question again, and mark the new answer."
            raise ApiError(404, said, code="unknown_ask")
        return self.marks.add(user, found.mark, is_right=is_right)

    def drain(self) -> None:
        """Take nothing more; what was taken is finished."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def close(self, seconds: float = 0.0) -> None:
        """`drain`, wait for at most so many seconds, and fail what is left; a stage that runs is not interrupted."""
        self.drain()
        self._thread.join(seconds)
        with self._changed:
            self._is_over = True
            left = [job for queue in self._waiting.values() for job in queue]
            self._waiting.clear()
            self._changed.notify()
        if (running := self._running) is not None:
            running.tell(closing())
            running.cancel()
        for job in left:
            self._end(job, "refused", closing())
        self._thread.join(_STAGE_SECONDS)

    # --- the pipeline's thread ---

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._answer(job)
            finally:
                self._running = None

    def _next(self) -> Job | None:
        """The next question in turn; None: there will be none."""
        with self._changed:
            while not self._waiting and not self._is_closing:
                self._changed.wait()
            if self._is_over or not self._waiting:
                return None
            user, queue = self._waiting.popitem(last=False)
            self._running = queue.popleft()
            if queue:
                self._waiting[user] = queue  # behind the others
            return self._running

    def _answer(self, job: Job) -> None:
        """From a question to its last news."""
        waited = job.age
        try:
            self._check(job)
            trace = self.loaded.ask(job.question, lambda so_far: self._tell(job, so_far))
        except _LetGo:
            self._end(job, "cancelled", None)
        except ApiError as error:
            self._end(job, "timeout" if error.code == "timeout" else "refused", error)
        except DataError as error:
            self._end(job, "refused", bad(_told(error), "question", code="bad_question"))
        except Exception:  # a defect: it costs this question, not the thread that answers all others
            log.exception("asking failed", extra={"event": "failed", "ask": job.id})
            said = f"Internal error; the log has it under {job.id}."
            self._end(job, "failed", ApiError(500, said, code="internal_error"))
        else:
            self._keep(job, trace)
            told = {"event": "answer", "id": job.id, **answer_told(trace, with_trace=job.with_trace)}
            times = {"waited": round(waited, 6), "seconds": round(job.age - waited, 6)}
            self._end(job, "answered" if trace.answer.text else "abstained", told | times)

    def _tell(self, job: Job, so_far: Trace) -> None:
        self._check(job)
        job.tell(step_told(so_far, None if self.loaded.index is None else self.loaded.index.store))

    def _check(self, job: Job) -> None:
        """Raises _LetGo or ApiError where there is no use in going on."""
        if job.is_cancelled:
            raise _LetGo
        if job.age > job.seconds:
            raise too_late(job.seconds)

    def _end(self, job: Job, how: str, news: News | None) -> None:
        self.metrics.count("odqa_asks_total", end=how)
        self.metrics.observe("odqa_ask_seconds", job.age)
        if news is not None:
            job.tell(news)

    def _keep(self, job: Job, trace: Trace) -> None:
        """Remember an answer until it is marked, or too many came after it."""
        recipe, context = self.loaded.recipe, trace.contexts[-1]
        prompt, continuation = self._prompt(trace, context)
        mark = Mark(
            ask=job.id,
            recipe=recipe.hash,
            question=job.question,
            answer=trace.answer.text,
            passage_ids=tuple(hit.passage.id for hit in context.hits),
            prompt=prompt,
            continuation=continuation,
        )
        with self._changed:
            self._answered[job.id] = _Answered(job.user, mark)
            while len(self._answered) > _KEPT:
                self._answered.popitem(last=False)

    def _prompt(self, trace: Trace, context: PackedContext) -> tuple[str | None, str | None]:
        """The one text that a generative reader answered from, and the answer as it follows it; else None twice."""
        from odqa.read.lm import LmReader

        reader: object = self.loaded.pipeline.reader
        is_one = len(context.by_window()) == 1 and len(trace.answers) == 1 and bool(trace.answer.text)
        if not isinstance(reader, LmReader) or reader.passages == "apart" or not is_one:
            return None, None
        text = reader.prompt.text(context.query.text, [hit.passage for hit in context.hits])
        return text, reader.continuation(trace.answer.text)


def _told(error: DataError) -> str:
    """What a stage says of a question, for whoever asked it: the names of files without their folders."""
    said = _FOLDERS.sub("", str(error)).removeprefix("query question: ")
    return said[:1].upper() + said[1:]


def load_asker(
    recipe: str, folder: Path, limits: Limits, metrics: Metrics, *, build: bool = False, places: "Places | None" = None
) -> Asker:
    """Open a pipeline and begin to answer. `build` makes its index first if it is missing.

    Raises what `odqa.jobs.load_pipeline` raises: errors of recipe, index or models, each one line.
    """
    from odqa.jobs import load_pipeline

    def tell(line: str) -> None:
        log.info("loading", extra={"event": "loading", "said": line})

    return Asker(load_pipeline(recipe, build=build, places=places, log=tell), Marks(folder), limits, metrics)
