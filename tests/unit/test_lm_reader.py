"""The generative reader on tiny random models: prices, windows, padding, decoding, and where answers end."""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from odqa.errors import DataError, RecipeError
from odqa.frozen.backbone import Backbone, fingerprint, load_backbone
from odqa.pack import GreedyPacker
from odqa.read.generated import Generation
from odqa.read.lm import LmReader, load_lm
from odqa.read.prompts import AnswerRules, Demonstration, PromptTemplate
from odqa.types import Answer, PackedContext, Passage, Query
from tests.tiny_models import tiny_bert, tiny_bert2bert, tiny_gpt2, tiny_llama, tiny_odqa_mini, tiny_t5
from tests.unit.conformance_read import HITS, QUERIES, ReaderConformance, ranked

SHORT = PromptTemplate("short", passage="{title}: {text}", question="Q: {question}", answer="A:", separator="\n")
FREE = AnswerRules(stop=(), cleanup=(), abstain=())  # random models write line breaks; here their whole text counts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("models")
    paths = {
        "gpt2": tiny_gpt2(folder / "gpt2"),
        "llama": tiny_llama(folder / "llama"),
        "chat": tiny_llama(folder / "chat", chat=True),
        "t5": tiny_t5(folder / "t5"),
        "bert2bert": tiny_bert2bert(folder / "bert2bert"),
        "odqa-mini": tiny_odqa_mini(folder / "odqa-mini"),
    }
    return {name: load_lm(str(path), device="cpu", dtype="float32") for name, path in paths.items()}


@pytest.fixture(params=["gpt2", "llama", "t5"])
def backbone(request: pytest.FixtureRequest, models: dict[str, Backbone]) -> Backbone:
    return models[request.param]


def make(backbone: Backbone, **settings: Any) -> LmReader:
    return LmReader(backbone, SHORT, **{"max_new_tokens": 12, "rules": FREE, **settings})


def pack(reader: LmReader, budget: int = 200) -> list[PackedContext]:
    return GreedyPacker(reader, budget).pack(QUERIES, HITS)


class OnTinyModels(ReaderConformance):
    model = ""
    settings: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class")
    def reader(self, models: dict[str, Backbone]) -> LmReader:
        return make(models[self.model], **self.settings)


class TestGreedyGpt2(OnTinyModels):
    model = "gpt2"


class TestGreedyT5(OnTinyModels):
    model = "t5"


class TestBeamsOfLlama(OnTinyModels):
    model, settings = "llama", {"beams": 3, "candidates": 3}


class TestSamplesOfGpt2(OnTinyModels):
    model, settings = "gpt2", {"sample": True, "candidates": 3, "top_p": 0.95, "temperature": 0.7}


class TestSamplesOfT5(OnTinyModels):
    model, settings = "t5", {"sample": True, "candidates": 2, "top_k": 20}


class TestOdqaMini(OnTinyModels):
    model = "odqa-mini"


class TestT5ReadsApart(OnTinyModels):
    model, settings = "t5", {"passages": "apart"}


class TestBert2BertReadsApartInSmallBatches(OnTinyModels):
    model, settings = "bert2bert", {"passages": "apart", "batch_size": 2}


class TestOdqaMiniReadsApartWithBeams(OnTinyModels):
    model, settings = "odqa-mini", {"passages": "apart", "beams": 3, "candidates": 2}


class TestSamplesOfT5ReadingApart(OnTinyModels):
    model, settings = "t5", {"passages": "apart", "sample": True, "candidates": 2}


class TestWindowsOfGpt2(OnTinyModels):
    model, settings = "gpt2", {"candidates": 2, "beams": 2}

    @pytest.fixture(scope="class")
    def contexts(self, reader: LmReader) -> list[PackedContext]:
        return GreedyPacker(reader, 200, windows=3).pack(QUERIES, HITS)


class TestChatWithStopRules(OnTinyModels):
    model, settings = "chat", {"chat": True, "rules": None, "demonstrations": (Demonstration("1?", "one"),)}


# Prices and windows


def test_the_prompt_has_exactly_the_tokens_that_were_paid_for(backbone: Backbone) -> None:
    reader = make(backbone)
    for context in pack(reader):
        costs = reader.costs(context.query, context.hits)
        (ids,) = reader.encode(context)
        assert len(ids) == context.tokens == costs.fixed + sum(price or 0 for price in costs.passages)


