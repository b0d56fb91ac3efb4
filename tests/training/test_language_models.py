"""Which tokens of a text, a completion, a chat are learned, how texts are packed, and what is masked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from shared.formats import DataFile
from shared.specs import TrainSpec
from tests.training.cases import CASES, Case
from tests.training.harness import Gang, make_assignment, write_rows
from tests.training.models import make_gpt2, make_masked_bert
from workers.ranks.loading import LoadError
from workers.ranks.spans import assistant_spans, runs, touching
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED, Examples, Ragged
from workers.ranks.train.failures import DataProblem, TrainingFailed
from workers.ranks.train.parallel import set_aside_unused
from workers.ranks.train.tasks import Task, open_task
from workers.ranks.train.tasks.fill_mask import FillMask

CPU = Compute(torch.device("cpu"), "gloo", None)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' and not loop.last %}..."
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    + CHATML
)


def spec(task: str, **hyperparameters: Any) -> TrainSpec:
    fields = {"task": task, "model": "m", "data": {"train": "x"}}
    return TrainSpec.model_validate({**fields, "hyperparameters": hyperparameters})


@pytest.fixture(scope="session", params=[True, False], ids=["trimmed", "untrimmed"])
def byte_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with a byte-level BPE, as Llama 3 and GPT-2 have them: most words are several tokens,
    and a token's offsets are with or without its white space."""
    folder: Path = tmp_path_factory.mktemp("byte-level")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=request.param)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["the weather in the old town", "is it raining there?", "\n\n  \n", "yes, it is"]
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)
    size = tokenizer.get_vocab_size()
    config = GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def masked_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_bert(tmp_path_factory.mktemp("masked") / "bert")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("causal") / "gpt2")


def read(
    model: Path, rows: list[dict[str, Any]], folder: Path, **hyperparameters: Any
) -> tuple[Task, Examples]:
    file = write_rows(folder / "rows.jsonl", rows)
    task = open_task(spec("text-generation", **hyperparameters), model, DataFile(file))
    return task, task.read(DataFile(file))


def learned_texts(task: Task, examples: Examples, index: int) -> list[str]:
    """Each run of learned tokens, decoded."""
    tokens, edges = examples.ragged["tokens"][index], examples.ragged["learned"][index]
    spans = edges.reshape(-1, 2).tolist()
    return [task.loaded.tokenizer.decode(tokens[begin:end]) for begin, end in spans]


def chat(*contents: str, first: str = "user") -> dict[str, Any]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": turns}


# --- which tokens are learned -------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["rendered", "marked"])
def test_the_assistants_turns_and_their_ends_are_learned(
    byte_level: Path, tmp_path: Path, template: str
) -> None:
    model = with_template(byte_level, tmp_path, template)
    said = [" it is ☔ raining\n\n", "Grüße, the town", "yes"]
    rows = [chat("how is it?", said[0], "assistant?", said[1]), chat(said[2], said[2])]
    rows[0]["messages"].insert(0, {"role": "system", "content": "be brief"})
    task, examples = read(model, rows, tmp_path)
    end = "<|im_end|>\n" if template == CHATML else "<|im_end|>"
    assert learned_texts(task, examples, 0) == [said[0] + end, said[1] + end]
    assert learned_texts(task, examples, 1) == [said[2] + end]
    whole = task.loaded.tokenizer.apply_chat_template(rows[0]["messages"], tokenize=True)
    assert examples.ragged["tokens"][0].tolist() == whole["input_ids"]


def with_template(model: Path, folder: Path, template: str | None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    copy = folder / "other"
    tokenizer.save_pretrained(copy)
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((model / name).read_bytes())
    return copy


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("how is the weather?", " it is raining"),
        ("how is the weather? ", "it is raining"),
        ("", "the old town"),
        ("is it?\n", "\n\n yes  \n"),
        ("☔ ", "☔ Grüße"),
    ],
)
def test_a_completion_and_its_end_are_learned(
    byte_level: Path, tmp_path: Path, prompt: str, completion: str
) -> None:
    rows = [{"prompt": prompt, "completion": completion}, {"text": "the old town"}]
    task, examples = read(byte_level, rows, tmp_path)
    (learned,) = learned_texts(task, examples, 0)
    # A token that holds the last of the prompt and the first of the completion is learned.
    assert learned.endswith(completion + "<|endoftext|>")
    assert (prompt + completion + "<|endoftext|>").endswith(learned)
    assert len(learned) <= len(completion + "<|endoftext|>") + 1
    assert learned_texts(task, examples, 1) == ["the old town<|endoftext|>"]


