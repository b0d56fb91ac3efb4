"""Rows too long, computed in windows: the answer is that of the windows, put together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from shared.rows import result, row_error
from shared.specs import InferSpec
from workers.ranks.engine.entities import find_entities
from workers.ranks.engine.inputs import Request, RowProblem
from workers.ranks.engine.parts import Parts
from workers.ranks.engine.prompts import Prompt, PromptEncoder, Word
from workers.ranks.engine.windows import MOST_WINDOWS, cut, frame_of, seams
from workers.ranks.engine.word_windows import OVERLAP, cut_words

from .test_reranking import make_reranker
from .test_token_classification import plain
from .tiny import TAGS, make_masked, make_t5, make_tagger, sentence, wordpiece, words

SPLIT = {"too_long": "split"}
EVEN = [(0, 50), (50, 100), (100, 150), (150, 200)]
"""Of 200 words, each a token, where a window has room for 62."""


@pytest.fixture(scope="module")
def tagger(models_dir: Path) -> Path:
    return make_tagger(models_dir / "tagger-of-windows")


def pieces(text: str) -> list[str]:
    known = text.split()
    return [" ".join(known[start:end]) for start, end in EVEN]


def weighted(values: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The mean of rows by their tokens."""
    weights = torch.tensor(tokens, dtype=values.dtype)
    return (values * weights[:, None]).sum(dim=0) / weights.sum()


