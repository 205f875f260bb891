"""Black-box tuning: a prompt found through an inference API alone, by evolution instead of gradients.

    prompt = p0 + A z,   min over z in R^d of the loss,   A: (P D, d) fixed and random,   z by CMA-ES

Source: Sun et al. 2022 (arXiv 2201.03514), "BBT". BBTv2 (Sun et al. 2022b, arXiv 2205.11200) has an A and a CMA-ES for
each layer, which take turns from the bottom up; what they find is added to the states of the prompt's places.

It knows the `Engine` and numbers, no model: whether the engine is in this process or behind a server is not seen here.
A call is one pass of the whole training set (or of its generation's part) with one prompt, as in the papers; the
prompts of a generation are calls of one batched request. Passes over the tune set are counted apart. A run is a pure
function of its settings: the journal holds the losses of each generation, and a killed run replays them, without a
request, and goes on.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from odqa.errors import DataError, MissingExtra
from odqa.frozen.engine import Engine, Prompted, Vectors

Floats = NDArray[np.float64]
Quality = tuple[float, ...]  # of a prompt on tune: larger is better, compared from the left
Pairs = Sequence[tuple[Prompted, Sequence[int]]]  # texts and the tokens that are to follow them


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """`words` (P, D) before the text; `deep` (L, P, D) added where states enter the layers, or None."""

    words: Vectors
    deep: Vectors | None = None

    def before(self, source: Prompted) -> Prompted:
        return replace(source, prompt=self.words, deep=self.deep)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How to search.

    `dimensions` d and `population` as in the paper (500 and 20), `calls` the budget (8,000 there). `sigma` is the first
    step size of z, and `scale` alpha: A's entries have the standard deviation alpha * spread / (sqrt(d) * sigma), so
    that A z is alpha times as wide as word vectors (with `deep`: as the states of its layer) are. Authors' code: 1 and
    1, with `deep` 0.2 and 0.2. Their uniform A is as wide as torch draws a linear map; ours as the normal one (our
    choice). `bound`: z stays within +- so much (5 in the paper); None: anywhere. Every `tune_every` generations the
    best prompt of the generation and the mean of the distribution are tried on tune.
    """

    dimensions: int = 500
    population: int = 20
    calls: int = 8000
    sigma: float = 1.0
    scale: float = 1.0
    projection: Literal["normal", "uniform"] = "normal"
    bound: float | None = 5.0
    deep: bool = False
    tune_every: int = 5
    seed: int = 1

    def check(self, layers: int) -> None:
        """Raises DataError for settings that cannot be searched with."""
        if self.seed < 1:
            raise DataError(f"black-box search: seed is {self.seed}; it must be at least 1 (0 means the time to cma).")
        if self.population < 2 or self.dimensions < 2:
            raise DataError(
                f"black-box search: population is {self.population} and dimensions {self.dimensions}; both must be at "
                "least 2."
            )
        whole = self.population * (layers if self.deep else 1)
        if self.calls < whole:
            of = f" a layer, {layers} layers" if self.deep else ""
            raise DataError(
                f"black-box search: the budget of {self.calls} calls is smaller than one generation ({self.population}"
                f"{of}: {whole}). Raise calls or lower population."
            )


class Objective(Protocol):
    """What is to be small on the training set, and large on the tune set."""

    rows: int
    """Requests that a call makes."""

    def losses(self, prompts: Sequence[SoftPrompt], generation: int) -> Floats:
        """(prompts,) losses, in one batched request. They are compared within a generation, numbered from 0."""
        ...

    def qualities(self, prompts: Sequence[SoftPrompt]) -> list[Quality]: ...

    def sources(self) -> Sequence[Prompted]:
        """The training texts, whose states say how wide a layer is."""
        ...


@dataclass(slots=True)
class SearchResult:
    """The `best` prompt on tune, and what it cost. `curve`: one entry a trial on tune (calls so far, the best training
    loss so far, the quality of the best prompt so far). `server_seconds` are those that the engine took."""

    best: SoftPrompt
    quality: Quality
    curve: list[dict[str, Any]]
    calls: int
    tune_calls: int
    seconds: float
    server_seconds: float


# --- what is searched for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and the number of its class."""

    source: Prompted
    label: int


