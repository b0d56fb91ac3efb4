"""Texts written for others are those of ``generate``, one by one, whatever rows share a group."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.t5.modeling_t5 import T5Attention

from shared.messages import Done, Progress, Ready, ShardComputed
from shared.rows import cut_into_shards
from shared.specs import Generation, InferSpec
from workers.ranks.engine.crossing import CrossRunner
from workers.ranks.engine.groups import TextInGroups
from workers.ranks.engine.inputs import Request
from workers.ranks.engine.lockstep import CacheCost, LockstepDecoder
from workers.ranks.engine.models import LoadedModel, ModelCache
from workers.ranks.engine.prompts import Prompt, PromptEncoder
from workers.ranks.engine.text2text import TextToText

from .tiny import finish, make_bart, make_seq2seq, make_t5, sentence

TEXTS = [sentence(1 + (7 * i) % 23, i) for i in range(36)]
RULES = {
    "no_repeat_ngram_size": 2,
    "min_length": 6,
    "forced_bos_token_id": 70,
    "bad_words_ids": [[281], [192, 78]],
    "repetition_penalty": 1.3,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 1.6,
    "suppress_tokens": [187],
    "begin_suppress_tokens": [324, 336],
    "eos_token_id": [2, 279, 286, 153],
}
KINDS = ["t5", "bart", "summariser"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, models_dir: Path) -> Path:
    if request.param == "t5":
        return make_t5(models_dir / "t5")
    if request.param == "bart":
        rules = {"min_new_tokens": 3, "min_length": 9, "eos_token_id": [2, 279, 286]}
        return make_bart(models_dir / "bart", **rules)
    return make_bart(models_dir / "summariser", **RULES)


@pytest.fixture(scope="module")
def t5(models_dir: Path) -> Path:
    return make_t5(models_dir / "t5-again")


def reference(path: Path, texts: Sequence[str], max_new: int) -> list[dict[str, Any]]:
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        out = model.generate(ids, max_new_tokens=max_new, do_sample=False, num_beams=1)
        new = out[0, 1:].tolist()
        ended = new[-1] in ends
        kept = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
        forced = model.generation_config.forced_eos_token_id is not None
        reason = "stop" if ended and not (forced and len(new) == max_new) else "length"
        answers.append(
            {"text": kept.rstrip("\ufffd"), "ids": new, "input": ids.shape[1], "reason": reason}
        )
    return answers


def load(path: Path) -> LoadedModel:
    return ModelCache().get("text2text", str(path), torch.float32, torch.device("cpu"))[0]


def prompts(loaded: LoadedModel, texts: Sequence[str], generation: Generation) -> list[Prompt]:
    spec = InferSpec(model="m", task="text2text", input="x", generation=generation)
    encoder = PromptEncoder(loaded.tokenizer, spec, loaded.context)
    return encoder.encode([Request(i, None, text=text) for i, text in enumerate(texts)])[0]


def test_greedy_is_identical_to_one_by_one(engine, model):
    outcome = engine.run(
        model, [{"text": t, "id": f"r{i}"} for i, t in enumerate(TEXTS)], task="text2text",
        shard_rows=9, batch_size=7, generation={"max_new_tokens": 14},
    )  # fmt: skip
    assert outcome.failed is None, outcome.failed
    expected = reference(model, TEXTS, 14)
    assert outcome.texts == [e["text"] for e in expected]
    usage = [r["usage"] for r in outcome.results]
    assert [u["output_tokens"] for u in usage] == [len(e["ids"]) for e in expected]
    assert [u["input_tokens"] for u in usage] == [e["input"] for e in expected]
    assert [r["id"] for r in outcome.results] == [f"r{i}" for i in range(36)]
    reasons = [r["output"]["finish_reason"] for r in outcome.results]
    assert reasons == [e["reason"] for e in expected]
    # The load is no trivial one: outputs differ, some end early and some do not.
    assert len(set(outcome.texts)) > 15
    assert set(reasons) == {"stop", "length"}
    assert outcome.done.summary["output_tokens"] == sum(len(e["ids"]) for e in expected)


def test_summarization_is_the_same_by_another_name(engine, t5):
    rows = [{"body": text} for text in TEXTS[:6]]
    fields = {"text_column": "body", "generation": {"max_new_tokens": 6}}
    one = engine.run(t5, rows, task="text2text", **fields)
    other = engine.run(t5, rows, task="summarization", **fields)
    assert one.texts == other.texts and one.failed is None
    assert engine.run(t5, rows, task="summarization", **fields).ready.warm is True


def test_sampled_text_belongs_to_the_row(engine, t5):
    rows = [{"text": t} for t in TEXTS[:14]]
    fields = {"task": "text2text"}
    sampling = {"max_new_tokens": 10, "temperature": 0.9, "top_p": 0.95, "top_k": 30, "seed": 7}
    together = engine.run(t5, rows, batch_size=14, generation=sampling, **fields)
    alone = engine.run(t5, rows, batch_size=1, shard_rows=3, generation=sampling, **fields)
    assert together.texts == alone.texts
    other = engine.run(t5, rows, generation={**sampling, "seed": 8}, **fields)
    assert sum(a != b for a, b in zip(together.texts, other.texts, strict=True)) > 8
    same = engine.run(t5, [{"text": "the cat"}] * 8, generation=sampling, **fields)
    assert len(set(same.texts)) > 4


def test_stop_strings_cut_the_text_before_them(engine, model):
    free = [e["text"] for e in reference(model, TEXTS[:12], 12)]
    stop = sorted({text[3:6] for text in free if len(text) > 8 and "\ufffd" not in text[3:6]})[:8]
    assert stop
    outcome = engine.run(
        model, [{"text": t} for t in TEXTS[:12]], task="text2text",
        generation={"max_new_tokens": 12, "stop": stop},
    )  # fmt: skip
    stopped = 0
    for row, text in zip(outcome.results, free, strict=True):
        cuts = [at for s in stop if (at := text.find(s)) >= 0]
        stopped += bool(cuts)
        assert row["output"]["text"] == (text[: min(cuts)] if cuts else text)
        assert not cuts or row["output"]["finish_reason"] == "stop"
    assert stopped > 1


def test_bad_and_long_rows(engine, models_dir):
    bart = make_bart(models_dir / "long-bart", eos_token_id=[2, 279])
    rows = [
        {"text": sentence(70)},
        {"text": "the cat"},
        {"text": ""},
        {"body": "a"},
        b"{",
        {"text": 1},
    ]
    fields: dict[str, Any] = {"task": "text2text", "generation": {"max_new_tokens": 5}}
    codes = [None, "empty_text", "missing_column", "invalid_json", "missing_column"]
    refused = engine.run(bart, rows, **fields)
    assert refused.codes == ["too_long", *codes]
    assert "the model takes 64" in refused.results[0]["error"]["message"]
    cut = engine.run(bart, rows, too_long="truncate", **fields)
    assert cut.codes == [None, *codes]
    assert cut.results[0]["usage"]["input_tokens"] == 64
    # The decoder has 64 positions: more is cut there, whatever was asked for.
    fields["generation"] = {"max_new_tokens": 500}
    endless = make_bart(models_dir / "endless-bart", eos_token_id=[2])
    outcome = engine.run(endless, [{"text": "the cat"}], **fields)
    assert outcome.results[0]["usage"]["output_tokens"] == 64
    assert outcome.results[0]["output"]["finish_reason"] == "length"


def test_a_tokenizer_that_names_no_limit_sets_none(t5):
    assert load(t5).context == 1_000_000


def test_a_stop_in_the_middle_is_answered_at_once(engine, models_dir):
    endless = make_bart(models_dir / "stopped-bart", eos_token_id=[2])
    path = engine.write([{"text": t} for t in TEXTS * 20])
    fields = {"task": "text2text", "batch_size": 8, "generation": {"max_new_tokens": 60}}
    assert isinstance(engine.assign(endless, path, **fields), Ready)
    engine.order(list(cut_into_shards(path, 720)))
    report = engine.receive()
    assert isinstance(report, Progress)
    engine.stop("cancelled")
    while not isinstance(report, Done):
        assert not isinstance(report, ShardComputed)
        report = engine.receive()
    assert report.summary["stopped"] is True and report.summary["rows"] < 720


class ScarceGroups(LockstepDecoder):
    """On a device with room for so many positions of a cache."""

    positions = 0
    width = 0
    written = 0

    def encode(self, sources: Sequence[Sequence[int]]) -> None:
        self.width = max(self.width, *map(len, sources))
        self.written = 0
        super().encode(sources)

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        self.written += 1
        if len(tokens) * (self.width + self.written) > self.positions:
            raise torch.OutOfMemoryError("no room")
        return super().decode(tokens)

    def reset(self) -> None:
        self.width = 0
        super().reset()


class ScarceSlots(CrossRunner):
    """On a device with room for so many positions of a cache."""

    positions = 0

    def encode(self, first: int, sources: Sequence[Sequence[int]], slots: int = 0) -> None:
        if (first + len(sources)) * max(map(len, sources)) > self.positions:
            raise torch.OutOfMemoryError("no room")
        super().encode(first, sources, slots)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        if len(tokens) * (max(self._lengths) + max(positions) + 1) > self.positions:
            raise torch.OutOfMemoryError("no room")
        return super().decode(tokens, positions)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("way", ["slots", "groups"])
def test_out_of_memory_goes_on_with_fewer_rows(t5, temperature, way):
    loaded = load(t5)
    sampling = Generation(max_new_tokens=9, temperature=temperature)
    rows = prompts(loaded, [*TEXTS[:11], sentence(60)], sampling)

    def run(positions: int) -> dict[int, Any]:
        computation: TextToText | TextInGroups
        if way == "slots":
            runner = ScarceSlots(loaded.model, loaded.pad_token, 1)
            runner.positions = positions
            computation = TextToText(loaded, cache_bytes=1 << 30, runner=runner)
        else:
            decoder = ScarceGroups(loaded.model, loaded.pad_token)
            decoder.positions = positions
            computation = TextInGroups(loaded, cache_bytes=1 << 30, decoder=decoder)
        computation.join("", 8)
        computation.add(rows)
        return finish(computation)

    plenty, tight = run(100_000), run(60)
    assert tight.keys() == plenty.keys() == set(range(12))
    assert tight[11]["error"]["code"] == "out_of_memory"
    assert [tight[i] for i in range(11)] == [plenty[i] for i in range(11)]


Calls = list[tuple[str, int]]


def watched(loaded: LoadedModel, way: str, calls: Calls, budget: int) -> TextToText | TextInGroups:
    """A computation that notes its passes: their padded tokens of sources, and their rows."""

    class Slots(CrossRunner):
        def encode(self, first: int, sources: Sequence[Sequence[int]], slots: int = 0) -> None:
            calls.append(("encode", len(sources) * max(map(len, sources))))
            super().encode(first, sources, slots)

        def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
            calls.append(("decode", len(tokens)))
            return super().decode(tokens, positions)

    class Groups(LockstepDecoder):
        def encode(self, sources: Sequence[Sequence[int]]) -> None:
            calls.append(("encode", len(sources) * max(map(len, sources))))
            super().encode(sources)

        def decode(self, tokens: Sequence[int]) -> torch.Tensor:
            calls.append(("decode", len(tokens)))
            return super().decode(tokens)

    if way == "slots":
        runner = Slots(loaded.model, loaded.pad_token, 1)
        return TextToText(loaded, cache_bytes=budget, runner=runner)
    return TextInGroups(loaded, cache_bytes=budget, decoder=Groups(loaded.model, 0))


@pytest.mark.parametrize("way", ["slots", "groups"])
def test_caches_stay_within_the_budget_and_steps_short(t5, monkeypatch, way):
    loaded = load(t5)
    # 2 layers, keys and values, 4 heads of size 8, 4 bytes: nothing is kept of the encoder itself.
    each = 2 * 2 * 4 * 8 * 4
    assert loaded.cache_cost == CacheCost(each, each, batches=True, slots=True)
    rows = prompts(loaded, TEXTS, Generation(max_new_tokens=12))
    widest = max(len(row.ids) for row in rows)
    calls: Calls = []
    monkeypatch.setattr("workers.ranks.engine.text2text.ENCODE_TOKENS", {"cpu": 40})
    computation = watched(loaded, way, calls, loaded.cache_cost.of(6, widest, 12))
    computation.join("", 16)
    computation.add(rows[:20])
    results = [answered.result["row"] for answered in computation.step().results]
    computation.add(rows[20:])  # rows may come at any time
    while computation.busy:
        before = len(calls)
        results += [answered.result["row"] for answered in computation.step().results]
        passes = [call for call, _ in calls[before:]]
        assert passes in (["encode"], ["decode"], ["encode", "decode"])
    assert sorted(results) == list(range(len(TEXTS)))
    decoded = [size for call, size in calls if call == "decode"]
    assert max(size for call, size in calls if call == "encode") <= 40
    assert max(decoded) >= 6
    # Finished rows do not go on.
    assert any(later < earlier for earlier, later in itertools.pairwise(decoded))


def test_a_finished_row_is_replaced_at_once(t5):
    """Lockstep waits for the longest answer of a group; slots do not."""
    loaded = load(t5)
    rows = prompts(loaded, TEXTS, Generation(max_new_tokens=40, temperature=1.0))
    steps: dict[str, int] = {}
    for way in ("slots", "groups"):
        calls: Calls = []
        computation = watched(loaded, way, calls, 1 << 30)
        computation.join("", 6)
        computation.add(rows)
        results = finish(computation)
        lengths = [row["usage"]["output_tokens"] for row in results.values()]
        assert len(set(lengths)) > 4, sorted(lengths)
        decoded = [size for call, size in calls if call == "decode"]
        assert sum(decoded) == sum(lengths)
        steps[way] = len(decoded)
        if way == "slots":
            # All seats are taken as long as rows wait for one.
            taken = [size == 6 for size in decoded]
            assert taken == sorted(taken, reverse=True)
    assert steps["slots"] < 0.8 * steps["groups"]


def test_slots_for_short_rows_make_room_for_long_ones(t5, monkeypatch):
    monkeypatch.setattr("workers.ranks.engine.dense.CAPACITY_STEP", 1)
    loaded = load(t5)
    options = Generation(max_new_tokens=6)
    texts = [*["the cat"] * 24, *(sentence(60, i) for i in range(4)), *["many birds sang"] * 24]
    rows = prompts(loaded, texts, options)
    longest, shortest = max(len(row.ids) for row in rows), min(len(row.ids) for row in rows)
    budget = loaded.cache_cost.of(3, longest, 6)
    assert budget > loaded.cache_cost.of(12, shortest, 6)

    def run(cache_bytes: int) -> tuple[dict[int, Any], int]:
        runner = CrossRunner(loaded.model, loaded.pad_token, 1)
        computation = TextToText(loaded, cache_bytes=cache_bytes, runner=runner)
        results: dict[int, Any] = {}
        # One after the other, as shards come: what is added together is sorted.
        for part in (rows[:24], rows[24:28], rows[28:]):
            owner = str(part[0].row)
            computation.join(owner, 12)
            computation.add([replace(row, owner=owner) for row in part])
        most = 0
        while computation.busy:
            results |= {a.result["row"]: a.result for a in computation.step().results}
            assert runner.bytes <= cache_bytes
            most = max(most, len(computation.active))
        return results, most

    tight, most = run(budget)
    assert most > 3
    plenty, _ = run(1 << 30)
    assert tight == plenty and len(tight) == 52


def test_what_is_left_goes_out_of_its_slots_between_steps(t5):
    loaded = load(t5)
    rows = prompts(loaded, TEXTS, Generation(max_new_tokens=12))
    alone = TextToText(loaded, cache_bytes=1 << 30)
    alone.join("kept", 8)
    alone.add([replace(row, owner="kept") for row in rows[::2]])
    expected = finish(alone)

    computation = TextToText(loaded, cache_bytes=1 << 30)
    for owner in ("kept", "left"):
        computation.join(owner, 8)
    computation.add([replace(rows[i], owner="left" if i % 2 else "kept") for i in range(36)])
    answered = [each for _ in range(4) for each in computation.step().results]
    assert {row.prompt.owner for row in computation.active} == {"kept", "left"}
    computation.leave("left")
    answered += computation.step().results
    assert {row.prompt.owner for row in computation.active} == {"kept"}
    while computation.busy:
        answered += computation.step().results
    kept = {each.result["row"]: each.result for each in answered if each.owner == "kept"}
    assert kept == expected


@pytest.mark.parametrize("family", ["pegasus", "marian", "mbart", "m2m_100", "mt5", "umt5"])
def test_other_families_write_what_generate_writes(engine, models_dir, family):
    """Their positions and biases have forms of their own."""
    model = make_seq2seq(models_dir / family, family)
    assert load(model).cache_cost.slots is True
    outcome = engine.run(
        model, [{"text": t} for t in TEXTS[:16]], task="text2text", batch_size=5,
        generation={"max_new_tokens": 14},
    )  # fmt: skip
    expected = reference(model, TEXTS[:16], 14)
    assert outcome.texts == [e["text"] for e in expected]
    assert len(set(outcome.texts)) > 6
    lengths = [r["usage"]["output_tokens"] for r in outcome.results]
    assert lengths == [len(e["ids"]) for e in expected]
    assert len(set(lengths)) > 2


def test_what_cannot_be_decoded_over_slots_is_decoded_in_groups(engine, models_dir):
    model = make_seq2seq(models_dir / "led", "led")
    loaded = load(model)
    assert loaded.cache_cost.slots is False
    outcome = engine.run(
        model, [{"text": t} for t in TEXTS[:12]], task="text2text", batch_size=5,
        generation={"max_new_tokens": 10},
    )  # fmt: skip
    expected = reference(model, TEXTS[:12], 10)
    assert outcome.texts == [e["text"] for e in expected]
    assert len(set(outcome.texts)) > 4


def test_a_difference_in_the_small_computation_rules_slots_out(t5, monkeypatch):
    """A bias that is not one of distance alone, say."""
    attention = "transformers.models.t5.modeling_t5.T5Attention.compute_bias"
    original = T5Attention.compute_bias

    def odd(self, query_length, key_length, device=None, past_seen_tokens=0):
        bias = original(self, query_length, key_length, device, past_seen_tokens)
        return bias + 5.0 * (torch.arange(key_length) % 3) if self.is_decoder else bias

    monkeypatch.setattr(attention, odd)
    cost = load(t5).cache_cost
    assert cost.slots is False and cost.batches is True


@pytest.mark.parametrize("made", ["gpt2", "bert", "headless"])
def test_a_model_made_for_something_else_is_refused(engine, request, models_dir, t5, made):
    if made == "headless":
        model = Path(shutil.copytree(t5, models_dir / "headless-t5", dirs_exist_ok=True))
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(config.replace("T5ForConditionalGeneration", "T5Model"))
    else:
        model = request.getfixturevalue(made)
    outcome = engine.run(model, [{"text": "a"}], task="text2text")
    assert outcome.failed.code == "unsupported_model" and outcome.failed.hint
    assert model.name in outcome.failed.message


def test_options_of_job_and_row(engine, t5):
    rows: list[dict[str, Any]] = [{"text": text} for text in TEXTS[:6]]
    rows[2]["generation"] = {"max_new_tokens": 2, "min_new_tokens": 2}
    outcome = engine.run(
        t5, rows, task="text2text", batch_size=4, generation={"max_new_tokens": 9, "logprobs": 1}
    )
    assert outcome.codes == [None] * 6
    assert outcome.results[2]["usage"]["output_tokens"] == 2
    for row in outcome.results:
        assert len(row["output"]["logprobs"]) == row["usage"]["output_tokens"]
        assert all(e["top"][0]["logprob"] >= e["logprob"] - 1e-6 for e in row["output"]["logprobs"])
