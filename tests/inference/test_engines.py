"""What every engine of text-generation has to do, whichever computes: ours in fp32 and in int8 always, vLLM where
``GPUYARD_VLLM_PYTHON`` names its interpreter. Each runs in a real engine process."""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.errors import UnsupportedModel
from shared.messages import (
    DeviceHandle,
    Done,
    Failed,
    InferAssignment,
    Ready,
    ShardComputed,
    ToRank,
)
from shared.rows import cut_into_shards
from shared.specs import InferSpec
from workers.channel import Channel
from workers.ranks.engine.choosing import VLLM_PYTHON, choose_engine
from workers.ranks.engine.process import Engine
from workers.ranks.engine.quantised import exact_products
from workers.ranks.engine.vllm_process import EngineGone, VllmProcess

from .conftest import PATIENCE, EngineProcess, Outcome, make_llama, text_of
from .test_generation import reference
from .test_sharing import Jobs

PROMPTS = [text_of(1 + (11 * i) % 29, i) for i in range(24)]
needs_vllm = pytest.mark.skipif(not os.environ.get(VLLM_PYTHON), reason=f"{VLLM_PYTHON} is not set")
needs_int8 = pytest.mark.skipif(not exact_products(), reason="no exact products of int8")


@dataclass
class Computing:
    """An engine process and the fields of a spec that choose the engine."""

    process: EngineProcess
    fields: dict[str, Any]
    exact: bool
    """Greedy text is that of Transformers, and a row the same in any batch, bit for bit."""

    def run(self, model: Path, rows: list[dict[str, Any]], **fields: Any) -> Outcome:
        outcome = self.process.run(model, rows, **self.fields, **fields)
        assert outcome.failed is None, outcome.failed
        return outcome


@pytest.fixture(
    scope="module",
    params=[
        "fp32",
        pytest.param("int8", marks=needs_int8),
        pytest.param("vllm", marks=[needs_vllm, pytest.mark.timeout(900)]),
    ],
)
def computing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Computing]:
    fields = {
        "fp32": {"engine": "gpuyard", "precision": "fp32"},
        "int8": {"engine": "gpuyard", "precision": "int8"},
        "vllm": {"engine": "vllm", "precision": "fp32"},
    }[request.param]
    process = EngineProcess(tmp_path_factory.mktemp(f"engine-{request.param}"))
    process.patience = 300 if request.param == "vllm" else process.patience
    yield Computing(process, fields, exact=request.param != "int8")
    assert process.close() == 0, process.log.read_text()


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    """Of heads of a size that vLLM's kernels on CPUs have."""
    return make_llama(models_dir / "llama-for-engines", heads=2, key_value_heads=1)


def test_every_row_has_exactly_one_answer_in_any_order(computing, model):
    rows = [{"prompt": prompt, "id": f"r{i}"} for i, prompt in enumerate(PROMPTS)]
    options: dict[str, Any] = {"generation": {"max_new_tokens": 16}, "shard_rows": 5}
    together = computing.run(model, rows, batch_size=8, **options)
    assert [row["id"] for row in together.results] == [row["id"] for row in rows]
    assert [row["row"] for row in together.results] == list(range(len(rows)))
    alone = computing.run(model, rows, batch_size=1, **options)
    turned = computing.run(model, rows[::-1], batch_size=8, **options)
    assert together.texts == alone.texts == turned.texts[::-1]
    summary = together.done.summary
    assert summary["rows"] == len(rows) and summary["errors"] == 0
    tokens = [row["usage"]["output_tokens"] for row in together.results]
    assert summary["output_tokens"] == sum(tokens) and set(tokens) - {16}
    assert summary["engine"] == computing.fields["engine"]
    if computing.exact:
        expected = reference(model, PROMPTS, 16)
        assert together.texts == [each["text"] for each in expected]
        assert tokens == [len(each["ids"]) for each in expected]
        reasons = [row["output"]["finish_reason"] for row in together.results]
        assert reasons == [each["finish_reason"] for each in expected]


