"""The engine over HTTP says what the engine in process says, and counts what it costs."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from odqa.errors import DataError, ServerError
from odqa.frozen.blackbox import Classification, Labelled, SearchResult, SearchSettings, search
from odqa.frozen.engine import Ask, Engine, Prompted, Sampling, Vectors
from odqa.frozen.local import LocalEngine
from odqa.read.endpoint import Endpoint
from odqa.serve.client import HttpEngine
from odqa.serve.limits import Limits
from odqa.serve.state import Service
from tests.served import listening, service_of
from tests.tiny_models import tiny_llama

TEXTS = ["where is the seine", "paris", "who wrote the song of the river and the sea", "the book"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("engine")
    with service_of(tiny_llama(root / "llama"), root / "served", Limits(requests_a_minute=0)) as made:
        yield made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(service) as address:
        yield address


@pytest.fixture
def local(service: Service) -> LocalEngine:
    return LocalEngine(service.backbone)


@pytest.fixture
def http(url: str) -> HttpEngine:
    return HttpEngine(Endpoint(f"{url}/v1", retries=0), "llama")


def prompts(count: int, length: int = 4) -> list[Vectors]:
    return list(np.random.default_rng(1).normal(0, 0.4, (count, length, 32)).astype(np.float32))


def test_it_is_an_engine_that_says_the_same(http: HttpEngine, local: LocalEngine) -> None:
    engine: Engine = http
    same = ("fingerprint", "width", "layers", "vocabulary", "window", "embedding_spread")
    assert [getattr(engine.facts, name) for name in same] == [getattr(local.facts, name) for name in same]
    assert engine.facts.model == "llama" and not engine.facts.takes_deep
    assert engine.tokens(TEXTS) == local.tokens(TEXTS)
    np.testing.assert_array_equal(engine.embed([5, 70]), local.embed([5, 70]))


def test_scores_and_choices_are_those_in_process(http: HttpEngine, local: LocalEngine) -> None:
    known = prompts(2)
    sources = [Prompted(text, prompt=prompt) for prompt in (*known, None) for text in TEXTS]
    sources += [Prompted(prompt=known[0]), Prompted(ids=[60, 61])]
    targets = [[41 + row, 50][: 1 + row % 2] for row in range(len(sources))]
    for found, expected in zip(http.score(sources, targets), local.score(sources, targets), strict=True):
        assert found == pytest.approx(expected, abs=2e-5)  # float32 sums in another order
    tokens = [300, 41, 7]
    np.testing.assert_allclose(http.choose(sources, tokens), local.choose(sources, tokens), atol=2e-5)


def test_texts_are_those_in_process(http: HttpEngine, local: LocalEngine) -> None:
    (prompt,) = prompts(1)
    asks = [
        Ask(Prompted(text, prompt=prompt if row % 2 else None), Sampling(9, 2, 0.9, 0.8, row, ("e",), row % 3))
        for row, text in enumerate(TEXTS)
    ]
    for found, expected in zip(http.generate(asks), local.generate(asks), strict=True):
        for one, other in zip(found, expected, strict=True):
            assert (one.text, one.ids, one.finish) == (other.text, other.ids, other.finish)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert [set(place) for place in one.top] == [set(place) for place in other.top]


def test_a_server_that_joins_nothing_gets_vectors_alone(
    http: HttpEngine, local: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM: only `prompt_embeds`, only the likeliest tokens."""
    words = local.embed(range(local.facts.vocabulary or 0))
    other = HttpEngine(http.endpoint, "llama", words=words)
    monkeypatch.setattr(HttpEngine, "joins", False)
    sources = [Prompted(text, prompt=prompt) for prompt in prompts(2) for text in TEXTS]
    tokens = [int(token) for token in local.choose(sources[:1], range(400))[0].argsort()[-2:]]
    np.testing.assert_allclose(other.choose(sources[:1], tokens), local.choose(sources[:1], tokens), atol=2e-5)
    asks = [Ask(source, Sampling(6)) for source in sources]
    assert [one.text for (one,) in other.generate(asks)] == [one.text for (one,) in local.generate(asks)]
    unlikely = int(local.choose(sources[:1], range(400))[0].argmin())
    with pytest.raises(DataError, match="tells the 20 likeliest tokens"):
        other.choose(sources[:1], [unlikely])
    with pytest.raises(DataError, match="no log-probabilities behind prompts of vectors"):
        other.score(sources[:1], [[5]])


def test_what_a_server_cannot_do_is_said(http: HttpEngine, url: str) -> None:
    deep = Prompted("paris", prompt=prompts(1)[0], deep=np.zeros((2, 4, 32), dtype=np.float32))
    with pytest.raises(DataError, match="takes no deep prompts"):
        http.choose([deep], [5])
    with pytest.raises(DataError, match="shows no states"):
        http.spread([Prompted("paris")])
    with pytest.raises(DataError, match="expected \\(tokens, 32\\)"):
        http.choose([Prompted("paris", prompt=np.zeros((2, 31), dtype=np.float32))], [5])
    with pytest.raises(ServerError, match="model 'nobody' is not served here"):
        _ = HttpEngine(Endpoint(f"{url}/v1", retries=0), "nobody").facts


def test_bytes_and_seconds_are_counted(http: HttpEngine) -> None:
    before = http.spent()
    assert before == {"requests": 0, "retries": 0, "bytes_up": 0, "bytes_down": 0, "seconds": 0.0}
    (prompt,) = prompts(1, length=50)
    http.choose([Prompted(text, prompt=prompt) for text in TEXTS], [41])
    spent: dict[str, Any] = http.spent()
    assert spent["requests"] == 1, "one prompt, one request"
    # 50 x 32 float32, 4/3 of them as base64, and about a kilobyte of torch.save's archive.
    assert 50 * 32 * 4 * 4 / 3 < spent["bytes_up"] < 50 * 32 * 4 * 4 / 3 + 3000
    assert spent["bytes_down"] > 500 and 0 < spent["seconds"] < 60


def test_a_prompt_is_tuned_through_the_server_as_in_process(http: HttpEngine, local: LocalEngine) -> None:
    """CMA-ES compares losses, so numbers that differ in the last bits lead to the same prompt: ranks decide."""
    pytest.importorskip("cma", reason="black-box tuning needs the extra blackbox")
    found: list[SearchResult] = []
    for engine in (local, http):
        examples = [Labelled(Prompted(text), row % 2) for row, text in enumerate(TEXTS)]
        objective = Classification(engine, [" the", " no"], examples, examples)
        settings = SearchSettings(dimensions=6, population=4, calls=24, tune_every=2)
        found.append(search(engine, objective, 3, settings))
    first, second = found
    assert first.best.words is not None and second.best.words is not None
    np.testing.assert_allclose(second.best.words, first.best.words, atol=1e-6)
    assert [entry["calls"] for entry in second.curve] == [entry["calls"] for entry in first.curve]
    assert second.quality == pytest.approx(first.quality, abs=1e-5)
    assert http.spent()["requests"] > 24, "each prompt of a population is a request"
