"""Texts of all users in one batch of the frozen model: who comes in when, and what happens to those who wait too long.

    scheduler.submit("alice", rows, report, seconds=120)      # from any thread; `report` is called from the engine's
    ...                                                       # ticket.cancel() when the client has left

One thread computes. Between two steps it lets go of what has ended, was cancelled or is overdue, and takes in new rows
(continuous batching: Yu et al. 2022, Orca, OSDI) as long as there are places and cache:

- fairness: the next place goes to the user who has the fewest rows in the batch, among equals to the one who has waited
  longest for a place. A thousand rows of one user delay another's single row by the end of one row, not of a thousand;
- bounds: rows computed at once, the key/value cache they may come to need, tokens read between two steps, rows and
  bytes that wait, a user's rows, and the time that a request may take, waiting included (`odqa.serve.limits`).

A row that cannot be computed ends alone. If a step fails, all rows in it fail, and the engine begins anew.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from odqa.errors import OdqaError
from odqa.frozen.bank import Bank
from odqa.frozen.mixture import Parts
from odqa.frozen.steps import Text, make_steps
from odqa.serve.errors import ApiError, bad, closing, too_late
from odqa.serve.limits import Limits
from odqa.serve.metrics import Metrics
from odqa.serve.writing import Piece, Report, Tokens, Wish, Writer, Written

T = TypeVar("T")
log = logging.getLogger("odqa.serve")
_LOOK = 0.05  # seconds; thousands may wait


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A text to write: what it goes on from (token ids, or word vectors (T, D)), with which method, and how.

    `method` is a name in the bank. `prefix`: word vectors (P, D) before the ids; of an encoder-decoder's source, too.
    """

    ids: Sequence[int]
    wish: Wish
    vectors: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    method: str | None = None
    moved: int = 0
    """How much of the window the method takes."""

    @property
    def read(self) -> int:
        """Tokens and vectors that are read, without those of the method."""
        text = len(self.ids) if self.vectors is None else len(self.vectors)
        return text + (0 if self.prefix is None else len(self.prefix))

    @property
    def bytes(self) -> int:
        given = [vectors for vectors in (self.vectors, self.prefix) if vectors is not None]
        return sum(vectors.numel() * vectors.element_size() for vectors in given)


class Ticket:
    """What was handed in. After `cancel` nothing more is reported."""

    def __init__(self, user: str, rows: Sequence[Row], report: Report, seconds: float) -> None:
        self.user, self.rows, self.report, self.seconds = user, rows, report, seconds
        self.arrived = time.monotonic()
        self.is_cancelled = False

    @property
    def deadline(self) -> float:
        return self.arrived + self.seconds

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass(slots=True, eq=False)
class _Item:
    ticket: Ticket
    number: int
    writer: Writer
    has_ended: bool = False

    @property
    def row(self) -> Row:
        return self.ticket.rows[self.number]

    @property
    def most(self) -> int:
        """Places of the cache that it may come to need."""
        return self.row.read + self.row.wish.max_tokens