def test_the_model_is_given_the_packed_tokens_and_no_others(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = make(backbone)
    contexts = pack(reader)
    seen: list[list[int]] = []
    generate = backbone.model.generate

    def watch(**inputs: Any) -> Any:
        mask = inputs["attention_mask"].bool()
        seen.extend(row[kept].tolist() for row, kept in zip(inputs["input_ids"], mask, strict=True))
        return generate(**inputs)

    monkeypatch.setattr(backbone.model, "generate", watch, raising=False)
    reader.read(contexts)
    assert sorted(seen) == sorted(reader.encode(context)[0] for context in contexts)


def test_a_context_packed_for_another_prompt_is_refused(models: dict[str, Backbone]) -> None:
    contexts = pack(make(models["gpt2"]))
    with pytest.raises(ValueError, match="Pack it with the costs of this reader"):
        LmReader(models["gpt2"], "open-book").read(contexts)


def test_a_causal_model_keeps_room_for_the_answer(models: dict[str, Backbone]) -> None:
    # GPT-2 has 256 positions for prompt and answer together; T5's encoder has its 256 for itself.
    assert make(models["gpt2"], max_new_tokens=12).limit == 256 - 12
    assert make(models["gpt2"], max_new_tokens=12, reserved=20).limit == 256 - 12 - 20
    assert make(models["t5"], max_new_tokens=12).limit == 256


def test_a_prompt_that_fills_the_window_is_read_to_its_end(models: dict[str, Backbone]) -> None:
    reader = make(models["gpt2"], max_new_tokens=4)
    # As many words of one token as fit: the question alone makes the longest prompt.
    words = reader.limit - reader.costs(Query("q", ""), ()).fixed
    (context,) = GreedyPacker(reader, 1000).pack([Query("q", " the" * words)], [[]])
    assert context.tokens == reader.limit == 252
    assert reader.generate([context])[0][0].tokens == 4


def test_a_question_longer_than_the_window_names_query_tokens_and_window(models: dict[str, Backbone]) -> None:
    with pytest.raises(DataError, match=r"query q-long: the question takes 4\d\d tokens .* 244 \(window of 256\)"):
        make(models["gpt2"]).costs(Query("q-long", " the" * 400), ())


def test_a_passage_longer_than_the_window_has_no_price(models: dict[str, Backbone]) -> None:
    prices = make(models["gpt2"]).costs(QUERIES[0], ranked(Passage("long", "the " * 400), Passage("short", "the")))
    assert prices.passages[0] is None and prices.passages[1] is not None


def test_window_comes_from_recipe_configuration_or_tokenizer(models: dict[str, Backbone], tmp_path: Path) -> None:
    assert make(models["t5"]).window == 256  # its tokenizer says so
    assert make(models["t5"], window=1000).window == 1000  # relative positions have no end
    with pytest.raises(RecipeError, match="made for at most 256"):
        make(models["gpt2"], window=300)
    silent = load_lm(str(tiny_t5(tmp_path / "t5", window=10**12)), device="cpu", dtype="float32")
    with pytest.raises(RecipeError, match="Set window"):
        make(silent)


def test_special_tokens_in_a_passage_are_text(models: dict[str, Backbone]) -> None:
    for name, text in (("gpt2", "<|endoftext|>"), ("chat", "<|end|></s>"), ("t5", "</s>")):
        reader = make(models[name])
        hits = ranked(Passage("p", f"the {text} king"))
        (context,) = GreedyPacker(reader, 200).pack(QUERIES[:1], [hits])
        tokenizer = models[name].tokenizer
        inside = reader.encode(context)[0][1:-1]  # but for `<s>` in front and T5's `</s>` behind
        assert not {"<|endoftext|>", "<|end|>", "</s>"} & set(tokenizer.convert_ids_to_tokens(inside))
        if name != "t5":  # byte-level vocabularies can write it, unigram ones leave it out
            assert text in tokenizer.decode(inside)


def test_special_tokens_stand_where_the_tokenizer_puts_them(models: dict[str, Backbone]) -> None:
    ends = {"gpt2": (None, None), "llama": ("<s>", None), "t5": (None, "</s>")}
    for name, (first, last) in ends.items():
        reader = make(models[name])
        (ids,) = reader.encode(pack(reader)[0])
        tokens = models[name].tokenizer.convert_ids_to_tokens(ids)
        assert ((tokens[0] == "<s>"), (tokens[-1] == "</s>")) == (first is not None, last is not None)


def test_a_conversation_has_the_tokens_of_the_tokenizers_own_chat_template(models: dict[str, Backbone]) -> None:
    reader = make(models["chat"], chat=True)
    (context,) = GreedyPacker(reader, 200).pack([QUERIES[0]], [HITS[0][:2]])
    content = SHORT.separator.join(
        [*(SHORT.render_passage(hit.passage) for hit in HITS[0][:2]), "Q: " + QUERIES[0].text]
    )
    whole = models["chat"].tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
    )
    assert reader.encode(context) == [list(whole)]


