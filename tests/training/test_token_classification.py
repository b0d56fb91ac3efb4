"""Words and tags become tokens and labels, and words that were cut away count for nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from seqeval.metrics import f1_score
from transformers import AutoTokenizer, EsmTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from shared.formats import DataFile
from tests.training.cases import entity_rows, part_of_speech_rows
from tests.training.harness import Gang, make_assignment, write_rows
from tests.training.test_data import spec
from workers.ranks.loading import LoadError
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.tasks import Task, open_task
from workers.ranks.train.tasks.model import tokenizer_with_pad
from workers.ranks.train.tasks.token_classification import align, outside_first, tokenizer_of_words

ROWS = [
    {"tokens": ["the", "fish", "and", "dog"], "tags": ["O", "B-PET", "I-PET", "I-PET"]},
    {"tokens": ["old", "river"], "tags": ["O", "B-PLACE"]},
]


def tagger(bert: Path, file: Path, **fields: Any) -> Task:
    return open_task(spec("token-classification", **fields), bert, DataFile(file))


def rows(folder: Path, content: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    return write_rows(folder / name, content)


def make_byte_level(folder: Path, kind: type[Any]) -> Path:
    """A byte-level BPE tokenizer, as a class of Transformers' own or as a bare tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" the old town"] * 20, trainer)
    names = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
    }
    if kind is RobertaTokenizer:
        model = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        kind(vocab=model["vocab"], merges=merges, **names).save_pretrained(folder)
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        kind(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    return folder


def test_the_first_token_of_a_word_carries_its_tag(tmp_path: Path, bert: Path) -> None:
    # The tokenizer parts words at hyphens: three tokens, and the tag is on the first.
    content = [*ROWS, {"tokens": ["the", "fish-dog", "is"], "tags": ["O", "B-PET", "O"]}]
    task = tagger(bert, rows(tmp_path, content))
    assert task.loaded.labels == ("O", "B-PET", "B-PLACE", "I-PET")
    data = task.read(DataFile(tmp_path / "rows.jsonl"))
    assert data[0]["labels"].tolist() == [IGNORED, 0, 1, 3, 3, IGNORED]
    assert data[2]["labels"].tolist() == [IGNORED, 0, 1, IGNORED, IGNORED, 0, IGNORED]
    assert data.lengths.tolist() == [6, 4, 7]
    assert data.weights.tolist() == [4, 2, 3]
    batch = task.batch(data, [1, 0], seed=0)
    assert batch.targets["labels"].tolist()[0] == [IGNORED, 0, 2, IGNORED, IGNORED, IGNORED]
    assert batch.inputs["attention_mask"].tolist()[0] == [1, 1, 1, 1, 0, 0]
    assert batch.tokens == 10


def test_words_that_are_cut_away_count_for_nothing(tmp_path: Path, bert: Path) -> None:
    task = tagger(bert, rows(tmp_path, ROWS), max_length=4)
    data = task.read(DataFile(tmp_path / "rows.jsonl"))
    assert data.lengths.tolist() == [4, 4]
    assert data.cut.tolist() == [True, False]
    assert data[0]["labels"].tolist() == [IGNORED, 0, 1, IGNORED]
    assert data.weights.tolist() == [2, 2]
    task.loaded.model.eval()
    with torch.inference_mode():
        sums = task.measure(task.loaded.model, task.batch(data, [0, 1], seed=0))
    assert sums[2] == 4
    support = task.conclude(sums).details["per_entity"]
    assert [support[kind]["support"] for kind in ("PET", "PLACE")] == [1, 1]


@given(st.lists(st.integers(1, 4), max_size=8))
def test_each_word_is_labelled_once(pieces: list[int]) -> None:
    words = [None, *(word for word, n in enumerate(pieces) for _ in range(n)), None]
    classes = [10 + word for word in range(len(pieces))]
    labels = align(words, classes)
    assert len(labels) == len(words)
    assert [label for label in labels if label != IGNORED] == classes


@pytest.mark.parametrize("kind", [RobertaTokenizer, PreTrainedTokenizerFast])
def test_a_byte_level_tokenizer_sees_words_as_within_a_text(tmp_path: Path, kind: Any) -> None:
    folder = make_byte_level(tmp_path / "model", kind)
    plain = tokenizer_with_pad(folder)(" the old town")["input_ids"]
    tokenizer = tokenizer_of_words(folder)
    split = tokenizer([["the", "old", "town"]], is_split_into_words=True)
    assert split["input_ids"] == [plain]
    assert split.word_ids(0) == [None, 0, 1, 2, None]
    # It is delivered with that.
    tokenizer.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text((folder / "config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again([["the", "old", "town"]], is_split_into_words=True)["input_ids"] == [plain]
    assert tokenizer_of_words(tmp_path / "again")(" the")["input_ids"] == again("the")["input_ids"]


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "A", "<mask>"]))
    EsmTokenizer(str(vocabulary)).save_pretrained(tmp_path / "esm")
    (tmp_path / "esm" / "config.json").write_text(json.dumps({"model_type": "esm"}))
    with pytest.raises(LoadError) as caught:
        tokenizer_of_words(tmp_path / "esm")
    assert caught.value.code == "model_unsuitable"
    assert "cannot say which word a token is of" in caught.value.message
    assert "fast tokenizer" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("row", "code", "says"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "invalid_tags", "2 words and column 'tags' 1 tags"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "invalid_tags", "must be a list of strings"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "invalid_tags", "'tokens'[1] is empty"),
        ({"tokens": ["a", "\ud800"], "tags": ["O", "O"]}, "invalid_tags", "half of a surrogate"),
        ({"tokens": [], "tags": []}, "invalid_tags", "'tokens' is an empty list"),
        ({"words": ["a"], "tags": ["O"]}, "missing_column", "there is no column 'tokens'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(
    tmp_path: Path, bert: Path, row: dict[str, Any], code: str, says: str
) -> None:
    with pytest.raises(DataProblem) as caught:
        tagger(bert, rows(tmp_path, [*ROWS, row]))
    assert caught.value.code == code
    assert caught.value.message.startswith("rows.jsonl, line 3: ")
    assert says in caught.value.message