def test_targets_are_the_next_tokens_and_the_loss_is_that_of_transformers(
    gpt2: Path, tmp_path: Path
) -> None:
    rows = [{"text": "the old town"}, {"prompt": "a ", "completion": "new road"}, {"text": "a"}]
    task, examples = read(gpt2, rows, tmp_path, dropout=0.0)
    assert examples.weights.tolist() == [3, 3, 1]
    batch = task.batch(examples, [1, 0, 2], seed=0)
    ids, labels = batch.inputs["input_ids"], batch.targets["labels"]
    for row in range(3):
        for place in range(ids.shape[1]):
            learned = labels[row, place] != IGNORED
            assert not learned or labels[row, place] == ids[row, place + 1]
    assert (labels != IGNORED).sum() == examples.weights.sum()
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    model = task.loaded.model
    own = task.loss(model, batch, CPU)
    shifted = torch.cat([torch.full((3, 1), IGNORED), labels[:, :-1]], dim=1)
    theirs = model(**batch.inputs, labels=shifted).loss
    assert torch.isclose(own / examples.weights.sum(), theirs)


PREDICTING = [
    case
    for case in CASES
    if case.task in ("text-generation", "fill-mask") and "preference" not in case.spec_fields
]


@pytest.mark.parametrize("case", PREDICTING, ids=lambda case: case.name)
def test_an_examples_weight_is_what_its_batch_predicts(case: Case, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", case.rows(20, 3))
    task = open_task(
        spec(case.task, **case.hyperparameters), case.model(tmp_path / "model"), DataFile(file)
    )
    examples = task.read(DataFile(file))
    for index in range(len(examples)):
        labels = task.batch(examples, [index], seed=5).targets["labels"]
        assert int((labels != IGNORED).sum()) == examples.weights[index] > 0


def test_what_is_cut_is_counted_and_what_is_not_learned_is_told(gpt2: Path, tmp_path: Path) -> None:
    long = {"prompt": "the " * 9, "completion": "old town"}
    rows = [long, {"prompt": "the ", "completion": "old"}, {"text": "a " * 9}, {"text": "a"}]
    task, examples = read(gpt2, rows, tmp_path, max_length=5)
    assert examples.lengths.tolist() == [5, 3, 5, 2]
    assert examples.cut.tolist() == [True, False, True, False]
    assert examples.weights.tolist() == [0, 2, 4, 1]
    assert task.loaded.tokenizer.pad_token is None
    with pytest.raises(DataProblem, match="no row has anything to learn within 5 tokens"):
        read(gpt2, [long], tmp_path, max_length=5)

    file = write_rows(tmp_path / "train.jsonl", rows * 4)
    options = {"epochs": 1, "batch_size": 2, "max_length": 5}
    gang = Gang(
        make_assignment(tmp_path / "w", gpt2, file, ranks=2, task="text-generation", **options)
    ).run()
    assert gang.done.summary["steps"] == 8
    log = gang.log.read_text()
    assert "8 cut to that" in log
    assert "note: 4 training examples have nothing to learn within that length" in log
    # The tokenizer is delivered as it was found, without padding and without the cut.
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (gang.model / name).read_text() == (tmp_path / "again" / name).read_text()


@pytest.mark.parametrize("task_name", ["text-generation", "fill-mask"])
def test_an_example_with_nothing_to_predict_has_a_loss_of_0_and_gradients(
    gpt2: Path, masked_bert: Path, tmp_path: Path, task_name: str
) -> None:
    """What the loss depends on is found out with the shortest example, which may be such a one."""
    model = gpt2 if task_name == "text-generation" else masked_bert
    file = write_rows(tmp_path / "rows.jsonl", [{"text": ""}, {"text": "the old town"}])
    task = open_task(spec(task_name, label_smoothing=0.1), model, DataFile(file))
    examples = task.read(DataFile(file))
    assert examples.weights[0] == 0
    batch = task.batch(examples, [0], seed=0)
    assert set_aside_unused(task, task.loaded.model, batch, CPU) == 0
    assert float(task.loss(task.loaded.model, batch, CPU).detach()) == 0


# --- chats that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row", "code"),
    [
        (FORGETFUL, chat("a", "b", "c", "d"), "chat_template_inconsistent"),
        (STRICT, chat("a", "b", first="assistant"), "invalid_messages"),
        (CHATML, chat("a", "b", first="assistant"), "invalid_messages"),
    ],
)
def test_chats_that_the_template_does_not_take(
    byte_level: Path, tmp_path: Path, template: str, row: dict[str, Any], code: str
) -> None:
    model = with_template(byte_level, tmp_path, template)
    with pytest.raises(DataProblem) as caught:
        read(model, [{"text": "a"}, row], tmp_path)
    assert caught.value.code == code
    assert caught.value.message.startswith("rows.jsonl, line 2: the model's chat template ")


