"""Pairs of texts become batches of an encoder-decoder; its loss, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.formats import DataFile
from tests.training.cases import answer_rows, summary_rows
from tests.training.harness import Gang as Ranks
from tests.training.harness import make_assignment, make_bart, make_t5, write_rows
from tests.training.test_data import spec
from workers.ranks.loading import LoadError
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED
from workers.ranks.train.failures import DataProblem, TrainingFailed
from workers.ranks.train.gang import Gang
from workers.ranks.train.tasks import Task, open_task
from workers.ranks.train.tasks.text2text import GENERATED, choose, shift_right

CPU = Compute(torch.device("cpu"), "gloo", None)
ALONE = Gang(0, 1, CPU.device)
ROWS = [
    {"text": "the old fish", "target": "FISH is animal"},
    {"text": "soup", "target": "SOUP"},
]
Maker = Callable[[Path], Path]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bart(tmp_path_factory.mktemp("models") / "bart")


def opened(model: Path, file: Path, task: str = "text2text", **fields: Any) -> Task:
    return open_task(spec(task, **fields), model, DataFile(file))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def test_a_batch_of_pairs(t5: Path, bart: Path, file: Path) -> None:
    task = opened(t5, file)
    data = task.read(DataFile(file))
    assert data.lengths.tolist() == [4 + 4, 2 + 2]
    assert data.weights.tolist() == [4, 2]
    assert not data.cut.any()
    batch = task.batch(data, [1, 0], seed=0)
    soup, is_, animal, fish = (
        task.loaded.tokenizer.convert_tokens_to_ids(word)
        for word in ("SOUP", "is", "animal", "FISH")
    )
    labels = [[soup, 1, IGNORED, IGNORED], [fish, is_, animal, 1]]
    assert batch.targets["labels"].tolist() == labels
    # T5 starts from the padding, BART from the end of a text.
    started = [[0, soup, 1, 0], [0, fish, is_, animal]]
    assert batch.inputs["decoder_input_ids"].tolist() == started
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.tokens == 12
    other = opened(bart, file)
    started = [[1, soup, 1, 0], [1, fish, is_, animal]]
    batch = other.batch(other.read(DataFile(file)), [1, 0], seed=0)
    assert batch.inputs["decoder_input_ids"].tolist() == started


def test_a_model_that_does_not_shift_is_shifted_for(bart: Path, file: Path) -> None:
    model = opened(bart, file).loaded.model
    labels = torch.tensor([[7, 8, 1], [9, 1, IGNORED]])
    bare: Any = SimpleNamespace(config=model.config)
    assert torch.equal(shift_right(bare, labels), shift_right(model, labels))


@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_both_sides_are_cut(tmp_path: Path, make: Maker, file: Path) -> None:
    task = opened(make(tmp_path / "m"), file, max_length=4)
    long = {"text": "the old fish and the dog", "target": "is in the very old town"}
    data = task.read(
        DataFile(write_rows(tmp_path / "long.jsonl", [long, {**long, "text": "soup"}, *ROWS]))
    )
    assert data.lengths.tolist() == [8, 6, 8, 4]
    assert data.cut.tolist() == [True, True, False, False]
    assert data[0]["target_tokens"].tolist()[-1] == 1, "what is cut still ends"


def test_learned_positions_limit_and_relative_ones_do_not(
    tmp_path: Path, t5: Path, bart: Path, file: Path
) -> None:
    assert opened(t5, file, max_length=500).loaded.max_length == 64, "the tokenizer's"
    with pytest.raises(TrainingFailed) as caught:
        opened(bart, file, max_length=65)
    assert caught.value.code == "max_length_too_large"
    unlimited = make_t5(tmp_path / "t5")
    settings = json.loads((unlimited / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 10**30
    (unlimited / "tokenizer_config.json").write_text(json.dumps(settings))
    assert opened(unlimited, file, max_length=500).loaded.max_length == 500


@pytest.mark.parametrize(
    ("row", "code", "says"),
    [
        ({"text": "a", "target": ""}, "invalid_text", "'target' is empty"),
        ({"text": "a", "target": " \n"}, "invalid_text", "'target' is empty"),
        ({"text": "a", "target": ["b"]}, "invalid_text", "must be a string, not a list"),
        ({"text": "a", "summary": "b"}, "missing_column", "there is no column 'target'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(
    tmp_path: Path, t5: Path, row: dict[str, Any], code: str, says: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(DataProblem) as caught:
        opened(t5, file).read(DataFile(file))
    assert caught.value.code == code
    assert caught.value.message.startswith("rows.jsonl, line 3: ")
    assert says in caught.value.message


def test_models_that_cannot_do_it_are_refused(tmp_path: Path, bert: Path, file: Path) -> None:
    with pytest.raises(LoadError) as caught:
        opened(bert, file)
    assert caught.value.code == "model_unsuitable"
    folder = make_t5(tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    config["decoder_start_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="does not say its decoder_start_token_id"):
        opened(folder, file)


def test_no_layer_is_dropped_in_training(tmp_path: Path, file: Path) -> None:
    folder = make_bart(tmp_path / "bart")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "encoder_layerdrop": 0.9}))
    model = opened(folder, file).loaded.model
    assert [m.layerdrop for m in model.modules() if hasattr(m, "layerdrop")] == [0.0, 0.0]
    assert model.config.encoder_layerdrop == 0.9, "the delivered model has its own"


@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_the_loss_is_the_models_own_summed_over_tokens(
    tmp_path: Path, make: Maker, file: Path
) -> None:
    task = opened(make(tmp_path / "m"), file)
    model = task.loaded.model.eval()
    batch = task.batch(task.read(DataFile(file)), [0, 1], seed=0)
    with torch.inference_mode():
        ours = task.loss(model, batch, CPU)
        theirs = model(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            labels=batch.targets["labels"],
        ).loss
        sums = task.measure(model, batch)
    assert float(ours) == pytest.approx(6 * float(theirs), rel=1e-5)
    assert sums[0] == pytest.approx(float(ours)) and sums[2] == 6
    assert task.conclude(sums).values["loss"] == pytest.approx(float(theirs), rel=1e-5)
    smoothed = opened(tmp_path / "m", file, label_smoothing=0.1)
    with torch.inference_mode():
        assert float(smoothed.loss(model, batch, CPU)) != pytest.approx(float(ours), rel=1e-4)
        assert smoothed.measure(model, batch)[0] == pytest.approx(float(ours)), "judged without"


def test_the_loss_is_a_mean_over_tokens_however_the_batch_is_cut(tmp_path: Path, t5: Path) -> None:
    """Two ranks with two micro-batches each against one: the same weights but for rounding."""
    file = write_rows(tmp_path / "train.jsonl", [*answer_rows(40, 1), *ROWS, *summary_rows(6, 1)])
    options = {"task": "text2text", "batch_size": 16, "max_steps": 3, "dropout": 0.0}
    whole = Ranks(make_assignment(tmp_path / "one", t5, file, **options)).run()
    cut = Ranks(
        make_assignment(tmp_path / "two", t5, file, ranks=2, micro_batch_size=4, **options)
    ).run()
    one, two = (load_file(gang.model / "model.safetensors") for gang in (whole, cut))
    assert whole.done and cut.done
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_what_is_written_is_the_likeliest_word_by_word(tmp_path: Path, make: Maker) -> None:
    """Whatever beams and lengths the folder asks for: against plain passes over what is there so far."""
    folder, file = make(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl", answer_rows(9, 4))
    wishes = json.loads((folder / "generation_config.json").read_text())
    wishes |= {"num_beams": 4, "min_length": 10, "no_repeat_ngram_size": 1, "length_penalty": 2.0}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    task = opened(folder, file)
    model, data = task.loaded.model, task.read(DataFile(file))
    found = task.evaluate(model, data, batch_size=4, compute=CPU, gang=ALONE)
    assert model.training, "left as it was found"
    assert found.values["generated_examples"] == 9
    model.eval()
    chosen = choose(9, GENERATED, task.spec.hyperparameters.seed)
    assert len(found.details["samples"]) == 5
    for sample, index in zip(found.details["samples"], chosen, strict=False):
        assert sample["source"] == task.loaded.tokenizer.decode(
            data[int(index)]["tokens"], skip_special_tokens=True
        )
        written = [model.config.decoder_start_token_id]
        for _ in range(4 + 8):  # the longest target's tokens, and some to spare
            with torch.inference_mode():
                logits = model(
                    input_ids=torch.from_numpy(data[int(index)]["tokens"].astype("int64"))[None],
                    decoder_input_ids=torch.tensor([written]),
                ).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == 1:
                break
        expected = task.loaded.tokenizer.decode(written, skip_special_tokens=True).strip()
        assert sample["generated"] == expected


def test_ranks_share_the_writing(tmp_path: Path, t5: Path) -> None:
    rows = answer_rows(GENERATED + 3, 5)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = opened(t5, file)
    data = task.read(DataFile(file))

    def judged(gang: Gang) -> Any:
        return task.evaluate(task.loaded.model, data, batch_size=64, compute=CPU, gang=gang)

    whole = judged(ALONE)
    # Without a store a rank's sums stay its own: its part of the whole.
    parts = [judged(Gang(rank, 2, CPU.device)) for rank in range(2)]
    assert whole.values["generated_examples"] == GENERATED
    for name in ("rouge1", "rouge2", "rougeL", "exact_match"):
        assert sum(p.values[name] for p in parts) == pytest.approx(whole.values[name])
    assert len(parts[0].details["samples"]) == 5
    assert parts[1].details["samples"] == [], "rank 0 alone writes them"


def test_the_choice_is_fixed_by_the_seed() -> None:
    one, two, other = (choose(500, 200, seed).tolist() for seed in (1, 1, 2))
    assert one == two != other
    assert len(set(one)) == 200 and max(one) >= 200
    assert sorted(choose(3, 200, 1).tolist()) == [0, 1, 2]