def test_scores_are_the_mean_of_the_windows_by_tokens(engine, models_dir):
    # Two labels, as a classifier; the first window is shorter, so that weights count.
    model_path = make_reranker(models_dir / "classifier-of-windows", 2)
    text = f"{sentence(46)}. {sentence(154, 3)}"
    rows = [{"text": "the cat"}, {"text": text, "id": "long"}, {"text": sentence(61)}]
    outcome = engine.run(
        model_path, rows, task="text-classification", top_k_labels=2, shard_rows=2, **SPLIT
    )
    assert outcome.codes == [None, None, None]
    model = AutoModelForSequenceClassification.from_pretrained(model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    found = text.split()
    parts = [" ".join(found[a:b]) for a, b in [(0, 46), (46, 98), (98, 149), (149, 200)]]
    encoded = [tokenizer(part, return_tensors="pt").input_ids for part in parts]
    with torch.inference_mode():
        scores = torch.cat([model(ids).logits.softmax(dim=-1) for ids in encoded])
    tokens = [ids.shape[1] for ids in encoded]
    assert tokens[0] == 49, "it ends with its sentence"
    expected = weighted(scores, tokens)
    long = outcome.results[1]
    assert long["id"] == "long"
    assert long["output"]["windows"] == 4
    told = {entry["label"]: entry["score"] for entry in long["output"]["labels"]}
    assert [told["LABEL_0"], told["LABEL_1"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert long["output"]["score"] == max(told.values())
    assert long["usage"]["input_tokens"] == sum(tokens)
    assert "windows" not in outcome.results[0]["output"]


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_the_mean_of_the_windows_and_then_of_length_one(engine, models_dir, normalize):
    encoder = make_masked(models_dir / f"encoder-of-windows-{normalize}")
    text = sentence(200)
    options = {"normalize": normalize}
    rows = [{"text": text}, {"text": "the cat"}]
    long, _ = engine.run(encoder, rows, task="embeddings", embedding=options, **SPLIT).results
    model, tokenizer = (
        AutoModel.from_pretrained(encoder).eval(),
        AutoTokenizer.from_pretrained(encoder),
    )
    with torch.inference_mode():
        encoded = [tokenizer(part, return_tensors="pt").input_ids for part in pieces(text)]
        means = torch.stack([model(ids).last_hidden_state[0].mean(dim=0) for ids in encoded])
    expected = weighted(means, [ids.shape[1] for ids in encoded])
    if normalize:
        expected = torch.nn.functional.normalize(expected, dim=0)
    assert long["output"]["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert (long["output"]["windows"], long["output"]["dimensions"]) == (4, 32)
    same = engine.run(
        encoder, rows, task="embeddings", embedding={**options, "encoding": "base64"}, **SPLIT
    ).results[0]
    assert isinstance(same["output"]["embedding"], str)


def test_each_word_is_tagged_where_it_has_most_text_around_it(engine, tagger):
    row = words(200)
    outcome = engine.run(
        tagger, [{"tokens": row}, {"text": " ".join(row)}], task="token-classification", **SPLIT
    )
    of_words, of_text = (row["output"] for row in outcome.results)
    # Windows of 62 words, of which 15 are also in the next one; the last one is as long.
    tags: list[str] = []
    scores: list[float] = []
    for (first, last), (start, end) in zip(
        [(0, 62), (47, 109), (94, 156), (138, 200)],
        [(0, 55), (55, 102), (102, 147), (147, 200)],
        strict=True,
    ):
        found, sure, encoded = plain(tagger, row[first:last])
        at = [encoded.word_ids().index(word - first) for word in range(start, end)]
        tags += [found[token] for token in at]
        scores += [sure[token] for token in at]
    assert of_words["tags"] == tags
    assert of_words["scores"] == pytest.approx(scores, abs=1e-5)
    assert of_words["windows"] == of_text["windows"] == 4
    assert set(tags) == set(TAGS)
    text = " ".join(row)
    expected = find_entities(tags, scores, prefixed=True)
    assert [(e["label"], e["start"], e["end"]) for e in of_words["entities"]] == [
        (e.label, e.first, e.last + 1) for e in expected
    ]
    assert [(e["label"], e["text"]) for e in of_text["entities"]] == [
        (e.label, " ".join(row[e.first : e.last + 1])) for e in expected
    ]
    assert all(text[e["start"] : e["end"]] == e["text"] for e in of_text["entities"])


def test_an_entity_across_windows_is_one(engine, models_dir):
    """A tagger that finds I-PER everywhere: the entity is the whole text."""
    path = make_tagger(models_dir / "one-entity")
    tagger = AutoModelForTokenClassification.from_pretrained(path)
    with torch.no_grad():
        tagger.classifier.weight.zero_()
        tagger.classifier.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
    tagger.save_pretrained(path)
    text = f"  {sentence(300)} \n"
    [row] = engine.run(path, [{"text": text}], task="token-classification", **SPLIT).results
    [entity] = row["output"]["entities"]
    assert (entity["label"], entity["start"], entity["end"]) == ("PER", 2, len(text) - 2)
    assert entity["text"] == text.strip()


def test_summaries_of_windows_stand_below_each_other(engine, models_dir):
    t5 = make_t5(models_dir / "t5-of-windows")
    text = sentence(200)
    # 62 tokens of text and the end token.
    fields = {"task": "summarization", "max_length": 63, "generation": {"max_new_tokens": 9}}
    [long, short] = engine.run(t5, [{"text": text}, {"text": "the cat"}], **fields, **SPLIT).results
    alone = engine.run(t5, [{"text": piece} for piece in pieces(text)], **fields)
    texts = alone.texts
    assert len(set(texts)) > 1
    assert long["output"]["text"] == "\n".join(texts)
    assert long["output"]["windows"] == 4
    reasons = {row["output"]["finish_reason"] for row in alone.results}
    assert long["output"]["finish_reason"] == ("length" if "length" in reasons else "stop")
    for name in ("input_tokens", "output_tokens"):
        assert long["usage"][name] == sum(row["usage"][name] for row in alone.results)
    assert "windows" not in short["output"]


def test_several_summaries_are_put_together_each(engine, models_dir):
    t5 = make_t5(models_dir / "t5-of-several")
    options = {"max_new_tokens": 6, "temperature": 1.5, "n": 2, "logprobs": 0, "seed": 4}
    fields = {"task": "summarization", "max_length": 63, "generation": options}
    [row] = engine.run(t5, [{"text": sentence(200)}], **fields, **SPLIT).results
    output = row["output"]
    assert [choice["text"].count("\n") for choice in output["choices"]] == [3, 3]
    assert output["text"] == output["choices"][0]["text"] != output["choices"][1]["text"]
    written = sum(len(choice["logprobs"]) for choice in output["choices"])
    assert written == row["usage"]["output_tokens"]
    # What a window draws is its own.
    drawn = engine.run(t5, [{"text": "the cat " * 100}], **fields, **SPLIT).results[0]
    assert len(set(drawn["output"]["text"].split("\n"))) > 1


def test_a_row_of_more_windows_than_are_planned_together(engine, tagger):
    row = words(30_000)
    outcome = engine.run(
        tagger,
        [{"text": " ".join(row)}, {"text": "the cat"}],
        task="token-classification",
        aggregation="none",
        **SPLIT,
    )
    long = outcome.results[0]["output"]
    assert long["windows"] > 600
    found = [entity["start"] for entity in long["entities"]]
    assert found == sorted(set(found))
    assert found[-1] > len(" ".join(row)) * 0.99


@pytest.mark.parametrize("seed", range(30))
def test_every_word_is_answered_once_and_whole(seed):
    chance = random.Random(seed)
    room = chance.choice([3, 8, 40, 64])
    longest = chance.choice([1, 2, max(2, room // 8)])
    known: list[Word] = []
    token = 0
    for at in range(chance.randrange(1, 400)):
        if chance.random() < 0.05:
            known.append(Word(at, at + 1, None))
            continue
        size = chance.randint(1, longest)
        known.append(Word(at, at + 1, token, token + size - 1))
        token += size + (chance.random() < 0.1)  # a token of no word
    if token == 0:
        return
    windows = cut_words(known, room)
    told = [word for window in windows for word in window.words]
    assert [word.start for word in told] == list(range(len(known)))
    end = max(1 + word.last for word in known if word.last is not None)
    for place, window in enumerate(windows):
        assert 0 < window.last - window.first <= room
        for word in window.words:
            whole = known[word.start]
            if whole.token is None or whole.last is None:
                assert word.token is None
                continue
            assert word.token == whole.token - window.first
            assert word.last == whole.last - window.first < window.last - window.first
            margin = room // OVERLAP // 2 - 2 * longest
            if place > 0:
                assert word.token >= margin
            if window.last < end:
                assert window.last - window.first - 1 - word.last >= margin


def test_a_word_longer_than_a_window_is_read_at_its_beginning():
    known = [Word(0, 1, 0, 0), Word(1, 2, 1, 30), Word(2, 3, 31, 31), Word(3, 4, 32, 33)]
    found = cut_words(known, 8)
    kept = {word.start: (word.token, word.last) for window in found for word in window.words}
    assert kept.keys() == {0, 1, 2, 3}
    begin, last = kept[1]
    assert last > begin and all(window.last - window.first <= 8 for window in found)


def test_text_is_cut_where_it_is_least_missed():
    text = "one two three. four five six\n\nseven eight nine ten"
    offsets = []
    for word in text.split():
        start = text.index(word, offsets[-1][1] if offsets else 0)
        offsets.append((start, start + len(word)))
    assert [seams(text, offsets)(n) for n in range(1, 7)] == [1, 1, 2, 1, 1, 3]
    assert cut(10, 16, seams(text, offsets)) == [(0, 10)]
    # Even would be 5 and 5; a paragraph ends after 6, within an eighth of the room.
    assert cut(10, 8, seams(text, offsets)) == [(0, 6), (6, 10)]
    inside = "日本。語"
    assert [seams(inside, [(i, i + 1) for i in range(4)])(n) for n in (1, 2, 3)] == [0, 0, 2]


def test_too_many_windows_are_an_error():
    with pytest.raises(RowProblem) as caught:
        cut(MOST_WINDOWS * 4, 2, lambda _: 0)
    assert caught.value.code == "too_long"
    one_each = [Word(i, i + 1, i, i) for i in range(MOST_WINDOWS + 5)]
    with pytest.raises(RowProblem, match=str(MOST_WINDOWS)):
        cut_words(one_each, 1)


def test_a_limit_without_room_is_an_error_of_the_row(engine, tagger):
    rows = [{"text": sentence(9)}]
    outcome = engine.run(tagger, rows, task="token-classification", max_length=4, **SPLIT)
    assert outcome.codes == [None], "two words a window"
    frame = frame_of(AutoTokenizer.from_pretrained(tagger))
    assert (len(frame.before), len(frame.behind)) == (1, 1)
    with pytest.raises(RowProblem) as caught:
        frame.room(2)
    assert caught.value.code == "too_long"


def test_the_error_of_a_part_is_the_rows():
    parts = Parts(lambda pieces: {"all": [piece.output["n"] for piece in pieces]})

    def part(number: int, row: int = 0) -> Prompt:
        return Prompt(row, "x", (1, 2), part=number, parts=3, owner="a")

    def answer(number: int) -> dict[str, Any]:
        return result(0, output={"n": number}, input_tokens=2)

    assert parts.file(part(2), answer(2)) is None
    assert parts.file(part(0), row_error(0, "not_finite", "first")) is None
    assert parts.file(part(1, row=1), answer(1)) is None, "another row"
    whole = parts.file(part(1), row_error(0, "out_of_memory", "second"))
    assert whole is not None and whole["error"]["code"] == "not_finite"
    assert parts.file(part(0, row=1), answer(0)) is None
    whole = parts.file(part(2, row=1), answer(2))
    assert whole is not None and whole["output"] == {"all": [0, 1, 2]}
    assert whole["usage"]["input_tokens"] == 6


@pytest.mark.parametrize(
    ("task", "word"),
    [
        ("text-generation", "continued"),
        ("text2text", "beginning"),
        ("fill-mask", "mask"),
        ("scoring", "all of the text"),
        ("reranking", "document"),
    ],
)
def test_tasks_whose_rows_are_one_are_refused(task: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"too_long 'split'.*{task}.*{word}.*truncate"):
        InferSpec.model_validate({"model": "m", "input": "x", "task": task, **SPLIT})


def test_long_rows_of_a_shard_are_tokenised_one_after_the_other(tmp_path, monkeypatch):
    """Together they would take gigabytes."""
    wordpiece(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    spec = InferSpec.model_validate({"model": "m", "input": "x", "task": "embeddings", **SPLIT})
    together: list[int] = []

    class Told(PromptEncoder):
        def _tokenise(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
            together.append(len(texts))
            return super()._tokenise(texts, add_special_tokens)

    monkeypatch.setattr("workers.ranks.engine.prompts.AT_ONCE", 100)
    texts = ["the cat", "sat on", sentence(40), "a mat", "the " * 50, "birds", "sang"]
    requests = [Request(row, None, text=text) for row, text in enumerate(texts)]
    prompts, errors = Told(tokenizer, spec, 64).encode(requests)
    assert (len(prompts), errors) == (7, [])
    assert together == [2, 1, 1, 1, 2]
    assert [list(prompt.ids) for prompt in prompts] == tokenizer(texts)["input_ids"]