class Scheduler:
    """See the module. `close` ends its thread; nothing else may use the bank's backbone meanwhile."""

    def __init__(self, bank: Bank, limits: Limits, metrics: Metrics | None = None) -> None:
        self.bank, self.limits = bank, limits
        self.metrics = Metrics() if metrics is None else metrics
        self.tokens = Tokens(bank.backbone)
        self._steps = make_steps(bank.backbone)
        self._is_causal = bank.backbone.architecture == "causal"
        self._running: list[_Item] = []
        self._waiting: OrderedDict[str, deque[_Item]] = OrderedDict()  # by user, who waits longest first
        self._waiting_rows = self._waiting_bytes = 0
        self._looked = 0.0  # when the waiting were last asked whether they still wait
        self._open = 0  # rows handed in that have not ended, wherever they are
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._changed = threading.Condition()
        self._is_closing = self._is_over = False
        self.metrics.gauges |= {
            "odqa_rows_running": lambda: len(self._running),
            "odqa_rows_waiting": lambda: self._waiting_rows,
        }
        self._thread = threading.Thread(target=self._run, name="odqa-engine", daemon=True)
        self._thread.start()

    # --- for any thread ---

    def submit(self, user: str, rows: Sequence[Row], report: Report, *, seconds: float | None = None) -> Ticket:
        """Hand in the rows of a request; all or none are taken. Raises ApiError if there is no room for them."""
        most = self.limits.request_seconds if seconds is None else min(seconds, self.limits.request_seconds)
        ticket = Ticket(user, rows, report, most)
        items = [_Item(ticket, number, Writer(row.wish, self.tokens)) for number, row in enumerate(rows)]
        size = sum(row.bytes for row in rows)
        with self._changed:
            if self._is_closing:
                raise closing()
            own = len(self._waiting.get(user, ()))
            if own + len(rows) > self.limits.user_rows or self._waiting_rows + len(rows) > self.limits.waiting_rows:
                said = f"{self._waiting_rows} texts wait already, {own} of them yours. Ask again later, or for fewer."
                raise ApiError(429, said, code="queue_full", wait=1)
            if self._waiting_bytes + size > self.limits.waiting_bytes:
                raise ApiError(429, "Too many vectors wait already. Ask again later.", code="queue_full", wait=1)
            self._waiting.setdefault(user, deque()).extend(items)
            self._waiting_rows += len(rows)
            self._waiting_bytes += size
            self._open += len(rows)
            self._changed.notify()
        return ticket

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Let the engine's thread do something with the model, between two steps and with nothing attached."""
        future: Future[T] = Future()
        with self._changed:
            if self._is_over:
                future.set_exception(closing())
                return future
            self._calls.append((work, future))  # type: ignore[arg-type]
            self._changed.notify()
        return future

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs and takes requests."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def load(self) -> tuple[int, int]:
        """Rows that are written, and that wait."""
        return len(self._running), self._waiting_rows

    def drain(self) -> None:
        """Take nothing more; what was taken is finished."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def close(self, seconds: float = 0.0) -> None:
        """`drain`, wait for at most so many seconds, and fail what is left."""
        self.drain()
        end = time.monotonic() + seconds
        while self._thread.is_alive() and self._open and time.monotonic() < end:
            time.sleep(0.01)
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    # --- the engine's thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self._waiting or self._calls or self._is_over):
                    self._changed.wait()
                if self._is_over:
                    break
                calls, self._calls = self._calls, deque()
            for work, future in calls:
                _do(work, future)
            self._turn()
        self._fail(self._running, closing(), "refused")
        with self._changed:
            left = [item for queue in self._waiting.values() for item in queue]
            self._running, self._waiting, self._waiting_rows = [], OrderedDict(), 0
            calls, self._calls = self._calls, deque()
        self._fail(left, closing(), "refused")
        for _, future in calls:
            future.set_exception(closing())

    def _turn(self) -> None:
        """Let go, take in, step."""
        joining: list[_Item] = []
        try:
            self._drop()
            joining = self._next_rows() if self._steps.can_join else []
            if self._running:
                self._step()
            if joining:
                self._join(joining)
        except Exception:  # a defect, or memory: those who were computed cannot go on, the others can
            log.exception("step failed", extra={"event": "step_failed"})
            error = ApiError(500, "The engine failed; the text was lost. Ask again.", code="engine_failed")
            self._fail([*self._running, *joining], error, "failed")
            self._running = []
            self._steps = make_steps(self.bank.backbone)

    def _drop(self) -> None:
        """Rows that nobody waits for any more, or that took too long, wherever they are."""
        now = time.monotonic()
        gone: list[_Item] = []

        def stays(item: _Item) -> bool:
            """Asked once a row: a client may leave between two questions."""
            if item.ticket.is_cancelled or item.ticket.deadline < now:
                gone.append(item)
                return False
            return True

        places = [place for place, item in enumerate(self._running) if stays(item)]
        if len(places) < len(self._running):
            self._keep(places)
        if now > self._looked + _LOOK:
            self._looked, running = now, len(gone)
            with self._changed:
                queues = [(user, deque(item for item in queue if stays(item))) for user, queue in self._waiting.items()]
                self._waiting = OrderedDict((user, queue) for user, queue in queues if queue)
                self._take_out(gone[running:])
        for item in gone:
            is_left = item.ticket.is_cancelled
            self._fail(
                [item], None if is_left else too_late(item.ticket.seconds), "cancelled" if is_left else "timeout"
            )

    def _next_rows(self) -> list[_Item]:
        """Those who may come in now."""
        chosen: list[_Item] = []
        read = 0
        with self._changed:
            counts: dict[str, int] = {}
            for item in self._running:
                counts[item.ticket.user] = counts.get(item.ticket.user, 0) + 1
            while self._waiting and len(self._running) + len(chosen) < self.limits.rows:
                user = min(self._waiting, key=lambda name: counts.get(name, 0))  # the first of equals waits longest
                item = self._waiting[user][0]
                there = [*self._running, *chosen]
                longest = max([item.most, *(other.most for other in there)])
                if there and longest * (len(there) + 1) > self.limits.cache_tokens:
                    break
                read = max(read, item.row.read)
                if chosen and read * (len(chosen) + 1) > self.limits.prefill_tokens:
                    break
                chosen.append(self._waiting[user].popleft())
                counts[user] = counts.get(user, 0) + 1
                self._waiting.move_to_end(user)
                if not self._waiting[user]:
                    del self._waiting[user]
            self._take_out(chosen)
        return chosen

    def _take_out(self, items: Sequence[_Item]) -> None:
        self._waiting_rows -= len(items)
        self._waiting_bytes -= sum(item.row.bytes for item in items)

    def _join(self, joining: list[_Item]) -> None:
        """Read new rows, and write the first token of each."""
        items, texts = [], []
        for item in joining:
            try:
                texts.append(self._text(item.row))
                items.append(item)
            except OdqaError:
                # The bank's own words name methods of all users.
                self._fail([item], bad("The model's artifact is gone, or cannot be used.", "model"), "refused")
        if not items:
            return
        now = time.monotonic()
        logits = self._steps.join(texts)
        self._running += items
        for item in items:
            self.metrics.observe("odqa_waiting_seconds", now - item.ticket.arrived)
            self.metrics.count("odqa_prompt_tokens_total", item.row.read)
        for item, of_row in zip(items, logits, strict=True):
            if item.row.wish.of_prompt:
                item.writer.read(item.row.ids, of_row[:-1][-len(item.row.ids) :])
        self._write(items, [of_row[-1] for of_row in logits], len(self._running) - len(items))

    def _text(self, row: Row) -> Text:
        parts = self.bank.parts(row.method)
        if row.prefix is None:
            return Text(row.ids, row.vectors, parts, row.wish.of_prompt)
        prefix = row.prefix.to(self.bank.backbone.device, self.bank.backbone.model.dtype)
        if not self._is_causal:
            return Text(row.ids, row.vectors, Parts(words=prefix))
        words = self.bank.backbone.embed(torch.tensor(row.ids, dtype=torch.long, device=prefix.device))
        return Text((), torch.cat([prefix, words]), parts, row.wish.of_prompt)

    def _step(self) -> None:
        """One token more for all who are there."""
        started = time.monotonic()
        logits = self._steps.step([item.writer.ids[-1] for item in self._running])
        self._write(self._running, logits, 0)
        self.metrics.observe("odqa_step_seconds", time.monotonic() - started)
        self.metrics.observe("odqa_step_rows", len(logits))

    def _write(self, items: Sequence[_Item], logits: Sequence[torch.Tensor] | torch.Tensor, first: int) -> None:
        """Choose the next token of rows that stand from place `first` on, report, and let go of those that ended."""
        self.metrics.count("odqa_completion_tokens_total", sum(item.row.wish.max_tokens > 0 for item in items))
        stacked = logits if isinstance(logits, torch.Tensor) else torch.stack(list(logits))
        likeliest = stacked.argmax(-1).tolist()
        ended = set()
        for place, (item, of_row, best) in enumerate(zip(list(items), stacked, likeliest, strict=True), start=first):
            try:
                found = item.writer.take(of_row, best)
            except ValueError as error:
                ended.add(place)
                self._fail([item], bad(f"{str(error)[0].upper()}{str(error)[1:]}.", "prompt_embeds"), "refused")
                continue
            if isinstance(found, Written):
                ended.add(place)
                self.metrics.count("odqa_rows_total", end=found.finish)
            if found is not None:
                _tell(item, found)
            if isinstance(found, Written):
                self._end(item)
        if ended:
            self._keep([place for place in range(len(self._running)) if place not in ended])

    def _keep(self, places: list[int]) -> None:
        self._running = [self._running[place] for place in places]
        self._steps.keep(places)

    def _fail(self, items: Sequence[_Item], error: Exception | None, end: str) -> None:
        """Report why rows have no text; None: nobody is there to be told."""
        for item in items:
            if item.has_ended:
                continue
            self.metrics.count("odqa_rows_total", end=end)
            if error is not None:
                _tell(item, error)
            self._end(item)

    def _end(self, item: _Item) -> None:
        item.has_ended = True
        with self._changed:
            self._open -= 1


def _tell(item: _Item, news: "Piece | Written | Exception") -> None:
    """Report, unless nobody listens any more; who cannot be told is as good as gone."""
    if item.ticket.is_cancelled:
        return
    try:
        item.ticket.report(item.number, news)
    except Exception:  # a defect of who listens: it costs that listener, not the rows beside it
        log.exception("report failed", extra={"event": "report_failed"})
        item.ticket.cancel()


def _do(work: Callable[[], object], future: "Future[object]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:  # raised again where the future is waited for
        future.set_exception(error)