# Passages apart


@pytest.fixture(params=["t5", "bert2bert", "odqa-mini"])
def writer(request: pytest.FixtureRequest, models: dict[str, Backbone]) -> Backbone:
    """An encoder-decoder."""
    return models[request.param]


def test_a_passage_that_is_read_apart_pays_for_its_question_and_instruction(writer: Backbone) -> None:
    together, apart = make(writer), make(writer, passages="apart")
    for query, hits in zip(QUERIES, HITS, strict=True):
        old, new = together.costs(query, hits), apart.costs(query, hits)
        assert (new.fixed, new.limit) == (0, None)
        assert new.passages == tuple(price and old.fixed + price for price in old.passages)
        (context,) = GreedyPacker(apart, 200).pack([query], [hits])
        prompts = apart.encode(context)
        assert len(prompts) == len(context.hits)
        assert sum(map(len, prompts)) == context.tokens <= 200


def test_one_passage_apart_is_read_as_in_a_prompt_of_its_own(writer: Backbone) -> None:
    hits = [found[:1] for found in HITS]
    together, apart = make(writer), make(writer, passages="apart")
    alone = together.generate(GreedyPacker(together, 200).pack(QUERIES, hits))
    same = apart.generate(GreedyPacker(apart, 200).pack(QUERIES, hits))
    for (one,), (other,) in zip(alone, same, strict=True):
        assert one.raw == other.raw and one.logprob == pytest.approx(other.logprob, abs=1e-4)