def test_a_forgetful_template_still_takes_one_answer(byte_level: Path, tmp_path: Path) -> None:
    model = with_template(byte_level, tmp_path, FORGETFUL)
    task, examples = read(model, [chat("is it?", "yes")], tmp_path)
    assert learned_texts(task, examples, 0) == ["yes\n"]


def test_a_model_without_chat_template(byte_level: Path, tmp_path: Path) -> None:
    model = with_template(byte_level, tmp_path, None)
    with pytest.raises(TrainingFailed, match=r"line 1 is a chat") as caught:
        read(model, [chat("a", "b")], tmp_path)
    assert (caught.value.code, caught.value.failure_class) == ("no_chat_template", "user_error")


@given(st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1), min_size=2))
def test_spans_of_a_template_that_concatenates(contents: list[str]) -> None:
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]

    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + "<assistant>" * prompt

    text, spans = assistant_spans(turns, render)
    said = [t["content"] for t in turns if t["role"] == "assistant" and t["content"].strip()]
    assert [text[begin:end] for begin, end in spans] == [f"{content}</>" for content in said]


@given(st.lists(st.booleans(), max_size=30))
def test_runs_say_where_the_learned_tokens_are(learned: list[bool]) -> None:
    edges = runs(np.array(learned, np.bool_))
    again = np.zeros(len(learned), np.bool_)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        assert begin < end
        again[begin:end] = True
    assert again.tolist() == learned


def test_tokens_touch_a_span_by_a_character() -> None:
    # Of "ab cd": a special token, "ab", " " (trimmed to nothing), "cd", and one over the border.
    offsets = [(0, 0), (0, 2), (3, 3), (3, 5), (1, 4)]
    assert touching(offsets, [(2, 5)]).tolist() == [False, False, True, True, True]
    assert touching(offsets, [(0, 2)]).tolist() == [False, True, False, False, True]
    assert touching(offsets, [(0, 1), (4, 5)]).tolist() == [False, True, False, True, False]
    assert touching([], [(0, 1)]).tolist() == []


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 7, 64])
def test_packed_blocks_are_the_texts_one_after_another(
    gpt2: Path, tmp_path: Path, size: int
) -> None:
    rows = [{"text": "the old town " * n} for n in (1, 3, 2, 5)] + [{"text": ""}]
    task, examples = read(gpt2, rows, tmp_path, packing=True, max_length=size)
    eos = task.loaded.tokenizer.eos_token_id
    stream = [i for row in rows for i in (*task.loaded.tokenizer(row["text"])["input_ids"], eos)]
    assert len(stream) == 3 * (1 + 3 + 2 + 5) + 5
    rest = len(stream) % size
    # A single token at the end has nothing to predict.
    used = len(stream) - (1 if rest == 1 else 0)
    assert examples.ragged["tokens"].values.tolist() == stream[:used]
    assert set(examples.lengths[:-1].tolist()) <= {size}
    assert examples.weights.tolist() == [length - 1 for length in examples.lengths]
    assert not examples.cut.any()
    assert f"blocks of {size} tokens" in task.loaded.head


def test_packing_takes_texts_alone_and_needs_an_end_of_text(
    gpt2: Path, masked_bert: Path, tmp_path: Path
) -> None:
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(DataProblem, match=r"line 2: packing puts plain texts") as caught:
        read(gpt2, rows, tmp_path, packing=True)
    assert caught.value.code == "packing_needs_text"
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.eos_token = None
    model = with_template(gpt2, tmp_path, None)
    tokenizer.save_pretrained(model)
    with pytest.raises(LoadError, match="no end-of-text token"):
        read(model, rows[:1], tmp_path, packing=True)
    # Without packing such a tokenizer will do: nothing closes a text.
    _, examples = read(model, [{"text": "a new road"}, {"text": ""}], tmp_path)
    assert examples.weights.tolist() == [2, 0]


# --- masking ------------------------------------------------------------------------------------


@cache
def _fill_mask(folder: Path, share: float) -> FillMask:
    file = write_rows(folder.parent / "one.jsonl", [{"text": "the"}])
    task = open_task(spec("fill-mask", mask_probability=share), folder, DataFile(file))
    assert isinstance(task, FillMask)
    return task


