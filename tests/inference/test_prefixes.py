"""Beginnings that prompts share are computed once, and change no text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shared.specs import InferSpec
from workers.ranks.engine.generation import TextGeneration
from workers.ranks.engine.inputs import Request
from workers.ranks.engine.models import LoadedModel, ModelCache
from workers.ranks.engine.prefixes import LEAST, SHARE, Prefix, Prefixes, common
from workers.ranks.engine.prompts import Prompt, PromptEncoder
from workers.ranks.engine.runners import SlotRunner

from .conftest import text_of
from .test_generation import reference
from .tiny import finish

SYSTEM = text_of(60)
OTHER = text_of(58, 3)


class Counting(SlotRunner):
    """Counts the tokens that prompts are computed of."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded.model, loaded.slot_bytes_per_position or 0)
        self.computed = 0
        self.extended = 0

    def prefill(
        self, first: int, prompts: Sequence[Sequence[int]], known: Sequence[int] = ()
    ) -> torch.Tensor:
        self.computed += sum(map(len, prompts)) - sum(known)
        self.extended += len(known)
        return super().prefill(first, prompts, known)


def load(path: Path) -> LoadedModel:
    return ModelCache().get("text-generation", str(path), torch.float32, torch.device("cpu"))[0]


def encoded(loaded: LoadedModel, texts: Sequence[str], **generation: Any) -> list[Prompt]:
    spec = InferSpec(model="m", task="text-generation", input="x", generation=generation)
    prompts, errors = PromptEncoder(loaded.tokenizer, spec, loaded.context).encode(
        [Request(i, None, text=text) for i, text in enumerate(texts)]
    )
    assert not errors
    return prompts


def run(
    loaded: LoadedModel, prompts: Sequence[Prompt], *, rows: int = 6, cache: int = 1 << 30
) -> tuple[dict[int, Any], Counting, TextGeneration]:
    runner = Counting(loaded)
    computation = TextGeneration(loaded, runner, cache)
    computation.join("", rows)
    computation.add(prompts)
    return finish(computation), runner, computation


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_with_a_common_beginning_are_identical_to_one_by_one(engine, request, kind):
    model = request.getfixturevalue(kind)
    tokenizer = AutoTokenizer.from_pretrained(model)
    system = SYSTEM if kind == "llama" else text_of(46)
    room = 200 if kind == "llama" else 110
    texts = [f"{system} {text_of(1 + i % 7, 5 * i)}" for i in range(20)]
    texts += [text_of(1 + i % 9, i) for i in range(10)]
    assert (
        LEAST < len(tokenizer(system).input_ids) < max(len(tokenizer(t).input_ids) for t in texts)
    )
    assert max(len(tokenizer(t).input_ids) for t in texts) < room
    outcome = engine.run(
        model, [{"prompt": t} for t in texts], batch_size=6, shard_rows=30,
        generation={"max_new_tokens": 16},
    )  # fmt: skip
    expected = reference(model, texts, 16)
    assert outcome.texts == [e["text"] for e in expected]
    assert [r["usage"]["input_tokens"] for r in outcome.results] == [e["input"] for e in expected]
    # Rows that share a beginning answer differently all the same.
    assert len(set(outcome.texts[:20])) > 12


def test_a_beginning_is_computed_once(llama):
    loaded = load(llama)
    length = len(loaded.tokenizer(SYSTEM).input_ids)
    other = len(loaded.tokenizer(OTHER).input_ids)
    texts = [f"{(SYSTEM, OTHER)[i % 3 == 0]} {text_of(2 + i % 5, i)}" for i in range(60)]
    prompts = encoded(loaded, texts, max_new_tokens=12)
    results, runner, _ = run(loaded, prompts)
    own = sum(map(len, (p.ids for p in prompts))) - 40 * length - 20 * other
    # Twice where it is met by rows that are admitted together for the first time.
    assert runner.computed <= own + 2 * (length + other) + 60
    assert runner.extended >= 56
    # The same without: nothing fits into no memory for caches but one row.
    plain, alone, _ = run(loaded, prompts, cache=0)
    assert alone.extended == 0 and alone.computed == sum(len(p.ids) for p in prompts)
    assert {row: r["output"] for row, r in results.items()} == {
        row: r["output"] for row, r in plain.items()
    }


def test_texts_that_end_with_their_first_token_share_as_well(llama):
    loaded = load(llama)
    texts = [f"{SYSTEM} {text_of(2 + i % 5, i)}" for i in range(30)]
    prompts = encoded(loaded, texts, max_new_tokens=1)
    _, runner, _ = run(loaded, prompts)
    assert runner.extended >= 28


def test_the_texts_of_a_row_share_its_prompt(llama):
    loaded = load(llama)
    options = {"max_new_tokens": 10, "temperature": 0.9, "seed": 4}
    results, runner, _ = run(loaded, encoded(loaded, [SYSTEM], n=5, **options))
    assert runner.extended == 4 and runner.computed == len(loaded.tokenizer(SYSTEM).input_ids) + 4
    alone, _, _ = run(loaded, encoded(loaded, [SYSTEM], n=5, **options), rows=1, cache=0)
    assert results[0]["output"] == alone[0]["output"]
    assert len({choice["text"] for choice in results[0]["output"]["choices"]}) > 1


