"""Rows of many users in one batch: each gets its own text, its turn, its time, and leaves when nobody waits."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from odqa.errors import OdqaError
from odqa.frozen.backbone import Backbone, load_backbone
from odqa.frozen.bank import Bank
from odqa.frozen.engine import Ask, Prompted, Sampling
from odqa.frozen.local import LocalEngine
from odqa.frozen.method import create_method
from odqa.serve.errors import ApiError
from odqa.serve.limits import Limits
from odqa.serve.scheduler import Row, Scheduler
from odqa.serve.writing import Piece, Wish, Written
from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_odqa_mini

Heard = dict[int, list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scheduler")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Backbone:
    return load_backbone(str(tiny_llama(folder / "llama")), "causal", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def mini(folder: Path) -> Backbone:
    return load_backbone(str(tiny_odqa_mini(folder / "mini")), "seq2seq", device="cpu", dtype="float32")


@pytest.fixture
def scheduler(llama: Backbone) -> Iterator[Scheduler]:
    with scheduling(llama) as made:
        yield made


@contextmanager
def scheduling(backbone: Backbone, bank: Bank | None = None, **limits: Any) -> Iterator[Scheduler]:
    made = Scheduler(bank or Bank(backbone), Limits(**limits))
    try:
        yield made
    finally:
        made.close()


class Client:
    """Hands rows in, and keeps what is reported."""

    def __init__(self, scheduler: Scheduler, user: str, rows: list[Row], seconds: float | None = None) -> None:
        self.heard: Heard = {number: [] for number in range(len(rows))}
        self.ended_at: dict[int, float] = {}
        self._changed = threading.Condition()
        self.ticket = scheduler.submit(user, rows, self._report, seconds=seconds)

    def _report(self, number: int, what: Piece | Written | Exception) -> None:
        with self._changed:
            self.heard[number].append(what)
            if not isinstance(what, Piece):
                self.ended_at[number] = time.monotonic()
            self._changed.notify_all()

    def wait(self, enough: Callable[[], bool] | None = None) -> list[Any]:
        """The last report of each row, when all have ended, or when it is enough."""
        with self._changed:
            wanted = enough or (lambda: len(self.ended_at) == len(self.heard))
            assert self._changed.wait_for(wanted, timeout=60), self.heard
        return [reports[-1] if reports else None for reports in self.heard.values()]


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def rows_of(count: int, new: int = 12) -> list[Row]:
    """Texts of different lengths, greedy and sampled, some to be stopped."""
    return [
        Row(
            [41 + (7 * row + place) % 200 for place in range(1 + (5 * row) % 23)],
            Wish(
                1 + (3 * row) % new,
                temperature=0.9 * (row % 3 == 1),
                top_p=0.8,
                seed=row,
                stop=("e", " the")[: row % 2],
            ),
        )
        for row in range(count)
    ]


def solo(backbone: Backbone, row: Row, bank: Bank | None = None) -> tuple[str, tuple[int, ...], str]:
    """What the engine in this process writes for one row alone: text, tokens, how it ended."""
    wish = row.wish
    sampling = Sampling(wish.max_tokens, 1, wish.temperature, wish.top_p, wish.seed, wish.stop)
    source = Prompted(ids=row.ids, method=row.method)
    (written,) = LocalEngine(backbone, bank).generate([Ask(source, sampling)])[0]
    return written.text, written.ids, written.finish


@pytest.mark.parametrize("model", ["llama", "mini"])
def test_texts_of_many_users_are_those_that_each_gets_alone(
    model: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    backbone: Backbone = request.getfixturevalue(model)
    users = folder / f"users-{model}"
    for seed, (name, kind, settings) in enumerate(
        [
            ("a", "prompt-tuning", {"length": 3}),
            ("b", "prefix-tuning", {"length": 5}),
            ("c", "lora", {"rank": 2, "alpha": 4.0}),
        ]
    ):
        method = create_method(kind, backbone, **settings)
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in method.parameters():
                tensor.add_(torch.randn_like(tensor) * 0.2)
        method.save(users / name)
    bank = Bank(backbone, users)
    rows = [Row(row.ids, row.wish, method=[None, "a", "b", "c"][number % 4]) for number, row in enumerate(rows_of(24))]
    expected = [solo(backbone, row, Bank(backbone, users)) for row in rows]
    assert len(set(expected)) > 12, "the texts differ, or the test says little"
    with scheduling(backbone, bank, rows=7) as made:
        clients = []
        for start in range(0, 24, 3):
            clients.append(Client(made, f"user-{start}", rows[start : start + 3]))
            time.sleep(0.005)  # they come while others are written
        found = [written for client in clients for written in client.wait()]
    assert [(one.text, one.ids, one.finish) for one in found] == expected


def test_pieces_join_to_the_whole_text(scheduler: Scheduler, llama: Backbone) -> None:
    rows = [Row([50 + row], Wish(30, temperature=1.0, seed=row, stop=("th", "é"), is_shown=True)) for row in range(8)]
    client = Client(scheduler, "a", rows)
    for reports in (client.wait(), client.heard.values())[1]:
        *pieces, last = reports
        assert "".join([*(piece.text for piece in pieces), last.last.text]) == last.text
        assert not any("th" in piece.text for piece in pieces)
    assert any(len(reports) > 5 for reports in client.heard.values())


def test_one_row_of_another_user_does_not_wait_for_a_thousand(llama: Backbone) -> None:
    with scheduling(llama, rows=4) as made:
        many = Client(made, "greedy", [Row([60], Wish(10, ignores_end=True)) for _ in range(120)])
        many.wait(lambda: len(many.ended_at) > 4)
        one = Client(made, "modest", [Row([61], Wish(10, ignores_end=True))])
        one.wait()
        assert len(many.ended_at) <= 20, "it waited for a place, and not for the queue"
        many.wait()


def test_a_client_that_leaves_frees_its_places(llama: Backbone) -> None:
    with scheduling(llama, rows=2) as made:
        leaver = Client(made, "a", [Row([60], Wish(200, ignores_end=True, is_shown=True)) for _ in range(6)])
        leaver.wait(lambda: bool(leaver.heard[0]))
        leaver.ticket.cancel()
        stayer = Client(made, "a", [Row([61], Wish(3))])
        assert isinstance(stayer.wait()[0], Written)
        assert not leaver.ended_at, "nobody is told"
        assert made.load == (0, 0)
        assert 'odqa_rows_total{end="cancelled"} 6' in made.metrics.render()


def test_what_takes_too_long_ends_with_an_error_wherever_it_is(llama: Backbone) -> None:
    with scheduling(llama, rows=1) as made:
        rows = [Row([60], Wish(240, ignores_end=True)) for _ in range(3)]
        client = Client(made, "a", rows, seconds=0.05)
        for error in client.wait():
            assert isinstance(error, ApiError) and (error.status, error.code) == (503, "timeout")
        assert isinstance(Client(made, "a", [Row([61], Wish(3))]).wait()[0], Written)


def test_queues_are_bounded(llama: Backbone) -> None:
    with scheduling(llama, rows=1, user_rows=3, waiting_rows=5, waiting_bytes=5000) as made:
        row = Row([60], Wish(240, ignores_end=True))
        busy = Client(made, "a", [row])
        until(lambda: made.load == (1, 0))
        Client(made, "a", [row] * 3)
        with pytest.raises(ApiError, match="3 texts wait already, 3 of them yours") as caught:
            made.submit("a", [row], lambda number, what: None)
        assert caught.value.status == 429 and caught.value.headers() == {"Retry-After": "1"}
        Client(made, "b", [row] * 2)
        with pytest.raises(ApiError, match="5 texts wait already, 0 of them yours"):
            made.submit("c", [row], lambda number, what: None)
        busy.ticket.cancel()
    vectors = Row((), Wish(1), vectors=torch.zeros(40, 32))
    with scheduling(llama, waiting_bytes=5000) as made, pytest.raises(ApiError, match="Too many vectors wait"):
        made.submit("a", [vectors], lambda number, what: None)


def test_the_cache_is_bounded(llama: Backbone) -> None:
    with scheduling(llama, rows=64, cache_tokens=100) as made:
        client = Client(made, "a", [Row([60] * 10, Wish(20, ignores_end=True)) for _ in range(7)])
        client.wait()
        assert 'odqa_step_rows_bucket{le="4.0"} ' in made.metrics.render()
        assert made.metrics._buckets["odqa_step_rows"][3:] == [0] * 7, "30 places a row: three rows at most"


def test_a_row_that_overflows_ends_alone(folder: Path) -> None:
    gpt2 = load_backbone(str(tiny_gpt2(folder / "gpt2")), "causal", device="cpu", dtype="float32")
    good = Row([60, 61], Wish(8))
    huge = Row((), Wish(8), vectors=torch.tensor([1e38, -3e38] * 16).expand(3, 32))
    with scheduling(gpt2) as scheduler:
        first, wrong, last = Client(scheduler, "a", [good, huge, good]).wait()
    assert isinstance(wrong, ApiError) and "numbers overflow" in str(wrong) and wrong.status == 400
    assert first.ids == last.ids == solo(gpt2, good)[1]


def test_a_step_that_fails_fails_its_rows_and_no_others(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, llama: Backbone
) -> None:
    def fail(*_args: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(scheduler._steps, "step", fail)
    (error,) = Client(scheduler, "a", [Row([60], Wish(5))]).wait()
    assert isinstance(error, ApiError) and (error.status, error.code) == (500, "engine_failed")
    assert "none left" not in str(error)
    (written,) = Client(scheduler, "a", [Row([60], Wish(5))]).wait()
    assert written.ids == solo(llama, Row([60], Wish(5)))[1]


def test_closing_finishes_what_runs_and_refuses_the_rest(llama: Backbone) -> None:
    with scheduling(llama, rows=1) as made:
        client = Client(made, "a", [Row([60], Wish(20, ignores_end=True)), Row([61], Wish(20, ignores_end=True))])
        made.drain()
        with pytest.raises(ApiError, match="shutting down"):
            made.submit("a", [Row([60], Wish(1))], lambda number, what: None)
        made.close(30)
        assert all(isinstance(written, Written) for written in client.wait())
        assert isinstance(made.call(lambda: None).exception(), OdqaError)
    with scheduling(llama, rows=1) as made:
        client = Client(made, "a", [Row([60], Wish(240, ignores_end=True)) for _ in range(50)])
        made.close(0)
        codes = {what.code for what in client.wait() if isinstance(what, ApiError)}
        assert codes == {"shutting_down"}
