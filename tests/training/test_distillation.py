"""Distillation: a student learns from its teacher what the data do not say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import softmax
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from shared.errors import InvalidSpec
from shared.formats import DataFile
from shared.lifecycle import FailureClass
from shared.messages import CheckpointWritten, Done, Report
from shared.specs import parse_spec
from tests.training.harness import (
    FILLER,
    TOPICS,
    Gang,
    make_assignment,
    make_bert,
    make_rows,
    write_rows,
)
from tests.training.models import make_masked_bert
from tests.training.test_data import spec
from workers.ranks.train.device import Compute
from workers.ranks.train.distillation import distil
from workers.ranks.train.tasks import open_task

OPTIONS: dict[str, Any] = {"epochs": 6, "batch_size": 16, "learning_rate": 5e-3, "dropout": 0.0}
CPU = Compute(device=torch.device("cpu"), backend="gloo", half=None)


def make_student(folder: Path, *, other_tokens: bool = False) -> Path:
    """Half of the teacher: 1 layer and 16 hidden. With ``other_tokens`` its words have other numbers."""
    make_bert(folder)
    if other_tokens:
        words = [*(w for t in TOPICS.values() for w in t), *FILLER]
        special = ["[CLS]", "[SEP]", "[PAD]", "[UNK]"]
        vocabulary = {word: index for index, word in enumerate([*special, *reversed(words)])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
        ).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(folder)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 16, 32
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, bert: Path, train_file: Path, validation_file: Path
) -> Path:
    work = tmp_path_factory.mktemp("teacher")
    gang = Gang(make_assignment(work, bert, train_file, validation=validation_file, **OPTIONS))
    assert gang.run().done.summary["metrics"]["accuracy"] > 0.9
    return gang.model


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose labels are chance: only a teacher knows better."""
    draw = random.Random(5)
    rows = [{**row, "label": draw.choice(sorted(TOPICS))} for row in make_rows(250, seed=11)]
    return write_rows(tmp_path_factory.mktemp("mislabelled") / "train.jsonl", rows)


def lesson(
    work: Path, student: Path, train: Path, teacher: Path, alpha: float = 1.0, **options: Any
) -> Any:
    fields = {"method": "distillation", "teacher": "t", "distillation": {"alpha": alpha}}
    return make_assignment(
        work, student, train, teacher=teacher, spec_fields=fields, **{**OPTIONS, **options}
    )


@pytest.mark.parametrize("other_tokens", [False, True])
def test_a_student_learns_from_its_teacher_alone(
    tmp_path: Path, teacher: Path, mislabelled: Path, validation_file: Path, other_tokens: bool
) -> None:
    student = make_student(tmp_path / "student", other_tokens=other_tokens)
    for alpha, good in ((1.0, True), (0.0, False)):
        assignment = lesson(
            tmp_path / str(alpha), student, mislabelled, teacher, alpha,
            ranks=2, validation=validation_file, epochs=12,
        )  # fmt: skip
        gang = Gang(assignment).run()
        accuracy = gang.done.summary["metrics"]["accuracy"]
        assert (accuracy > 0.85) == good, accuracy
    assert "teacher model, BertForSequenceClassification of" in gang.log.read_text()


def test_a_split_leaves_each_row_its_own_teaching(
    tmp_path: Path, teacher: Path, mislabelled: Path
) -> None:
    """The teacher reads with another tokenizer, and only rows that are trained on count."""
    student = make_student(tmp_path / "student", other_tokens=True)
    assignment = lesson(
        tmp_path / "work", student, mislabelled, teacher, validation_split=0.2, epochs=40
    )
    model = Gang(assignment).run().model
    task = open_task(spec(), model, DataFile(write_rows(tmp_path / "v.jsonl", make_rows(80, 2))))
    examples = task.read(DataFile(tmp_path / "v.jsonl"))
    batch = task.batch(examples, range(80), seed=0)
    right = task.loaded.model(**batch.inputs).logits.argmax(-1) == batch.targets["labels"]
    assert right.float().mean() > 0.85