class Classification:
    """Texts with classes, each of which one token stands for: its verbaliser.

    Cross-entropy among the verbalisers, or the hinge loss, the sum over other classes c of
    max(0, margin + s_c - s_right); s are log-probabilities, whose differences are those of logits. Quality is the
    accuracy (0 to 1), then minus the loss. Raises DataError for verbalisers of several tokens, or an engine without
    log-probabilities.
    """

    def __init__(
        self,
        engine: Engine,
        verbalisers: Sequence[str],
        train: Sequence[Labelled],
        tune: Sequence[Labelled],
        *,
        loss: Literal["cross-entropy", "hinge"] = "cross-entropy",
        margin: float = 2.0,
    ) -> None:
        check_engine(engine)
        self.engine, self.train, self.tune, self.loss, self.margin = engine, train, tune, loss, margin
        self.tokens = one_token_each(engine, verbalisers)
        self.rows = len(train)
        for name, examples in (("train", train), ("tune", tune)):
            if not examples:
                raise DataError(f"black-box search: there are no {name} examples.")
            if wrong := [one.label for one in examples if not 0 <= one.label < len(verbalisers)]:
                raise DataError(f"black-box search: a {name} example has class {wrong[0]} of {len(verbalisers)}.")

    def scores(self, prompts: Sequence[SoftPrompt], examples: Sequence[Labelled]) -> Floats:
        """(prompts, examples, classes) log-probabilities of the verbalisers."""
        rows = [prompt.before(one.source) for prompt in prompts for one in examples]
        found = self.engine.choose(rows, self.tokens).astype(np.float64)
        return found.reshape(len(prompts), len(examples), len(self.tokens))

    def losses(self, prompts: Sequence[SoftPrompt], generation: int) -> Floats:
        return self._losses(self.scores(prompts, self.train), self.train)

    def qualities(self, prompts: Sequence[SoftPrompt]) -> list[Quality]:
        scores = self.scores(prompts, self.tune)
        right = (scores.argmax(-1) == [one.label for one in self.tune]).mean(-1)
        losses = self._losses(scores, self.tune)
        return [(float(share), -float(loss)) for share, loss in zip(right, losses, strict=True)]

    def sources(self) -> Sequence[Prompted]:
        return [one.source for one in self.train]

    def predict(self, prompt: SoftPrompt, sources: Sequence[Prompted]) -> list[int]:
        """The class of each text."""
        scores = self.scores([prompt], [Labelled(source, 0) for source in sources])
        return [int(label) for label in scores[0].argmax(-1)]

    def _losses(self, scores: Floats, examples: Sequence[Labelled]) -> Floats:
        labels = np.array([one.label for one in examples])
        of = cross_entropy if self.loss == "cross-entropy" else _hinge_of(self.margin)
        return np.array(of(scores, labels).mean(-1))


class Continuation:
    """Texts and what is to follow them: the loss is minus the log-likelihood a token, and quality minus that of tune.

    For answers of any length, such as a reader's. `train` is the whole training set, or gives that of a generation:
    CMA-ES needs to know which prompts of a generation are better, so each one may have examples of its own.
    """

    def __init__(self, engine: Engine, train: Pairs | Callable[[int], Pairs], tune: Pairs) -> None:
        check_engine(engine)
        self.engine, self.tune = engine, tune
        self.train_at = train if callable(train) else lambda _generation: train
        self.rows = len(self.train_at(0))
        if not self.rows or not tune:
            raise DataError(f"black-box search: there are no {'tune' if self.rows else 'train'} examples.")

    def losses(self, prompts: Sequence[SoftPrompt], generation: int) -> Floats:
        return self._losses(prompts, self.train_at(generation))

    def qualities(self, prompts: Sequence[SoftPrompt]) -> list[Quality]:
        return [(-float(loss),) for loss in self._losses(prompts, self.tune)]

    def sources(self) -> Sequence[Prompted]:
        return [source for source, _ in self.train_at(0)]

    def _losses(self, prompts: Sequence[SoftPrompt], pairs: Pairs) -> Floats:
        rows = [prompt.before(source) for prompt in prompts for source, _ in pairs]
        scores = self.engine.score(rows, [target for _ in prompts for _, target in pairs])
        tokens = sum(len(target) for _, target in pairs)
        sums = np.array([sum(values) for values in scores], dtype=np.float64).reshape(len(prompts), len(pairs))
        return np.array(-sums.sum(-1) / tokens)