@torch.no_grad()
def test_one_decoder_reads_the_states_of_passages_that_were_encoded_apart(writer: Backbone) -> None:
    """Greedy decoding by plain forward passes over the states of unpadded prompts."""
    reader = make(writer, passages="apart", batch_size=2)
    (context,) = GreedyPacker(reader, 200).pack(QUERIES[:1], HITS[:1])
    assert len(context.hits) > 2
    (generation,) = reader.generate([context])[0]
    encoder = writer.model.get_encoder()
    states = [
        encoder(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state
        for ids in reader.encode(context)
    ]
    encoded = (torch.cat(states, dim=1),)  # (1, T, D), of odqa-mini 2 D
    written = [int(writer.model.generation_config.decoder_start_token_id)]
    expected = 0.0
    for _ in range(generation.tokens):
        mask = torch.ones(1, encoded[0].shape[1])
        logits = writer.model(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=torch.tensor([written])
        ).logits[0, -1]
        written.append(int(logits.argmax()))
        expected += float(logits.log_softmax(-1).max())
    assert generation.logprob == pytest.approx(expected, abs=1e-3)


def test_every_passage_that_is_read_apart_has_a_say(writer: Backbone) -> None:
    reader = make(writer, passages="apart")
    whole, fewer = (GreedyPacker(reader, 200).pack(QUERIES[:1], [HITS[0][:n]]) for n in (2, 1))
    assert reader.generate(whole)[0][0].logprob != pytest.approx(reader.generate(fewer)[0][0].logprob, abs=1e-3)


def test_a_question_whose_passages_do_not_fit_is_read_alone(writer: Backbone) -> None:
    reader = make(writer, passages="apart")
    (context,) = GreedyPacker(reader, 200).pack(QUERIES[:1], [ranked(Passage("p", "the river " * 200))])
    assert context.hits == () and context.tokens == reader.costs(QUERIES[0], ()).fixed > 0
    assert reader.read([context])[0].query_id == "q-capital"


def test_a_causal_model_cannot_read_apart(models: dict[str, Backbone]) -> None:
    with pytest.raises(RecipeError, match=r"apart needs an encoder-decoder, and .* is a causal model"):
        make(models["gpt2"], passages="apart")


# Windows


def test_each_window_is_a_prompt_of_its_own_and_all_are_paid_for(backbone: Backbone) -> None:
    reader = make(backbone, beams=2, candidates=2)
    contexts = GreedyPacker(reader, 140, windows=2).pack(QUERIES, HITS)
    assert contexts[0].windows[-1] == 2
    for context, generations in zip(contexts, reader.generate(contexts), strict=True):
        assert sum(map(len, reader.encode(context))) == context.tokens
        expected = []
        for hits in context.by_window():
            alone = GreedyPacker(reader, 200).pack([context.query], [hits])
            assert alone[0].hits == hits
            expected += reader.generate(alone)[0]
        assert [one.raw for one in generations] == [one.raw for one in expected]


def say(text: str, probability: float, tokens: int = 2) -> Generation:
    return Generation(text, text, "end of text", tokens, math.log(probability))


def joined(
    monkeypatch: pytest.MonkeyPatch, reader: LmReader, *windows: list[Generation], passages: tuple[str, ...] = ()
) -> Answer:
    """The answer of a reader whose model writes these generations, one list a window."""
    hits = tuple(ranked(*(Passage(f"p{at}", text) for at, text in enumerate(passages or ["x"] * len(windows)))))
    context = PackedContext(QUERIES[0], "", hits, 0, 0, windows=tuple(range(1, len(hits) + 1)))
    monkeypatch.setattr(reader, "generate", lambda contexts: [[one for window in windows for one in window]])
    return reader.read([context])[0]


def test_equal_answers_of_windows_add_up(models: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    # Rome: 0.5 / 3 = 0.17. Paris: (0.3 + 0.4) / 3 = 0.23, written as where it is likelier.
    reader = make(models["gpt2"])
    answer = joined(monkeypatch, reader, [say("Paris", 0.3)], [say("Rome", 0.5)], [say("the paris", 0.4)])
    assert answer.text == "the paris"
    assert [candidate.text for candidate in answer.candidates] == ["the paris", "Rome"]
    assert math.exp(answer.score) == pytest.approx(0.7 / 3)
    assert [math.exp(candidate.logprob) for candidate in answer.candidates] == pytest.approx([0.7 / 3, 0.5 / 3])


def test_the_mean_score_of_windows_is_that_of_the_joined_probability(
    models: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = joined(monkeypatch, make(models["gpt2"], score="mean"), [say("a", 0.3, 5)], [say("a", 0.5, 4)])
    assert answer.score == pytest.approx(math.log(0.4) / 4)


def test_all_candidates_of_a_window_count_but_equal_ones_once(
    models: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    # b: (0.2 + 0.5) / 2 = 0.35 beats a: 0.6 / 2 = 0.3; the second a of the first window is the same text again.
    reader = make(models["gpt2"], beams=3, candidates=3)
    first = [say("a", 0.6), say("a", 0.15), say("b", 0.2)]
    answer = joined(monkeypatch, reader, first, [say("b", 0.5), say("c", 0.1), say("d", 0.1)])
    assert (answer.text, math.exp(answer.score)) == ("b", pytest.approx(0.35))


def test_a_window_that_abstains_has_no_say_and_all_of_them_abstain(
    models: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = make(models["gpt2"])
    answer = joined(monkeypatch, reader, [say("", 0.9)], [say("Rome", 0.1)], [say("", 0.8)])
    assert (answer.text, math.exp(answer.score)) == ("Rome", pytest.approx(0.1 / 3))
    answer = joined(monkeypatch, reader, [say("", 0.9)], [say("", 0.5)])
    assert (answer.text, answer.candidates, math.exp(answer.score)) == ("", (), pytest.approx(0.7))


def test_an_answer_is_spelt_as_its_window_spells_it(
    models: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("Beyoncé has sung.", "She lives in São Paulo.")
    windows = [say("beyonce", 0.6)], [say("sao paulo", 0.5)]
    plain = joined(monkeypatch, make(models["gpt2"]), *windows, passages=texts)
    assert [candidate.text for candidate in plain.candidates] == ["beyonce", "sao paulo"]
    spelt = joined(monkeypatch, make(models["gpt2"], spelling="passage"), *windows, passages=texts)
    assert [candidate.text for candidate in spelt.candidates] == ["Beyoncé", "São Paulo"]
    assert [candidate.logprob for candidate in spelt.candidates] == [one.logprob for one in plain.candidates]


def test_an_answer_that_only_a_title_has_is_spelt_as_there(models: dict[str, Backbone]) -> None:
    reader = make(models["gpt2"], spelling="passage")
    context = PackedContext(QUERIES[0], "", tuple(ranked(Passage("p", "She has sung.", "Beyoncé"))), 0, 0)
    assert reader._answer(context, [say("beyonce", 0.5)]).text == "Beyoncé"


# Padding and batches


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_padding_does_not_change_an_answer(backbone: Backbone, batch_size: int) -> None:
    alone = make(backbone, batch_size=1)
    contexts = pack(alone)
    assert len({context.tokens for context in contexts}) == 3  # so that there is something to pad
    expected = alone.generate(contexts)
    for (one,), (other,) in zip(expected, make(backbone, batch_size=batch_size).generate(contexts), strict=True):
        assert one.raw == other.raw
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)  # float32 sums in another order


def test_the_passages_change_what_the_model_writes(backbone: Backbone) -> None:
    # Else the tests above would pass for a model that ignores its input.
    reader = make(backbone)
    with_passages, without = pack(reader), GreedyPacker(reader, 200).pack(QUERIES, [[], [], []])
    assert [one[0].raw for one in reader.generate(with_passages)] != [one[0].raw for one in reader.generate(without)]


# Decoding and scores


def test_logprob_of_a_greedy_answer_is_that_of_a_plain_forward_pass(backbone: Backbone) -> None:
    reader = make(backbone)
    context = pack(reader)[0]
    (generation,) = reader.generate([context])[0]
    prompt = torch.tensor(reader.encode(context))
    causal = backbone.architecture == "causal"
    written: list[int] = []
    expected = 0.0
    start = torch.tensor([[0]])  # T5's decoder starts with its padding token
    for _ in range(generation.tokens):
        ahead = torch.tensor([written], dtype=torch.long)
        with torch.no_grad():
            if causal:
                logits = backbone.model(input_ids=torch.cat([prompt, ahead], 1)).logits[0, -1]
            else:
                logits = backbone.model(input_ids=prompt, decoder_input_ids=torch.cat([start, ahead], 1)).logits[0, -1]
        written.append(int(logits.argmax()))
        expected += float(logits.log_softmax(-1).max())
    assert generation.logprob == pytest.approx(expected, abs=1e-3)
    assert generation.mean_logprob == pytest.approx(expected / generation.tokens, abs=1e-3)


def test_beams_are_ranked_by_their_logprob(backbone: Backbone) -> None:
    contexts = pack(make(backbone))
    for beams in make(backbone, beams=4, candidates=4).generate(contexts):
        logprobs = [beam.logprob for beam in beams]
        assert logprobs == pytest.approx(sorted(logprobs, reverse=True), abs=1e-4)
        assert len({beam.raw for beam in beams}) > 1


def test_a_sample_depends_on_its_seed_and_query_not_on_its_batch_nor_on_torch(backbone: Backbone) -> None:
    reader = make(backbone, sample=True, candidates=4)
    contexts = pack(reader)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = reader.read(contexts)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert [answer.text for answer in reader.read(contexts[::-1])][::-1] == [answer.text for answer in first]
    assert make(backbone, sample=True, candidates=4, seed=1).read(contexts) != first


def test_the_same_question_under_two_ids_is_sampled_twice(backbone: Backbone) -> None:
    reader = make(backbone, sample=True, candidates=4)
    twins = [Query("one", "who was king"), Query("two", "who was king")]
    one, two = reader.read(GreedyPacker(reader, 200).pack(twins, [[], []]))
    assert one.candidates != two.candidates


def test_samples_have_the_models_distribution(models: dict[str, Backbone]) -> None:
    """Frequencies of the first token in 2,000 samples against the softmax.

    The largest difference of a frequency from its probability has a standard deviation of at most
    sqrt(0.25 / 2000) = 0.011; 0.05 is over four of them.
    """
    backbone = models["gpt2"]
    reader = make(backbone, sample=True, candidates=2000, max_new_tokens=1)
    context = pack(reader)[2]
    with torch.no_grad():
        logits = backbone.model(input_ids=torch.tensor(reader.encode(context))).logits[0, -1]
    expected = logits.softmax(-1)
    logprobs = torch.tensor([generation.logprob for generation in reader.generate([context])[0]])
    for token in expected.topk(3).indices:
        frequency = float((logprobs - expected[token].log()).abs().lt(1e-4).float().mean())
        assert frequency == pytest.approx(float(expected[token]), abs=0.05)


def test_top_k_of_one_samples_the_greedy_answer(backbone: Backbone) -> None:
    contexts = pack(make(backbone))
    sampled = make(backbone, sample=True, top_k=1).read(contexts)
    assert [answer.text for answer in sampled] == [answer.text for answer in make(backbone).read(contexts)]


def test_score_is_the_sum_or_the_mean_of_the_tokens_logprobs(models: dict[str, Backbone]) -> None:
    reader = make(models["gpt2"])
    contexts = pack(reader)
    for total, mean, (generation,) in zip(
        reader.read(contexts), make(models["gpt2"], score="mean").read(contexts), reader.generate(contexts), strict=True
    ):
        assert mean.score == pytest.approx(total.score / generation.tokens)


def test_the_models_own_generation_settings_are_not_inherited(tmp_path: Path) -> None:
    path = tiny_gpt2(tmp_path / "gpt2")
    plain = load_lm(str(path), device="cpu", dtype="float32")
    contexts = pack(make(plain))
    wilful = load_lm(str(path), device="cpu", dtype="float32")
    wilful.model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, min_length=9)
    wilful.model.generation_config.update(no_repeat_ngram_size=1, suppress_tokens=None)
    assert make(wilful).read(contexts) == make(plain).read(contexts)


# Where answers end


def test_a_stop_string_ends_the_answer_and_its_logprob(models: dict[str, Backbone]) -> None:
    reader = make(models["gpt2"])
    context = pack(reader)[0]
    (whole,) = reader.generate([context])[0]
    # The text up to a visible character in its middle, which then is the stop string.
    stop = next(character for character in whole.raw[4:] if character.isprintable() and not character.isspace())
    (cut,) = make(models["gpt2"], rules=AnswerRules((stop,), (), ())).generate([context])[0]
    assert cut.stop == stop
    assert cut.text == whole.raw[: whole.raw.index(stop)].strip()
    assert cut.tokens < whole.tokens and cut.logprob > whole.logprob


def test_a_row_that_stops_early_is_not_changed_by_rows_that_go_on(backbone: Backbone) -> None:
    rules = AnswerRules(("e", "a", " "), (), ())
    contexts = pack(make(backbone))
    together = make(backbone, rules=rules, max_new_tokens=20).generate(contexts)
    apart = make(backbone, rules=rules, max_new_tokens=20, batch_size=1).generate(contexts)
    for (one,), (other,) in zip(together, apart, strict=True):
        assert (one.raw, one.stop, one.tokens) == (other.raw, other.stop, other.tokens)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_an_empty_generation_abstains(models: dict[str, Backbone]) -> None:
    # Every character but blanks ends the answer before it begins.
    visible = [chr(code) for code in [*range(1024), 0xFFFD] if not chr(code).isspace()]
    rules = AnswerRules(tuple(visible), (), ())
    answer = make(models["gpt2"], rules=rules).read(pack(make(models["gpt2"])))[0]
    assert answer.text == "" and answer.candidates == ()
    assert math.isfinite(answer.score)


def test_describe_shows_every_rule_that_touches_the_models_text(models: dict[str, Backbone]) -> None:
    shown = make(models["gpt2"], rules=None).describe()
    assert (shown["stop"], shown["cleanup"], shown["abstain"]) == (
        ["\n", "Question:"],
        ["prefix", "emphasis", "quotes"],
        ["unanswerable"],
    )
    assert shown["decoding"] == {"how": "greedy"}


# The frozen model


def test_reading_changes_no_weight(backbone: Backbone) -> None:
    before = fingerprint(backbone.model)
    reader = make(backbone, guard=True)
    reader.read(pack(reader))
    assert fingerprint(backbone.model) == before == backbone.fingerprint


def test_guard_notices_a_weight_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_lm(str(tiny_gpt2(tmp_path / "gpt2")), device="cpu", dtype="float32")
    reader = make(backbone, guard=True)
    contexts = pack(reader)
    generate = backbone.model.generate

    def meddle(**inputs: Any) -> Any:
        next(iter(backbone.model.parameters())).data[0, 0] += 1
        return generate(**inputs)

    monkeypatch.setattr(backbone.model, "generate", meddle, raising=False)
    with pytest.raises(AssertionError, match="changed"):
        reader.read(contexts)


def test_probabilities_that_are_not_numbers_name_the_query(tmp_path: Path) -> None:
    backbone = load_lm(str(tiny_gpt2(tmp_path / "gpt2")), device="cpu", dtype="float32")
    reader = make(backbone)
    contexts = pack(reader)
    next(iter(backbone.model.parameters())).data.fill_(math.nan)
    with pytest.raises(DataError, match=r"query q-\w+: .* not numbers in float32"):
        reader.read(contexts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 2}, "2 candidates need"),
        ({"sample": True, "beams": 2}, "exclude each other"),
        ({"sample": True, "temperature": 0.0}, "above 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"score": "best"}, "sum or mean"),
        ({"spelling": "title"}, "model or passage"),
        ({"passages": "alone"}, "together or apart"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 256}, "no room for a prompt"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_settings_that_contradict_are_refused(
    models: dict[str, Backbone], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make(models["gpt2"], **settings)


def test_an_encoder_cannot_read_as_an_lm(tmp_path: Path) -> None:
    encoder = load_backbone(str(tiny_bert(tmp_path / "bert")), "encoder", device="cpu", dtype="float32")
    with pytest.raises(RecipeError, match="is an encoder"):
        LmReader(encoder)


def test_a_model_that_is_not_there_is_one_line() -> None:
    with pytest.raises(DataError, match="'/nowhere/model' does not load") as caught:
        load_lm("/nowhere/model")
    assert "\n" not in str(caught.value)


# Samples and candidates


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert2bert", "odqa-mini"])
def test_samples_share_the_prompt_and_are_those_of_prompts_read_one_by_one(
    models: dict[str, Backbone], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = models[name]
    reader = make(backbone, max_new_tokens=6, batch_size=12)
    contexts = pack(reader, 120)
    seen: list[int] = []  # tokens of text that the layers are given
    layers = backbone.model.get_encoder() if backbone.architecture == "seq2seq" else backbone.model

    def watch(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        seen.append((args[0] if args else kwargs["input_ids"]).numel())

    handle = layers.register_forward_hook(watch, with_kwargs=True)
    try:
        shared = reader.draw(contexts, 4, seed=3)
        once = sum(seen)
        seen.clear()
        if backbone.architecture == "seq2seq":
            monkeypatch.setattr(LmReader, "_encode_apart", LmReader._prompts)
        else:
            monkeypatch.setattr(LmReader, "_shared_cache", lambda self, sources: {})
        apart = reader.draw(contexts, 4, seed=3)
    finally:
        handle.remove()
    assert [[sample.text for sample in one] for one in shared] == [[sample.text for sample in one] for one in apart]
    for one, other in zip(shared, apart, strict=True):
        # float32 sums in another order
        assert [s.logprob for s in one] == pytest.approx([s.logprob for s in other], abs=1e-4)
    # A causal model is also given every token that it writes; four times a prompt is far more than that.
    assert sum(seen) > 1.7 * once


def test_samples_depend_on_seed_and_query_alone_and_leave_the_reader_as_it_was(backbone: Backbone) -> None:
    reader = make(backbone)
    contexts = pack(reader)
    together = reader.draw(contexts, 3, seed=1)
    assert [len(one) for one in together] == [3] * len(contexts)
    alone = [reader.draw([context], 3, seed=1)[0] for context in reversed(contexts)]
    assert [[s.text for s in one] for one in alone[::-1]] == [[s.text for s in one] for one in together]
    assert reader.draw(contexts, 3, seed=2) != together
    assert reader.sample is False and reader.candidates == 1


@pytest.mark.parametrize(("count", "settings"), [(0, {}), (2, {"temperature": 0.0}), (2, {"top_p": 0.0})])
def test_drawing_nothing_or_without_a_distribution_is_a_recipe_error(
    backbone: Backbone, count: int, settings: dict[str, float]
) -> None:
    with pytest.raises(RecipeError, match=r"candidates is 0|temperature|top_p"):
        make(backbone).draw([], count, **settings)


def test_candidates_are_shown_behind_the_passages_and_paid_for_to_the_token(backbone: Backbone) -> None:
    reader = make(backbone)
    for context in pack(reader):
        shown = reader.show_candidates(context, ["paris", "the tiber", "paris"])
        assert shown.candidates == ("paris", "the tiber") and shown.hits == context.hits
        (ids,) = reader.encode(shown)
        assert len(ids) == shown.tokens > context.tokens
        assert shown.budget - context.budget == shown.tokens - context.tokens
        (before,) = reader.encode(context)
        front = next(at for at, (one, other) in enumerate(zip(ids, before, strict=False)) if one != other)
        added = shown.tokens - context.tokens
        assert ids[:front] + ids[front + added :] == before  # nothing else has changed
        text = reader._decode(ids[:front])
        assert all(hit.passage.text.split()[-1].strip(".") in text for hit in context.hits)
        assert "Q" not in reader._decode(ids[front : front + added])
    assert len(reader.read([shown])) == 1


def test_a_window_that_is_too_small_for_all_loses_passages_and_then_candidates(models: dict[str, Backbone]) -> None:
    reader = make(models["llama"], window=112)
    context = GreedyPacker(reader, 100).pack(QUERIES[:1], HITS[:1])[0]
    one = reader.show_candidates(context, ["the river seine", "the tiber in rome"])
    assert 0 < len(one.hits) < len(context.hits) and one.hits == context.hits[: len(one.hits)]
    assert [drop.passage_id for drop in one.dropped[len(context.dropped) :]] == [
        hit.passage.id for hit in context.hits[: len(one.hits) - 1 : -1]
    ]
    words = ("one", "two", "three", "four", "five")
    many = reader.show_candidates(context, [f"{word} long river number {word} of the old world" for word in words])
    assert many.hits == () and 0 < len(many.candidates) < 5
    with pytest.raises(DataError, match=r"one candidate take \d+ tokens.*has room for"):
        reader.show_candidates(context, ["river " * 120])
    with pytest.raises(ValueError, match="no candidate has a text"):
        reader.show_candidates(context, ["", " \n "])


def test_two_readers_share_a_model_and_each_reads_with_its_own_method(models: dict[str, Backbone]) -> None:
    from odqa.frozen.method import create_method

    for name in ("gpt2", "odqa-mini"):
        backbone = models[name]
        before = fingerprint(backbone.model)
        methods = [create_method("prompt-tuning", backbone, length=4, seed=seed) for seed in (1, 2)]
        first, second = (make(backbone, method=method, is_shared=True) for method in methods)
        contexts = pack(first)
        texts = [[answer.score for answer in reader.read(contexts)] for reader in (first, second, first)]
        assert texts[0] == texts[2] != texts[1]
        assert [answer.score for answer in make(backbone).read(contexts)] not in texts
        alone = make(backbone, method=create_method("prompt-tuning", backbone, length=4, seed=1))
        assert [answer.score for answer in alone.read(contexts)] == texts[0]
        for one in alone.methods:
            one.detach()
        assert fingerprint(backbone.model) == before


@pytest.mark.parametrize("name", ["llama", "odqa-mini"])
def test_samples_share_the_prompt_under_a_method_too(
    models: dict[str, Backbone], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from odqa.frozen.method import create_method

    method = create_method("prompt-tuning", models[name], length=4, seed=1)
    reader = make(models[name], max_new_tokens=6, batch_size=12, method=method, is_shared=True)
    contexts = pack(reader, 120)
    shared = reader.draw(contexts, 4, seed=3)
    if models[name].architecture == "seq2seq":
        monkeypatch.setattr(LmReader, "_encode_apart", LmReader._prompts)
    else:
        monkeypatch.setattr(LmReader, "_shared_cache", lambda self, sources: {})
    apart = reader.draw(contexts, 4, seed=3)
    assert [[sample.text for sample in one] for one in shared] == [[sample.text for sample in one] for one in apart]
    for one, other in zip(shared, apart, strict=True):
        # float32 sums in another order
        assert [s.logprob for s in one] == pytest.approx([s.logprob for s in other], abs=1e-4)
    bare = make(models[name], max_new_tokens=6).draw(contexts, 4, seed=3)
    assert [[s.logprob for s in one] for one in bare] != [[s.logprob for s in one] for one in shared]