def test_options_belong_to_the_row(computing, model):
    own = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 12, "temperature": 0.9, "seed": 5},
        {"max_new_tokens": 12, "temperature": 0.9, "seed": 5, "top_k": 5, "top_p": 0.8},
        {"max_new_tokens": 12, "repetition_penalty": 5.0},
        {"max_new_tokens": 12, "min_new_tokens": 12},
    ]
    rows = [{"prompt": PROMPTS[7], "generation": options} for options in own]
    first = computing.run(model, rows, batch_size=5)
    assert first.codes == [None] * len(rows)
    tokens = [row["usage"]["output_tokens"] for row in first.results]
    assert tokens[0] <= 3 and tokens[4] == 12
    # A row with a seed of its own is the same elsewhere, and whatever it is computed with.
    again = computing.run(model, [{"prompt": text_of(9)}, *rows[::-1]], batch_size=2)
    assert again.texts[:0:-1] == first.texts
    assert len(set(first.texts)) > 2


def test_stop_strings_and_tokens_end_a_text(computing, model):
    rows = [{"prompt": prompt} for prompt in PROMPTS[:12]]
    free = computing.run(model, rows, generation={"max_new_tokens": 20})
    stops = {text[len(text) // 2 : len(text) // 2 + 3] for text in free.texts if len(text) > 12}
    stop = sorted(s for s in stops if "\ufffd" not in s)[:16]
    assert len(stop) > 3
    held = computing.run(model, rows, generation={"max_new_tokens": 20, "stop": stop})
    cut = 0
    for ours, text in zip(held.results, free.texts, strict=True):
        ends = [at for s in stop if (at := text.find(s)) >= 0]
        cut += bool(ends)
        assert ours["output"]["text"] == (text[: min(ends)] if ends else text)
        assert ours["output"]["finish_reason"] == "stop" or not ends
    assert cut > 3
    first = computing.run(
        model, rows[:1], generation={"max_new_tokens": 20, "logprobs": 0, "min_new_tokens": 8}
    ).results[0]
    token = first["output"]["logprobs"][5]["id"]
    ended = computing.run(
        model, rows[:1], generation={"max_new_tokens": 20, "stop_tokens": [token]}
    )
    ids = [entry["id"] for entry in first["output"]["logprobs"]]
    assert ended.results[0]["usage"]["output_tokens"] <= ids.index(token) + 1
    assert ended.results[0]["output"]["finish_reason"] == "stop"


def test_several_texts_of_a_row(computing, model):
    options = {"max_new_tokens": 8, "temperature": 1.0, "n": 3, "seed": 1}
    rows = [{"prompt": prompt} for prompt in PROMPTS[:4]]
    together = computing.run(model, rows, batch_size=12, generation=options)
    alone = computing.run(model, rows, batch_size=1, generation=options)
    for row in together.results:
        choices = row["output"]["choices"]
        assert len(choices) == 3 and choices[0]["text"] == row["output"]["text"]
    assert len({c["text"] for r in together.results for c in r["output"]["choices"]}) > 6
    assert [r["output"] for r in together.results] == [r["output"] for r in alone.results]


def test_log_probabilities_are_the_models_own(computing, model):
    warm = {"max_new_tokens": 6, "logprobs": 4, "temperature": 0.7, "seed": 2}
    for generation in ({"max_new_tokens": 6, "logprobs": 4}, warm):
        outcome = computing.run(model, [{"prompt": p} for p in PROMPTS[:4]], generation=generation)
        for row in outcome.results:
            entries = row["output"]["logprobs"]
            assert len(entries) == row["usage"]["output_tokens"]
            for entry in entries:
                top = [other["logprob"] for other in entry["top"]]
                assert len(top) == 4 and top == sorted(top, reverse=True)
                assert entry["logprob"] <= top[0] + 1e-4 and set(entry) == {
                    "token", "id", "logprob", "top",
                }  # fmt: skip
                if "temperature" not in generation:
                    assert entry["id"] == entry["top"][0]["id"]
    # They sum to what scoring by gpuyard's own engine says of the same text, where that is exact.
    if computing.exact:
        logs = {e["id"]: e["logprob"] for e in _first_step(model, PROMPTS[0])}
        first = computing.run(
            model, [{"prompt": PROMPTS[0]}], generation={"max_new_tokens": 1, "logprobs": 4}
        ).results[0]["output"]["logprobs"][0]
        for other in first["top"]:
            assert other["logprob"] == pytest.approx(logs[other["id"]], abs=1e-3)


def _first_step(model: Path, prompt: str) -> list[dict[str, Any]]:
    ids = AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    logs = logits[0, -1].log_softmax(-1)
    return [{"id": i, "logprob": float(value)} for i, value in enumerate(logs)]


def test_a_bad_row_costs_that_row(computing, model):
    rows: list[Any] = [
        {"prompt": PROMPTS[0]},
        b"{no json",
        {"prompt": text_of(200)},
        {"prompt": ""},
        {"prompt": PROMPTS[1], "generation": {"temperature": -1}},
        {"prompt": PROMPTS[1]},
    ]
    outcome = computing.run(model, rows, generation={"max_new_tokens": 4})
    assert outcome.codes == [
        None, "invalid_json", "too_long", "empty_text", "invalid_generation", None,
    ]  # fmt: skip
    assert outcome.done.summary["errors"] == 4


def test_a_job_of_one_row_overtakes_a_long_one_and_a_stop_ends_it(computing, model):
    jobs = Jobs(computing.process)
    long_rows = [{"prompt": prompt, "generation": {"min_new_tokens": 150}} for prompt in PROMPTS]
    long = jobs.open(
        model, long_rows, shard_rows=4, batch_size=4,
        generation={"max_new_tokens": 150}, **computing.fields,
    )  # fmt: skip
    one = jobs.open(
        model, [{"prompt": "the cat"}], generation={"max_new_tokens": 4}, **computing.fields
    )
    assert len(jobs.results(one, 1)) == 1
    assert jobs.order_of_shards[-1] == one and jobs.order_of_shards.count(long) < 3
    computing.process.stop("cancelled", attempt_id=long)
    jobs.until(long, Done)
    # What the stopped job had in computation disturbs no other.
    after = computing.run(model, [{"prompt": PROMPTS[3]}], generation={"max_new_tokens": 8})
    again = computing.run(model, [{"prompt": PROMPTS[3]}], generation={"max_new_tokens": 8})
    assert after.texts == again.texts
    shards = [r for r in jobs.reports[long] if isinstance(r, ShardComputed)]
    assert len({shard.index for shard in shards}) == len(shards)


def test_the_same_shard_ordered_later_gives_the_same(computing, model):
    rows = [{"prompt": prompt} for prompt in PROMPTS[:12]]
    options: dict[str, Any] = {"generation": {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}}
    whole = computing.run(model, rows, shard_rows=4, **options)
    path = computing.process.write(rows)
    computing.process.assign(model, path, **options, **computing.fields)
    computing.process.order([list(cut_into_shards(path, 4))[1]])
    resumed = computing.process.collect(Outcome(), 1)
    assert resumed.texts == whole.texts[4:8]


def assignment(kind: str = "cuda", **fields: Any) -> InferAssignment:
    fields = {"task": "text-generation", "model": "m", "input": "x", **fields}
    return InferAssignment(
        job_id="j", attempt_id="a", attempt=1, token=1, model_path="m", input_path="x",
        device=DeviceHandle(id="d0", kind=kind, memory_bytes=1),  # type: ignore[arg-type]
        spec=InferSpec.model_validate(fields),
    )  # fmt: skip


def test_auto_is_vllm_on_cuda_devices_that_have_it(tmp_path):
    python = tmp_path / "python"
    python.touch()
    there = {VLLM_PYTHON: str(python)}
    assert choose_engine(assignment(), there).name == "vllm"
    for given, fields in [
        ({}, {}),
        ({VLLM_PYTHON: str(tmp_path / "gone")}, {}),
        (there, {"kind": "cpu"}),
        (there, {"engine": "gpuyard"}),
        (there, {"task": "scoring"}),
        (there, {"generation": {"schema": {"type": "object"}}}),
    ]:
        choice = choose_engine(assignment(**fields), given)
        assert choice.name == "gpuyard" and choice.reason
    assert choose_engine(assignment("cpu", engine="vllm"), there).name == "vllm"


def test_vllm_that_is_not_there_is_refused_where_it_is_asked_for(engine, llama, tmp_path):
    for environment in ({}, {VLLM_PYTHON: str(tmp_path / "gone")}):
        with pytest.raises(UnsupportedModel, match="engine vllm is not installed on device 'd0'"):
            choose_engine(assignment(engine="vllm"), environment)
    if not os.environ.get(VLLM_PYTHON):
        failed = engine.run(llama, [{"prompt": "the"}], engine="vllm").failed
        assert isinstance(failed, Failed) and failed.code == "engine_not_installed"
        assert "docs/engines.md" in (failed.hint or "")
    assert engine.run(llama, [{"prompt": "the"}], generation={"max_new_tokens": 2}).done
    assert "engine gpuyard: the device is a CPU" in engine.log.read_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "scoring"},
        {"precision": "int8"},
        {"generation": {"schema": {"type": "object"}}},
    ],
)
def test_what_vllm_is_not_given_is_refused_at_submission(fields):
    with pytest.raises(ValueError, match=r"vllm|gpuyard's own"):
        assignment(engine="vllm", **fields)