def check_engine(engine: Engine) -> None:
    """Raises DataError for an engine whose API does not give what a search over vectors needs."""
    facts = engine.facts
    if not facts.has_logprobs:
        raise DataError(
            f"{facts.model}: its API gives no log-probabilities, and a soft prompt is searched by them. Search over "
            "texts instead (odqa.frozen.textsearch)."
        )
    if not facts.takes_prompts:
        raise DataError(
            f"{facts.model}: its API takes no prompts as vectors. Search over texts instead (odqa.frozen.textsearch)."
        )


def one_token_each(engine: Engine, verbalisers: Sequence[str]) -> list[int]:
    """The token of each verbaliser. Raises DataError for one that is several tokens (or none), or two of one token."""
    found: list[int] = []
    for word, tokens in zip(verbalisers, engine.tokens(verbalisers), strict=True):
        if len(tokens) != 1:
            raise DataError(
                f"verbaliser {word!r} is {len(tokens)} tokens of {engine.facts.model}; one is needed. Choose another "
                "word (a blank before it may count), or tune on answers, which may have several."
            )
        found.append(tokens[0])
    if len(set(found)) != len(found) or len(found) < 2:
        raise DataError(f"verbalisers {list(verbalisers)}: at least two that differ are needed.")
    return found


def cross_entropy(scores: Floats, labels: NDArray[np.int64]) -> Floats:
    """(..., n, C) scores, (n,) labels -> (..., n) -log softmax(scores)[label], in nats."""
    top = scores.max(-1, keepdims=True)
    total = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
    return np.array(total - scores[..., np.arange(len(labels)), labels])


def hinge(scores: Floats, labels: NDArray[np.int64], margin: float) -> Floats:
    """(..., n, C) scores, (n,) labels -> (..., n); see `Classification`."""
    right = scores[..., np.arange(len(labels)), labels][..., None]
    over = np.maximum(0.0, margin + scores - right)
    over[..., np.arange(len(labels)), labels] = 0.0
    return np.array(over.sum(-1))


def _hinge_of(margin: float) -> Callable[[Floats, NDArray[np.int64]], Floats]:
    return lambda scores, labels: hinge(scores, labels, margin)


# --- the search -------------------------------------------------------------------------------------------------------


