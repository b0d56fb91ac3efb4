"""Scores are those of plain forward passes, one text at a time, over the tokens that training learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM

from shared.examples import Chat, Completion, Passage, Placed
from shared.formats import DataFile
from shared.specs import InferSpec, TrainSpec
from workers.ranks.engine import scoring
from workers.ranks.engine.head import plain_head
from workers.ranks.engine.inputs import Request
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.scoring import Scoring, ScoringEncoder, perplexity
from workers.ranks.train.tasks.text_generation import TextGeneration

from .conftest import _tokenizer, make_bloom, make_llama, text_of
from .tiny import finish

TASK = {"task": "scoring"}
TEXTS = [text_of(2 + (11 * i) % 29, i) for i in range(24)]


def reference(model_path: Path, ids: list[int]) -> list[float]:
    """The log-probability of each token but the first, of one row alone."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logs[at - 1, ids[at]]) for at in range(1, len(ids))]


def check(output: dict[str, Any], logs: list[float]) -> None:
    assert output["tokens"] == len(logs)
    assert output["logprob"] == pytest.approx(sum(logs), abs=2e-3)
    assert output["mean"] == pytest.approx(sum(logs) / len(logs), abs=1e-4)
    assert output["perplexity"] == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_texts_score_as_one_by_one(engine, request, models_dir, kind):
    model = make_bloom(models_dir / "bloom-scored") if kind == "bloom" else None
    model = model or request.getfixturevalue(kind)
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    outcome = engine.run(model, rows, shard_rows=7, batch_size=5, token_logprobs=True, **TASK)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, text in zip(outcome.results, TEXTS, strict=True):
        ids = tokenizer(text).input_ids
        logs = reference(model, ids)
        check(row["output"], logs)
        told = row["output"]["token_logprobs"]
        assert [entry["id"] for entry in told] == ids[1:]
        assert [entry["logprob"] for entry in told] == pytest.approx(logs, abs=1e-3)
        assert "".join(entry["token"] for entry in told if "\ufffd" not in entry["token"])
        assert row["usage"] == {"input_tokens": len(ids), "output_tokens": 0}
    assert [row["id"] for row in outcome.results] == list(range(24))
    assert len({round(row["output"]["mean"], 3) for row in outcome.results}) > 15
    # Not told unless asked for.
    plain = engine.run(model, rows[:1], **TASK)
    assert plain.results[0]["output"].keys() == {"logprob", "tokens", "mean", "perplexity"}