def test_the_loss_is_what_the_paper_says(
    tmp_path: Path, bert: Path, teacher: Path, train_file: Path
) -> None:
    file = DataFile(train_file)
    wanted = spec(
        method="distillation", teacher="t", distillation={"temperature": 3.0, "alpha": 0.3}
    )
    task = open_task(wanted, bert, file)
    objective, _ = distil(task, wanted, teacher, file, None)
    examples = task.read(file)
    batch = objective.batch(examples, [4, 2, 9], seed=0)
    model = task.loaded.model.eval()
    loss = objective.loss(model, batch, CPU)
    ours = model(**batch.inputs).logits
    theirs = open_task(spec(), teacher, file).loaded.model.eval()(**batch.inputs).logits
    p, q = softmax(theirs / 3, -1), softmax(ours / 3, -1)
    hard = -softmax(ours, -1)[range(3), batch.targets["labels"]].log().sum()
    expected = 0.3 * 9 * (p * (p / q).log()).sum() + 0.7 * hard
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in objective._model.parameters())


def test_killed_and_resumed_it_ends_bitwise_the_same(
    tmp_path: Path, teacher: Path, train_file: Path
) -> None:
    student = make_student(tmp_path / "student")
    rules = {"every_steps": 7, "every_seconds": None}
    options: dict[str, Any] = {"alpha": 0.5, "ranks": 2, "epochs": 4, "dropout": 0.1}
    whole = Gang(lesson(tmp_path / "0", student, train_file, teacher, **options)).run()
    first = Gang(lesson(tmp_path / "1", student, train_file, teacher, checkpoint=rules, **options))
    seen: list[int] = []

    def strike(_rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten):
            seen.append(report.step)
            first.kill(1)

    first.run(on_report=strike)
    assert seen and first.exit_code(1) == -9 and not first.of(Done)
    second = Gang(
        lesson(
            tmp_path / "2", student, train_file, teacher, resume_from=first.checkpoints, **options
        )
    ).run()
    assert second.done.summary["resumed_from"]["step"] == seen[-1]
    assert second.weights == whole.weights


def test_teachers_that_cannot_teach_are_refused(
    tmp_path: Path, bert: Path, teacher: Path, train_file: Path
) -> None:
    rows = [{"text": row["text"], "label": row["label"].upper()} for row in make_rows(60, seed=4)]
    others = write_rows(tmp_path / "others.jsonl", rows)
    for number, (train, taught_by, says) in enumerate(
        [
            (others, teacher, "was not trained for these labels"),
            (train_file, bert, "was not trained for these labels"),
        ]
    ):
        gang = Gang(lesson(tmp_path / str(number), bert, train, taught_by)).run()
        failure = gang.failed
        assert failure.failure_class is FailureClass.USER_ERROR
        assert failure.code == "teacher_unsuitable"
        assert says in failure.message
    other_words = make_masked_bert(tmp_path / "masked")
    assignment = make_assignment(
        tmp_path / "mlm", make_student(tmp_path / "student"), train_file, task="fill-mask",
        teacher=other_words, spec_fields={"method": "distillation", "teacher": "t"}, max_steps=1,
    )  # fmt: skip
    failure = Gang(assignment).run().failed
    assert "mask token" in failure.message or "another vocabulary" in failure.message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": "t"}, "teacher is for method 'distillation'"),
        ({"method": "distillation"}, "needs a teacher"),
        (
            {"method": "distillation", "teacher": "t", "problem": "regression"},
            "does not apply to regression",
        ),
        ({"method": "distillation", "teacher": "t", "task": "embeddings"}, "does not apply to"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], says: str) -> None:
    base = {"kind": "train", "task": "text-classification", "model": "m", "data": {"train": "x"}}
    with pytest.raises(InvalidSpec, match=says):
        parse_spec(base | changes)