def _of(texts: list[list[int]]) -> Examples:
    count = len(texts)
    lengths = np.array([len(text) for text in texts], np.int32)
    ones, no = np.ones(count, np.int64), np.zeros(count, np.bool_)
    return Examples({"tokens": Ragged.of(texts)}, {}, lengths=lengths, weights=ones, cut=no)


@given(data=st.data(), seed=st.integers(0, 2**63 - 1), share=st.sampled_from([0.05, 0.15, 0.6]))
def test_masks_depend_on_seed_and_index_alone(
    masked_bert: Path, data: st.DataObject, seed: int, share: float
) -> None:
    task = _fill_mask(masked_bert, share)
    special = set(task.loaded.tokenizer.all_special_ids)
    size = len(task.loaded.tokenizer)
    texts = data.draw(
        st.lists(
            st.lists(st.integers(0, size - 1), min_size=1, max_size=40), min_size=1, max_size=6
        )
    )
    examples = _of(texts)
    chosen = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=6))
    batch = task.batch(examples, chosen, seed)
    shown, labels = batch.inputs["input_ids"], batch.targets["labels"]
    for row, index in enumerate(chosen):
        width = len(texts[index])
        alone = task.batch(examples, [index], seed)
        assert alone.inputs["input_ids"][0].tolist() == shown[row, :width].tolist()
        assert alone.targets["labels"][0].tolist() == labels[row, :width].tolist()
        assert (labels[row, width:] == IGNORED).all()
        candidates = sum(token not in special for token in texts[index])
        guessed = [i for i in range(width) if labels[row, i] != IGNORED]
        assert len(guessed) == min(candidates, max(1, round(share * candidates)))
        for place in range(width):
            if place in guessed:
                assert labels[row, place] == texts[index][place] not in special
                new = int(shown[row, place])
                assert new == task.mask or new not in special
            else:
                assert shown[row, place] == texts[index][place]


def test_four_in_five_are_masked_and_every_step_masks_others(masked_bert: Path) -> None:
    task = _fill_mask(masked_bert, 0.15)
    text = list(range(5, len(task.loaded.tokenizer)))
    examples = _of([text * 20] * 40)
    batch = task.batch(examples, range(40), seed=1)
    shown, labels = batch.inputs["input_ids"], batch.targets["labels"]
    guessed = labels != IGNORED
    count = int(guessed.sum())
    assert count == 40 * round(0.15 * len(text) * 20)
    assert abs(float((shown[guessed] == task.mask).sum()) / count - 0.8) < 0.03
    # One random word in 27 is the word itself.
    assert abs(float((shown == labels)[guessed].sum()) / count - (0.1 + 0.1 / len(text))) < 0.03
    other = task.batch(examples, range(40), seed=2)
    assert not torch.equal(other.targets["labels"], labels)
    assert not torch.equal(labels[0], labels[1]), "examples with one text have masks of their own"


def test_an_encoder_without_a_head_gets_a_new_one_from_the_seed(
    masked_bert: Path, tmp_path: Path
) -> None:
    bare = with_template(masked_bert, tmp_path, None)
    BertModel.from_pretrained(masked_bert, add_pooling_layer=False).save_pretrained(bare)
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "the old town"}])

    def head(seed: int) -> torch.Tensor:
        task = open_task(spec("fill-mask", seed=seed), bare, DataFile(file))
        assert task.loaded.head == "a new masked-language-model head"
        return task.loaded.model.get_parameter("cls.predictions.transform.dense.weight")

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    own = open_task(spec("fill-mask"), masked_bert, DataFile(file)).loaded
    assert own.head == "its own masked-language-model head"
    kept = AutoModelForMaskedLM.from_pretrained(masked_bert).state_dict()
    assert torch.equal(own.model.state_dict()["cls.predictions.bias"], kept["cls.predictions.bias"])


def test_what_fill_mask_cannot_use(
    bert: Path, gpt2: Path, masked_bert: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "somewhere"}, {"text": ""}])
    with pytest.raises(LoadError, match="has no mask token"):
        open_task(spec("fill-mask"), bert, DataFile(file))
    with pytest.raises(LoadError, match="of type 'gpt2' cannot fill masks"):
        open_task(spec("fill-mask"), gpt2, DataFile(file))
    with pytest.raises(DataProblem, match="no row has a token that can be masked"):
        open_task(spec("fill-mask"), masked_bert, DataFile(file)).read(DataFile(file))