NO_VLLM = sys.executable
"""An interpreter without vLLM: ours."""


def test_a_model_that_vllm_does_not_load_says_why_and_auto_takes_our_own(
    llama, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv(VLLM_PYTHON, NO_VLLM)
    process = EngineProcess(tmp_path)
    failed = process.run(llama, [{"prompt": "the"}], engine="vllm").failed
    assert isinstance(failed, Failed) and failed.code == "engine_failed"
    assert "No module named 'vllm'" in failed.message
    assert process.run(llama, [{"prompt": "the"}], generation={"max_new_tokens": 2}).done
    assert process.close() == 0
    engine = Engine(Channel(socket.socketpair()[0], ToRank))
    given = assignment("cuda").model_copy(update={"model_path": str(llama)})
    loaded, warm = engine._load(given, torch.float32, torch.device("cpu"))
    assert loaded.key.engine == "gpuyard" and loaded.server is None and not warm
    told = capfd.readouterr().out
    assert "engine vllm: text-generation on a GPU\n" in told
    assert "engine gpuyard: vLLM cannot load" in told


def test_a_vllm_that_ends_by_itself_is_noticed(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nread load\necho '{\"ready\": true}'\nread row\nexit 3\n")
    stand_in.chmod(0o755)
    process = VllmProcess(stand_in, "m", torch.float32, torch.device("cpu"), 8)
    process.add(next(process.numbers), [1, 2], {})
    with pytest.raises(EngineGone, match="exit status 3"):
        process.take(PATIENCE)
    process.close()


@needs_vllm
@pytest.mark.timeout(900)
def test_vllm_ends_with_the_engine(model, tmp_path):
    process = EngineProcess(tmp_path)
    process.patience = 300
    path = process.write([{"prompt": "the cat"}])
    assert isinstance(process.assign(model, path, engine="vllm", precision="fp32"), Ready)
    children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read_text()
    (child,) = map(int, children.split())
    watched = os.pidfd_open(child)
    process.process.kill()
    gone, _, _ = select.select([watched], [], [], PATIENCE)
    os.close(watched)
    assert gone, "vLLM outlived its engine"
    process.process.wait()