def search(
    engine: Engine,
    objective: Objective,
    start: Vectors | int,
    settings: SearchSettings,
    *,
    journal: Path | None = None,
    evaluate: Callable[[SoftPrompt], Mapping[str, float]] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Search for a prompt, from p0 = `start` (P, D), or from zeros with a length P.

    The start is tried on tune too, so what comes back is never worse there. `evaluate` may say more of the prompt that
    is the best so far, for the curve. `journal` is continued if it is there. Raises DataError for a budget smaller than
    a generation, an engine that lacks what is asked for, losses that are not finite, or a journal of another search.
    """
    return _Search(engine, objective, start, settings, journal, evaluate, log).run()


@dataclass(slots=True)
class _Place:
    """Where a search adds something: a projection of its own, its CMA-ES, the best addition so far with its loss."""

    A: Vectors
    es: Any
    best: Vectors
    loss: float = math.inf


@dataclass(slots=True)
class _Trials:
    """The prompts that were tried on tune."""

    best: SoftPrompt
    quality: Quality = ()
    calls: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


class _Search:
    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        start: Vectors | int,
        settings: SearchSettings,
        journal: Path | None,
        evaluate: Callable[[SoftPrompt], Mapping[str, float]] | None,
        log: Callable[[str], None],
    ) -> None:
        facts = engine.facts
        if facts.width is None or facts.embedding_spread is None:
            raise DataError(f"{facts.model}: its API does not say how wide its word vectors are.")
        if settings.deep and (not facts.takes_deep or facts.layers is None):
            raise DataError(f"{facts.model}: its API takes no deep prompts. Set deep: false.")
        self.layers = facts.layers if settings.deep and facts.layers is not None else 1
        settings.check(self.layers)
        p0 = np.zeros((start, facts.width), dtype=np.float32) if isinstance(start, int) else start
        if p0.ndim != 2 or p0.shape[1] != facts.width or not len(p0) or not np.isfinite(p0).all():
            raise DataError(f"black-box search: p0 has shape {p0.shape}; it must be finite and (P, {facts.width}).")
        self.engine, self.objective, self.settings, self.log = engine, objective, settings, log
        self.p0, self.evaluate = p0.astype(np.float32), evaluate
        self.deep_shape = (facts.layers or 0, *p0.shape)
        self.server_seconds = 0.0
        spreads = self._timed(lambda: engine.spread(objective.sources())) if settings.deep else [facts.embedding_spread]
        self.places = [self._place(number, spread) for number, spread in enumerate(spreads)]
        self.trials = _Trials(self._prompt())
        self.journal = _Journal(journal, self._identity(spreads))

    def run(self) -> SearchResult:
        started, settings = time.monotonic(), self.settings
        turns = settings.calls // settings.population
        turns -= turns % self.layers  # BBTv2: whole rounds, so that each layer has had as many turns
        if self.journal.known:
            done = sum(what == "losses" for _, what in self.journal.known)
            self.log(f"resumed after {done} of {turns} generations")
        self._try(0, [self._prompt()])
        for turn in range(turns):
            candidates, zs = self._ask(turn)
            losses = self._losses(turn, candidates)
            self._tell(turn, candidates, zs, losses)
            if (turn + 1) % settings.tune_every == 0 or turn + 1 == turns:
                mean = self._with(turn, self._addition(turn, np.asarray(self.places[turn % self.layers].es.mean)))
                self._try(turn + 1, [candidates[int(np.argmin(losses))], mean])
        best = self.trials
        seconds = time.monotonic() - started
        calls = turns * settings.population
        return SearchResult(best.best, best.quality, best.curve, calls, best.calls, seconds, self.server_seconds)

    # --- one generation ---

    def _ask(self, turn: int) -> tuple[list[SoftPrompt], list[Floats]]:
        place = self.places[turn % self.layers]
        zs = [np.asarray(z, dtype=np.float64) for z in place.es.ask()]
        return [self._with(turn, self._addition(turn, z)) for z in zs], zs

    def _losses(self, turn: int, candidates: Sequence[SoftPrompt]) -> Floats:
        known = self.journal.read(turn + 1, "losses")
        if known is not None:
            return np.array(known, dtype=np.float64)
        losses: Floats = self._timed(lambda: self.objective.losses(candidates, turn))
        if not np.isfinite(losses).all():
            number = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise DataError(
                f"black-box search: prompt {number} of generation {turn + 1} has a loss of {losses[number]}. Lower "
                "sigma or scale, or compute in float32."
            )
        self.journal.write(turn + 1, "losses", [float(loss) for loss in losses])
        return losses

    def _tell(self, turn: int, candidates: Sequence[SoftPrompt], zs: list[Floats], losses: Floats) -> None:
        place, first = self.places[turn % self.layers], int(np.argmin(losses))
        place.es.tell(zs, losses.tolist())
        if losses[first] < place.loss:
            place.loss, place.best = float(losses[first]), self._addition(turn, zs[first])

    def _try(self, entry: int, prompts: Sequence[SoftPrompt]) -> None:
        """Try prompts on tune, and keep the best one; the earlier of two equals."""
        known = self.journal.read(entry, "tune")
        if known is None:
            found = self._timed(lambda: self.objective.qualities(prompts))
            self.journal.write(entry, "tune", [list(quality) for quality in found])
        else:
            found = [tuple(quality) for quality in known]
        trials = self.trials
        trials.calls += len(prompts)
        for prompt, quality in zip(prompts, found, strict=True):
            if not trials.quality or quality > trials.quality:
                trials.best, trials.quality = prompt, quality
        losses = [place.loss for place in self.places if math.isfinite(place.loss)]
        line: dict[str, Any] = {"step": entry, "calls": entry * self.settings.population}
        line |= {"loss": min(losses)} if losses else {}
        line["tune"] = trials.quality[0]
        if self.evaluate is not None:
            more = self.journal.read(entry, "more")
            if more is None:
                more = dict(self.evaluate(trials.best))
                self.journal.write(entry, "more", more)
            line |= more
        trials.curve.append(line)
        self.log(" ".join(f"{name} {value:.4g}" for name, value in line.items()))

    # --- prompts ---

    def _place(self, number: int, spread: float) -> _Place:
        settings = self.settings
        chances = np.random.default_rng([settings.seed, number, 0])
        width = self.p0.size
        deviation = settings.scale * spread / (math.sqrt(settings.dimensions) * settings.sigma)
        if settings.projection == "normal":
            A = chances.standard_normal((width, settings.dimensions), dtype=np.float32) * np.float32(deviation)
        else:
            edge = math.sqrt(3) * deviation  # uniform in +-edge has this deviation
            A = chances.uniform(-edge, edge, (width, settings.dimensions)).astype(np.float32)
        return _Place(A, _evolution(settings, number), np.zeros(self.p0.shape, dtype=np.float32))

    def _addition(self, turn: int, z: Floats) -> Vectors:
        """A z (P, D)."""
        added: Vectors = (self.places[turn % self.layers].A @ z.astype(np.float32)).reshape(self.p0.shape)
        return added

    def _with(self, turn: int, addition: Vectors) -> SoftPrompt:
        """The best prompt so far, but with another addition at the place whose turn it is."""
        additions = [place.best for place in self.places]
        additions[turn % self.layers] = addition
        return self._prompt(additions)

    def _prompt(self, additions: Sequence[Vectors] | None = None) -> SoftPrompt:
        added = [place.best for place in self.places] if additions is None else additions
        words = self.p0 + added[0]
        if not self.settings.deep:
            return SoftPrompt(words)
        deep = np.zeros(self.deep_shape, dtype=np.float32)
        deep[1:] = added[1:]  # what enters the first layer are the words
        return SoftPrompt(words, deep)

    def _timed(self, call: Callable[[], Any]) -> Any:
        started = time.monotonic()
        found = call()
        self.server_seconds += time.monotonic() - started
        return found

    def _identity(self, spreads: Sequence[float]) -> dict[str, Any]:
        """What must be the same for a journal to go on."""
        facts = self.engine.facts
        return {
            "settings": asdict(self.settings),
            "model": facts.fingerprint or facts.model,
            "rows": self.objective.rows,
            "p0": [list(self.p0.shape), float(np.float64(self.p0).sum()), float((np.float64(self.p0) ** 2).sum())],
            "spreads": [float(f"{spread:.6g}") for spread in spreads],
        }


def _evolution(settings: SearchSettings, number: int) -> Any:
    """A CMA-ES that draws from a generator of its own, and leaves numpy's global one alone."""
    try:
        import cma
    except ImportError as error:
        raise MissingExtra("Black-box tuning", "cma", "blackbox") from error

    chances = np.random.default_rng([settings.seed, number, 1])
    options: dict[str, Any] = {
        "popsize": settings.population,
        "randn": lambda *shape: chances.standard_normal(shape),
        "seed": math.nan,  # to cma: leave the global generator alone
        "verbose": -10,  # neither files nor lines, and no file of signals is looked for
    }
    if settings.bound is not None:
        options["bounds"] = [-settings.bound, settings.bound]
    return cma.CMAEvolutionStrategy(np.zeros(settings.dimensions), settings.sigma, options)


class _Journal:
    """What the engine said, one JSON line a fact: the first says which search this is. A line cut short is dropped."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.known: dict[tuple[int, str], Any] = {}
        if path is None:
            return
        lines = _whole_lines(path) if path.is_file() else []
        if not lines:
            path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        elif lines[0] != json.loads(json.dumps(identity)):
            changed = sorted(name for name in identity if lines[0].get(name) != json.loads(json.dumps(identity[name])))
            raise DataError(
                f"{path}: the journal of another search (other {', '.join(changed)}). Remove it to begin anew."
            )
        else:
            self.known = {(line["entry"], line["what"]): line["values"] for line in lines[1:]}
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def read(self, entry: int, what: str) -> Any:
        return self.known.get((entry, what))

    def write(self, entry: int, what: str, values: Any) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"entry": entry, "what": what, "values": values}) + "\n")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]