def test_a_tag_that_training_lacks_is_named_by_its_line(tmp_path: Path, bert: Path) -> None:
    task = tagger(bert, rows(tmp_path, ROWS))
    other = rows(tmp_path, [*ROWS, {"tokens": ["a"], "tags": ["B-FOOD"]}], "other.jsonl")
    with pytest.raises(DataProblem) as caught:
        task.read(DataFile(other))
    assert caught.value.code == "unknown_label"
    assert caught.value.message.startswith("other.jsonl, line 3: label 'B-FOOD' does not occur")


def test_one_tag_alone_is_refused(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(DataProblem, match="nothing to tell apart"):
        tagger(bert, rows(tmp_path, [{"tokens": ["a"], "tags": ["O"]}]))


def test_outside_comes_first() -> None:
    assert outside_first(("B-PER", "I-PER", "O", "A")) == ("O", "A", "B-PER", "I-PER")
    assert outside_first(("NOUN", "ADJ")) == ("ADJ", "NOUN")


def test_a_new_head_follows_the_seed_and_a_trained_one_is_kept(tmp_path: Path, bert: Path) -> None:
    file = rows(tmp_path, ROWS)

    def head(task: Task) -> torch.Tensor:
        return task.loaded.model.classifier.weight.detach()

    one, two = tagger(bert, file), tagger(bert, file)
    assert torch.equal(head(one), head(two))
    assert one.loaded.head == "a new tagging head for 4 tags"
    # A model with the same tags in another order keeps its order, and its head.
    order = ("I-PET", "B-PLACE", "O", "B-PET")
    one.loaded.model.config.id2label = dict(enumerate(order))
    one.loaded.model.config.label2id = {name: index for index, name in enumerate(order)}
    one.loaded.model.save_pretrained(tmp_path / "tagger")
    one.loaded.tokenizer.save_pretrained(tmp_path / "tagger")
    kept = tagger(tmp_path / "tagger", file)
    assert kept.loaded.labels == order
    assert kept.loaded.head == "its own tagging head for 4 tags"
    assert torch.equal(head(kept), head(one))


def test_the_loss_is_a_mean_over_words_however_the_batch_is_cut(tmp_path: Path, bert: Path) -> None:
    """Four micro-batches on two ranks against one: the same weights but for rounding."""
    file = write_rows(tmp_path / "train.jsonl", entity_rows(48, 1))
    options = {"task": "token-classification", "batch_size": 16, "max_steps": 3, "dropout": 0.0}
    whole = Gang(make_assignment(tmp_path / "one", bert, file, **options)).run()
    cut = Gang(
        make_assignment(tmp_path / "two", bert, file, ranks=2, micro_batch_size=2, **options)
    ).run()
    one, two = (load_file(gang.model / "model.safetensors") for gang in (whole, cut))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_summed_over_the_words(tmp_path: Path, bert: Path, smoothing: float) -> None:
    task = tagger(bert, rows(tmp_path, ROWS), label_smoothing=smoothing)
    task.loaded.model.eval()
    data = task.read(DataFile(tmp_path / "rows.jsonl"))
    batch = task.batch(data, [0, 1], seed=0)
    compute = Compute(torch.device("cpu"), "gloo", None)
    loss = task.loss(task.loaded.model, batch, compute).detach()
    logits = task.loaded.model(**batch.inputs).logits.double()
    chances = logits.detach().log_softmax(dim=-1)
    expected = 0.0
    for row, labels in enumerate(batch.targets["labels"].tolist()):
        for place, label in enumerate(labels):
            if label != IGNORED:
                each = chances[row, place]
                expected -= (1 - smoothing) * float(each[label]) + smoothing * float(each.mean())
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [entity_rows, part_of_speech_rows])
def test_the_measures_are_those_of_the_field(tmp_path: Path, bert: Path, make: Any) -> None:
    """An untrained model's guesses, scored in batches, against seqeval and a plain count."""
    task = tagger(bert, rows(tmp_path, make(40, 3)))
    model, data = task.loaded.model.eval(), task.read(DataFile(tmp_path / "rows.jsonl"))
    sums = np.zeros(task.sums)
    truth, guess = [], []
    for start in range(0, 40, 16):
        batch = task.batch(data, range(start, min(40, start + 16)), seed=0)
        with torch.inference_mode():
            sums += task.measure(model, batch)
            predicted = model(**batch.inputs).logits.argmax(dim=-1)
        for row, labels in enumerate(batch.targets["labels"]):
            known = labels != IGNORED
            truth.append([task.loaded.labels[i] for i in labels[known].tolist()])
            guess.append([task.loaded.labels[i] for i in predicted[row][known].tolist()])
    values = task.conclude(sums).values
    pairs = [pair for t, g in zip(truth, guess, strict=True) for pair in zip(t, g, strict=True)]
    assert values["accuracy"] == pytest.approx(sum(t == g for t, g in pairs) / len(pairs))
    if make is entity_rows:
        assert task.best == "f1"
        assert values["f1"] == pytest.approx(f1_score(truth, guess, zero_division=0))
    else:
        assert task.best == "accuracy"
        assert set(values) == {"loss", "accuracy", "macro_f1"}
