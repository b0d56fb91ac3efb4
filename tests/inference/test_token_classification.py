"""Tags are those of plain forward passes, one a word; entities are what the tags say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    ProphetNetTokenizer,
    pipeline,
)

from shared.specs import InferSpec
from workers.ranks.engine.entities import Entity, find_entities, has_prefixes
from workers.ranks.engine.inputs import Request
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.prompts import Prompt, Word
from workers.ranks.engine.tagging import Tagging
from workers.ranks.engine.words import WordEncoder, words_of_text
from workers.ranks.loading import LoadError, load_token_classifier

from .tiny import TAGS, VOCABULARY, finish, make_bart, make_masked, make_tagger, words

TASK = {"task": "token-classification"}
SPECIAL = ["Angela", "Merkels", "U.S.", "visiting", "x", "the"]
ROWS = [[*words(1 + (5 * i) % 17, i), SPECIAL[i % 6]] for i in range(40)]


@pytest.fixture(scope="module")
def tagger(models_dir: Path) -> Path:
    return make_tagger(models_dir / "tagger")


def plain(path: Path, row: list[str] | str) -> tuple[list[str], list[float], Any]:
    """A tag a token by Transformers, alone; and the encoding."""
    model = AutoModelForTokenClassification.from_pretrained(path).eval()
    encoded = AutoTokenizer.from_pretrained(path)(row, is_split_into_words=isinstance(row, list))
    with torch.inference_mode():
        best = model(torch.tensor([encoded.input_ids])).logits[0].softmax(-1).max(-1)
    labels = [model.config.id2label[i] for i in best.indices.tolist()]
    return labels, best.values.tolist(), encoded


def test_words_get_the_tag_of_their_first_token(engine, tagger):
    rows = [{"tokens": row, "id": i} for i, row in enumerate(ROWS)]
    outcome = engine.run(tagger, rows, shard_rows=13, batch_size=8, **TASK)
    assert outcome.failed is None, outcome.failed
    assert [r["id"] for r in outcome.results] == list(range(40))
    for row, result in zip(ROWS, outcome.results, strict=True):
        tags, scores, encoded = plain(tagger, row)
        firsts = [encoded.word_ids().index(i) for i in range(len(row))]
        output = result["output"]
        assert output["tags"] == [tags[at] for at in firsts]
        assert output["scores"] == pytest.approx([scores[at] for at in firsts], abs=1e-5)
        assert result["usage"]["input_tokens"] == len(encoded.input_ids)
        for entity in output["entities"]:
            place = slice(entity["start"], entity["end"])
            assert entity["text"] == " ".join(row[place])
            assert {tag[2:] for tag in output["tags"][place]} == {entity["label"]}
            mean = sum(output["scores"][place]) / len(output["scores"][place])
            assert entity["score"] == pytest.approx(mean)
        inside = sum(e["end"] - e["start"] for e in output["entities"])
        assert inside == sum(tag != "O" for tag in output["tags"])
    every = [tag for r in outcome.results for tag in r["output"]["tags"]]
    assert set(every) == set(TAGS)


def test_texts_get_entities_with_their_characters(engine, tagger):
    texts = [
        "Angela  Merkel visited the U.S., Paris\tand New York!",
        " the cat's mat ",
        "walking in\u2009Berlin: naïve façades 日本",
    ]
    outcome = engine.run(tagger, [{"text": t} for t in texts], **TASK)
    found = 0
    for text, result in zip(texts, outcome.results, strict=True):
        tags, scores, encoded = plain(tagger, text)
        firsts: dict[int, int] = {}
        for token, word in enumerate(encoded.word_ids()):
            if word is not None:
                firsts.setdefault(word, token)
        spans = [tuple(encoded.word_to_chars(word)) for word in firsts]
        expected = find_entities(
            [tags[at] for at in firsts.values()],
            [scores[at] for at in firsts.values()],
            prefixed=True,
        )
        assert result["output"].keys() == {"entities"}
        assert [(e["label"], e["start"], e["end"]) for e in result["output"]["entities"]] == [
            (e.label, spans[e.first][0], spans[e.last][1]) for e in expected
        ]
        for entity in result["output"]["entities"]:
            assert entity["text"] == text[entity["start"] : entity["end"]].strip()
            found += 1
    assert found > 4


def test_labels_without_prefixes_are_a_word_each(engine, models_dir):
    model = make_tagger(models_dir / "pos", ("NOUN", "VERB", "O", "DET", "ADP"), seed=3)
    row = words(20)
    output = engine.run(model, [{"tokens": row}], **TASK).results[0]["output"]
    named = [(i, tag) for i, tag in enumerate(output["tags"]) if tag != "O"]
    assert [(e["start"], e["end"], e["label"]) for e in output["entities"]] == [
        (i, i + 1, tag) for i, tag in named
    ]
    assert len(named) > len({tag for _, tag in named}) > 1


def test_what_is_cut_away_or_has_no_token_has_no_tag(engine, tagger):
    row = ["the", "\u200b", "", *words(80)]
    refused = engine.run(tagger, [{"tokens": row}], **TASK)
    assert refused.codes == ["too_long"]
    assert "the model takes 64" in refused.results[0]["error"]["message"]
    cut = engine.run(tagger, [{"tokens": row}], too_long="truncate", **TASK).results[0]
    tags = cut["output"]["tags"]
    assert len(tags) == len(cut["output"]["scores"]) == 83
    assert tags[1] is None and tags[2] is None and tags[0] in TAGS
    # [CLS], [SEP] and 62 words.
    assert [i for i, tag in enumerate(tags) if tag is None] == [1, 2, *range(64, 83)]
    assert [s is None for s in cut["output"]["scores"]] == [tag is None for tag in tags]
    assert cut["usage"]["input_tokens"] == 64
    short = engine.run(
        tagger, [{"text": " ".join(row)}], max_length=10, too_long="truncate", **TASK
    )
    assert all(e["end"] <= len(" ".join(row[:11])) for e in short.results[0]["output"]["entities"])
    assert short.results[0]["usage"]["input_tokens"] == 10


BAD_ROWS: list[tuple[object, str | None]] = [
    ({"tokens": ["a", 5]}, "invalid_tokens"),
    ({"tokens": ["a", None]}, "invalid_tokens"),
    ({"tokens": "the cat"}, "invalid_tokens"),
    ({"tokens": None, "text": "the cat"}, "invalid_tokens"),
    ({"tokens": []}, "empty_text"),
    ({"tokens": ["", " "]}, "empty_text"),
    ({"tokens": ["\u200b"]}, "empty_text"),
    ({"tokens": ["\ud800"]}, "invalid_utf8"),
    ({"text": 5}, "missing_column"),
    ({"text": ""}, "empty_text"),
    ({"words": ["a"]}, "missing_column"),
    (b"{", "invalid_json"),
    ({"tokens": ["the"], "text": "the cat"}, None),
]


def test_bad_rows_among_good_ones(engine, tagger):
    rows = [row for bad, _ in BAD_ROWS for row in ({"text": "the cat"}, bad)]
    outcome = engine.run(tagger, rows, shard_rows=7, **TASK)
    assert outcome.codes == [code for _, bad in BAD_ROWS for code in (None, bad)]
    assert outcome.results[-1]["output"]["tags"]  # words go before a text
    named = engine.run(
        tagger,
        [{"x": ["the", "cat"]}, {"x": "the cat"}, {"tokens": ["a"]}],
        text_column="x",
        **TASK,
    )
    assert named.codes == [None, None, "missing_column"]
    assert [len(r["output"]) for r in named.results[:2]] == [3, 1]


def test_models_that_cannot_tag_words_are_refused(engine, models_dir, tagger):
    headless = engine.run(make_masked(models_dir / "untagged"), [{"text": "a"}], **TASK)
    assert headless.failed.code == "unsupported_model"
    assert "no trained tagging head" in headless.failed.message
    slow = make_tagger(models_dir / "slow")
    for file in slow.glob("*token*"):
        file.unlink()
    (slow / "vocab.txt").unlink()
    vocabulary = slow / "prophetnet.tokenizer"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n")
    ProphetNetTokenizer(str(vocabulary)).save_pretrained(slow)
    refused = engine.run(slow, [{"text": "a"}], **TASK)
    assert refused.failed.code == "unsupported_model"
    assert "ProphetNetTokenizer" in refused.failed.message and refused.failed.hint
    assert engine.run(tagger, [{"text": "a"}], **TASK).failed is None
    assert engine.run(tagger, [{"text": "a"}], **TASK).ready.warm is True


def test_a_tagging_head_is_fresh_only_where_labels_are_given(models_dir, tagger, tmp_path):
    bare = make_masked(models_dir / "bare")
    heads = [load_token_classifier(bare, labels=("X", "Y"), seed=seed) for seed in (1, 1, 2)]
    weights = [head.model.classifier.weight for head in heads]
    assert all(head.fresh_head for head in heads)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert heads[0].model.config.id2label == {0: "X", 1: "Y"}
    kept = load_token_classifier(tagger, labels=TAGS, dropout=0.3)
    assert not kept.fresh_head and kept.model.config.hidden_dropout_prob == 0.3
    assert load_token_classifier(tagger, labels=("X", "Y")).fresh == (
        "classifier.bias", "classifier.weight",
    )  # fmt: skip
    with pytest.raises(LoadError) as caught:
        load_token_classifier(make_bart(tmp_path), labels=("X", "Y"))
    assert caught.value.code == "model_unsuitable" and "cannot tag" in caught.value.message


def test_out_of_memory_halves_the_batch(tagger, monkeypatch):
    loaded, _ = ModelCache().get(
        "token-classification", str(tagger), torch.float32, torch.device("cpu")
    )
    prompts = [
        Prompt(i, None, (7,) * n, ("a",) * n, tuple(Word(k, k + 1, k) for k in range(n)))
        for i, n in enumerate([3, 9, 4, 40, 5])
    ]
    forward = loaded.model.forward

    def scarce(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.numel() > 20:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", scarce)
    computation = Tagging(loaded)
    computation.join("", 8)
    computation.add(prompts)
    results = finish(computation)
    assert {row for row, r in results.items() if r["error"]} == {3}
    assert len(results) == 5


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-A", [("A", 0, 1), ("A", 3, 3)]),
        ("B-A B-A I-A", [("A", 0, 0), ("A", 1, 2)]),
        ("O I-A I-A", [("A", 1, 2)]),
        ("B-A I-B I-B", [("A", 0, 0), ("B", 1, 2)]),
        ("I-A O I-A", [("A", 0, 0), ("A", 2, 2)]),
        ("B-A - I-A", [("A", 0, 0), ("A", 2, 2)]),
        ("B-A I-A E-A S-A B-A E-A", [("A", 0, 2), ("A", 3, 3), ("A", 4, 5)]),
        ("U-A B-A L-A I-A", [("A", 0, 0), ("A", 1, 2), ("A", 3, 3)]),
        ("MISC MISC B-A", [("MISC", 0, 0), ("MISC", 1, 1), ("A", 2, 2)]),
        ("B-x-y I-x-y", [("x-y", 0, 1)]),
        ("O O", []),
        ("", []),
    ],
)
def test_tags_are_read_as_conlleval_reads_them(tags, expected):
    given = [None if tag == "-" else tag for tag in tags.split()]
    found = find_entities(given, [0.5] * len(given), prefixed=True)
    assert [(e.label, e.first, e.last) for e in found] == expected


def test_scores_of_entities_are_means():
    found = find_entities(["B-A", "I-A", "O"], [0.9, 0.5, 0.1], prefixed=True)
    assert found == [Entity("A", pytest.approx(0.7), 0, 1)]
    assert has_prefixes(TAGS) and not has_prefixes(["B", "I-", "NOUN", "O"])


def test_words_are_parted_at_white_space_whatever_the_tokenizer_does():
    text = "ab  cd e"
    # One "word" for all, spaces within tokens, a token of nothing first.
    offsets = [(0, 0), (0, 0), (0, 1), (1, 2), (2, 5), (5, 6), (6, 8), (0, 0)]
    found = words_of_text(text, [None, 0, 0, 0, 0, 0, 0, None], offsets)
    assert [(text[w.start : w.end], w.token) for w in found] == [("ab", 1), ("cd", 4), ("e", 6)]


def test_a_byte_level_tokenizer_counts_no_spaces_to_words(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    spec = InferSpec(model="m", input="x", **TASK)
    text = "the cat  sat, naïve 日本"
    (prompt,), _ = WordEncoder(tokenizer, spec, 99).encode([Request(0, None, text=text)])
    assert [text[w.start : w.end] for w in prompt.words] == [
        "the", "cat", "sat", ",", "naïve", "日本",
    ]  # fmt: skip
    assert json.dumps(prompt.source) == json.dumps(text)


@pytest.mark.parametrize("strategy", ["none", "first", "average", "max"])
def test_aggregation_is_that_of_the_pipeline(engine, tagger, strategy):
    # Words of one token and of several: the vocabulary has ##ed, ##ing, ##er and ##s.
    kept = [word for word in VOCABULARY if word.isalpha() and len(word) > 2]
    endings = ["", "ed", "ing", "er", "s", "eds", "inger"]
    texts = [
        " ".join(kept[(3 * i + 7 * k) % len(kept)] + endings[(i + k) % 7] for k in range(2 + i % 9))
        for i in range(30)
    ]
    theirs = pipeline("token-classification", str(tagger), aggregation_strategy=strategy)
    outcome = engine.run(tagger, [{"text": t} for t in texts], aggregation=strategy, **TASK)
    name = "entity" if strategy == "none" else "entity_group"
    found = 0
    for text, result in zip(texts, outcome.results, strict=True):
        expected = theirs(text)
        entities = result["output"]["entities"]
        found += len(entities)
        assert [(e["label"], e["start"], e["end"]) for e in entities] == [
            (e[name], e["start"], e["end"]) for e in expected
        ]
        assert [e["score"] for e in entities] == pytest.approx(
            [float(e["score"]) for e in expected], abs=1e-4
        )
        assert all(e["text"] == text[e["start"] : e["end"]] for e in entities)
    assert found > 30


def test_aggregation_decides_the_tags_of_words(engine, tagger):
    rows = [{"tokens": ["visiteded", "merkels", *words(4, i)]} for i in range(8)]
    tags = {
        strategy: [
            tuple(r["output"]["tags"])
            for r in engine.run(tagger, rows, aggregation=strategy, **TASK).results
        ]
        for strategy in ("none", "first", "average", "max")
    }
    assert tags["none"] == tags["first"]
    assert len({str(found) for found in tags.values()}) > 1
    single = engine.run(tagger, rows, aggregation="none", **TASK).results
    for row in single:
        named = [(i, tag) for i, tag in enumerate(row["output"]["tags"]) if tag != "O"]
        assert [(e["start"], e["label"]) for e in row["output"]["entities"]] == named