def test_scored_tokens_are_those_that_training_learns(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    # The last prompt ends inside a word: one token holds the end of it and the completion's beginning.
    pairs = [
        ("the cat ", "sat on"),
        ("the cat", " sat on a mat"),
        ("", "birds sang"),
        ("the c", "at sat"),
    ]
    turns = (("user", "the cat"), ("assistant", "sat"), ("user", "on"), ("assistant", "a mat"))
    train = TrainSpec(
        kind="train", task="text-generation", model=str(llama), data={"train": "x.jsonl"}
    )
    task = TextGeneration.open(train, llama, ())
    examples = [*(Completion(*pair) for pair in pairs), Passage(TEXTS[0]), Chat(turns[:2])]
    learned = list(
        task.encode(
            [Placed(i, e, 0) for i, e in enumerate(examples)], DataFile(Path("x.jsonl"), "jsonl")
        )
    )
    spec = InferSpec(model="m", input="x", end_of_text=True, **TASK)
    requests = [
        *(Request(i, None, text=p, completion=c) for i, (p, c) in enumerate(pairs)),
        Request(4, None, text=TEXTS[0]),
        Request(5, None, messages=[{"role": r, "content": c} for r, c in turns[:2]]),
    ]
    prompts, errors = ScoringEncoder(tokenizer, spec, 256).encode(requests)
    assert not errors
    for prompt, expected in zip(prompts, learned, strict=True):
        assert list(prompt.ids) == list(expected.tokens)
        places = [at for at in range(1, len(expected.tokens)) if expected.learned[at]]
        assert list(prompt.scored) == places
    # Without the end of text; and of a longer chat the last turn alone.
    spec = InferSpec(model="m", input="x", **TASK)
    messages = [{"role": r, "content": c} for r, c in turns]
    requests = [requests[1], Request(9, None, messages=messages)]
    (plain, chat), _ = ScoringEncoder(tokenizer, spec, 256).encode(requests)
    assert plain.ids == prompts[1].ids[:-1] and plain.scored == prompts[1].scored[:-1]
    assert tokenizer.decode([chat.ids[at] for at in chat.scored]) == "a mat<|end|>"


def test_completions_and_chats_score_as_one_by_one(engine, llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on a mat"},
    ]
    rows = [
        {"prompt": "the cat sat", "completion": " on a mat"},
        {"prompt": "the cat sat", "completion": " stood"},
        {"messages": chat},
    ]
    outcome = engine.run(llama, rows, **TASK)
    given = tokenizer("the cat sat").input_ids
    for row, fields in zip(outcome.results[:2], rows, strict=False):
        ids = tokenizer(fields["prompt"] + fields["completion"]).input_ids
        assert ids[: len(given)] == given
        check(row["output"], reference(llama, ids)[len(given) - 1 :])
    text = "<|user|>the cat<|end|><|assistant|>"
    before = tokenizer(text, add_special_tokens=False).input_ids
    ids = tokenizer(text + "sat on a mat<|end|>", add_special_tokens=False).input_ids
    check(outcome.results[2]["output"], reference(llama, ids)[len(before) - 1 :])
    # With the end of text a likelier ending shows.
    closed = engine.run(llama, rows[:1], end_of_text=True, **TASK)
    ids = [*tokenizer("the cat sat on a mat").input_ids, 0]
    check(closed.results[0]["output"], reference(llama, ids)[len(given) - 1 :])


def test_bad_rows_say_what_a_row_needs(engine, llama, models_dir):
    user, assistant = ({"role": r, "content": "a"} for r in ("user", "assistant"))
    rows = [
        {"body": "the cat"},
        {"text": "a", "completion": "b", "prompt": "c"},
        {"prompt": "the cat"},
        {"prompt": "the cat", "text": "sat"},
        {"completion": "the cat"},
        {"prompt": "the cat", "completion": " "},
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"messages": "hello"},
        {"text": "a"},
        {"messages": [user, assistant]},
    ]
    outcome = engine.run(llama, rows, **TASK)
    assert outcome.codes == [
        "missing_column", "invalid_row", "missing_column", "invalid_row", "missing_column", "empty_text",
        "invalid_messages", "invalid_messages", "invalid_messages", "nothing_to_score", None,
    ]  # fmt: skip
    message = outcome.results[0]["error"]["message"]
    assert "'text'" in message and "'completion'" in message and "'messages'" in message
    assert "what is scored" in outcome.results[6]["error"]["message"]
    plain = make_llama(models_dir / "llama-without-template", chat=False)
    assert engine.run(plain, rows[-1:], **TASK).codes == ["no_chat_template"]
    renamed = engine.run(llama, [{"body": TEXTS[3]}], text_column="body", **TASK)
    assert renamed.codes == [None]


def test_long_texts_are_refused_or_lose_their_beginning(engine, gpt2):
    long = text_of(90)
    ids = AutoTokenizer.from_pretrained(gpt2)(long).input_ids
    assert len(ids) > 128
    rows = [{"text": long}, {"text": TEXTS[0]}]
    assert engine.run(gpt2, rows, **TASK).codes == ["too_long", None]
    cut = engine.run(gpt2, rows, too_long="truncate", **TASK)
    check(cut.results[0]["output"], reference(gpt2, ids[-128:]))
    own = engine.run(gpt2, rows, too_long="truncate", max_length=20, **TASK)
    check(own.results[0]["output"], reference(gpt2, ids[-20:]))


def make_cohere(folder: Path) -> Path:
    """Its logits are scaled behind the head."""
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, logit_scale=0.25,
        pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    CohereForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def test_slices_and_heads_with_something_behind_them(llama, models_dir, monkeypatch):
    cohere = make_cohere(models_dir / "cohere")
    for model, plain in ((llama, True), (cohere, False)):
        loaded, _ = ModelCache().get("scoring", str(model), torch.float32, torch.device("cpu"))
        assert (plain_head(loaded.model) is not None) == plain
        spec = InferSpec(model="m", input="x", **TASK)
        prompts, _ = ScoringEncoder(loaded.tokenizer, spec, loaded.context).encode(
            [Request(i, None, text=text) for i, text in enumerate(TEXTS)]
        )
        # Three positions at once, also where a row has more.
        monkeypatch.setattr(scoring, "SLICE_BYTES", 3 * 4 * 320)
        computation = Scoring(loaded, tell_tokens=False, end_of_text=False)
        widest: list[int] = []

        def watch(_: Any, args: tuple[torch.Tensor], __: Any, seen: list[int] = widest) -> None:
            seen.append(args[0].shape[0])

        if plain:
            loaded.model.get_output_embeddings().register_forward_hook(watch)
        computation.join("", 8)
        computation.add(prompts)
        results = finish(computation)
        for i, prompt in enumerate(prompts):
            check(results[i]["output"], reference(model, list(prompt.ids)))  # type: ignore[arg-type]
        if plain:
            assert max(widest) == 3


def test_a_perplexity_beyond_floats_is_none():
    assert perplexity(-1000.0) is None and perplexity(0.0) == 1.0
