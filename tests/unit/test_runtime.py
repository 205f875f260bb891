"""How batches are cut and run."""

import io
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from odqa.runtime import Recent, batches_by_length, progress, run_batches

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_batches_hold_rows_of_equal_padded_length_within_the_budget_of_tokens() -> None:
    # Padded to multiples of 16: 16, 48, 32, 16, 80, 32, 32; longest first, at most 64 tokens a batch or a single row.
    assert list(batches_by_length([5, 40, 17, 16, 70, 32, 20], 64, 16)) == [[4], [1], [5, 6], [2], [3, 0]]
    assert list(batches_by_length([], 64, 16)) == []


@pytest.mark.usefixtures("two_threads")
def test_every_row_has_its_turn_once_and_every_worker_works_alone() -> None:
    lengths = [7 * number % 50 + 1 for number in range(200)]
    seen: list[int] = []
    threads = set()

    def work(batch: list[int]) -> None:
        seen.extend(batch)
        threads.add((threading.get_ident(), torch.get_num_threads()))

    run_batches(work, lengths, device=CPU, batch_tokens=100)
    assert sorted(seen) == list(range(200))
    assert {count for _, count in threads} == {1}
    assert threading.get_ident() not in {ident for ident, _ in threads}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_few_rows_are_shared_out() -> None:
    batches: list[list[int]] = []
    run_batches(batches.append, [10] * 8, device=CPU, batch_tokens=10_000, step=1)
    assert sorted(len(batch) for batch in batches) == [4, 4]  # 80 tokens, 40 for each of two workers


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_batch_reaches_the_caller() -> None:
    def fail(_batch: list[int]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_batches(fail, [1, 2, 3], device=CPU)
    assert torch.get_num_threads() == 2


def test_no_rows_are_no_work() -> None:
    run_batches(lambda batch: pytest.fail(str(batch)), [], device=CPU)


def test_a_memory_keeps_what_was_stored_last() -> None:
    memory: Recent[str, int] = Recent(3)
    memory.store({"a": 1, "b": 2})
    memory.store({"c": 3, "d": 4})
    assert memory == {"b": 2, "c": 3, "d": 4}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_counts_on_a_terminal_and_is_silent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, counted in ((Terminal(), 3), (io.StringIO(), None)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress("work", 3, "things") as bar:
            assert list(bar.over("abc")) == ["a", "b", "c"]
            assert (None if bar._bar is None else bar._bar.n) == counted
        assert counted or stream.getvalue() == ""