def test_padding_behind_a_short_rest_stays_within_the_context(gpt2):
    """A row that is known almost whole, beside one with a long rest: 110 + 40 is beyond the model's 128."""
    loaded = load(gpt2)
    ids = tuple(7 + (11 * i) % 250 for i in range(127))
    generation = encoded(loaded, ["a"], max_new_tokens=4)[0].generation
    prompts = [
        Prompt(row, None, tokens, generation=generation)
        for row, tokens in enumerate([ids[:124], (*ids[:110], 9), (*ids[:66], *ids[10:50])])
    ]
    results, runner, _ = run(loaded, prompts)
    plain, _, _ = run(loaded, prompts, cache=0)
    assert runner.extended >= 2
    assert {k: r["output"] for k, r in results.items()} == {
        k: r["output"] for k, r in plain.items()
    }


def test_memory_for_beginnings_is_bounded_and_given_back(llama):
    loaded = load(llama)
    each = loaded.slot_bytes_per_position or 0
    systems = [text_of(45 + k, k) for k in range(12)]
    texts = [f"{systems[i % 12]} {text_of(2 + i % 5, i)}" for i in range(60)]
    prompts = encoded(loaded, texts, max_new_tokens=8)
    budget = 3000 * each
    runner = Counting(loaded)
    computation = TextGeneration(loaded, runner, budget)
    computation.join("", 6)
    computation.add(prompts)
    most = 0
    results: dict[int, Any] = {}
    while computation.busy:
        for answered in computation.step().results:
            results[answered.result["row"]] = answered.result["output"]
        most = max(most, computation._prefixes.bytes)
    assert 0 < most <= SHARE * budget
    plain, _, _ = run(loaded, prompts, cache=0)
    assert results == {row: r["output"] for row, r in plain.items()}
    computation.drop_rows()
    assert computation._prefixes.bytes == 0


def test_running_out_of_memory_loses_beginnings_and_no_text(llama):
    loaded = load(llama)

    class Scarce(Counting):
        def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
            if len(tokens) * (max(positions) + 1) > 800:
                raise torch.OutOfMemoryError("no room")
            return super().decode(tokens, positions)

    texts = [f"{SYSTEM} {text_of(2 + i % 5, i)}" for i in range(16)]
    prompts = encoded(loaded, texts, max_new_tokens=12)
    computation = TextGeneration(loaded, Scarce(loaded), 1 << 30)
    computation.join("", 8)
    computation.add(prompts)
    results = finish(computation)
    plain, _, _ = run(loaded, prompts)
    assert results == plain


def states(tokens: Sequence[int]) -> Prefix:
    return Prefix(tuple(tokens), [torch.zeros(1, len(tokens), 1)])


def test_those_used_longest_ago_make_room():
    kept = Prefixes(budget=300, bytes_per_position=1)
    first, second, third = (range(k, k + 100) for k in (0, 200, 400))
    assert kept.fits(300) and not kept.fits(301)
    assert not Prefixes(300, 0).fits(1)
    for tokens in (first, second, third):
        kept.add(states(tokens))
    assert kept.longest([*first, 1])[1] == 100
    kept.add(states(range(600, 700)))
    assert kept.longest([*second, 1]) == (None, 0)
    assert kept.longest([*first, 1])[1] == 100 and kept.bytes == 300
    # A longer one takes the place of its own beginning.
    kept.add(states(range(150)))
    assert kept.longest(list(range(160)))[1] == 150 and kept.bytes <= 300
    # Part of a prefix serves as well, and a token of the prompt is always left.
    assert kept.longest([*range(80), 999, 5])[1] == 80
    assert kept.longest(list(range(150)))[1] == 149
    kept.clear()
    assert kept.bytes == 0


@given(
    st.lists(st.integers(0, 1), max_size=LEAST + 20),
    st.lists(st.integers(0, 1), max_size=LEAST + 20),
    st.integers(0, LEAST + 10),
)
def test_what_is_common_is_a_beginning_of_both(left, right, same):
    left, right = [5] * same + left, [5] * same + right
    found = common(left, right)
    assert found == 0 or found >= LEAST
    assert left[:found] == right[:found] and found <= max(0, len(right) - 1)
    if found and found < min(len(left), len(right) - 1):
        assert left[found] != right[found]
    if not found:
        assert left[:LEAST] != right[:LEAST] or len(right) <= LEAST or len(left) < LEAST


def test_a_row_that_fails_gives_back_the_places_of_all_its_texts(engine, llama):
    """Of several texts one fails: the others are dropped, and count no more against their job."""
    loaded = load(llama)
    prompts = encoded(loaded, ["a cat sat"] * 4, temperature=0.9, n=3, max_new_tokens=20)
    computation = TextGeneration(loaded, Counting(loaded), 1 << 30)
    computation.join("", 6)
    computation.add(prompts)
    computation.step()
    failed = computation.active[0].answer
    assert sum(row.answer is failed for row in computation.active) > 1
    computation._fail(failed, "invalid_generation", "for the test")
    found = finish(computation)
    assert sorted(found) == [0, 1, 2, 3]
    assert computation.turns.inside("") == 0
