"""Tiny models with a real tokenizer, and a real engine process at the end of a socket pair."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shared.messages import (
    Alive,
    ComputeShards,
    DeviceHandle,
    Done,
    Failed,
    FromRank,
    InferAssignment,
    Progress,
    Ready,
    Report,
    Shard,
    ShardComputed,
    Stop,
)
from shared.rows import cut_into_shards
from shared.specs import InferSpec
from workers.channel import Channel

torch.set_num_threads(1)
PATIENCE = 60.0
SENTENCE = (
    "the cat sat on a mat while many birds sang über dem Fluss and naïve façades 日本 🎈 stood"
)
WORDS = SENTENCE.split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LABELS = ("calm", "glad", "sad", "angry")


def text_of(words: int, start: int = 0) -> str:
    """A text of so many words, another one for every start."""
    return " ".join(WORDS[(start * 7 + 5 * i) % len(WORDS)] for i in range(words))


def _tokenizer(folder: Path, *, chat: bool = True, bert: bool = False) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text_of(60, i) for i in range(20)], trainer)
    if bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 5), ("[SEP]", 6)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.add_special_tokens({"additional_special_tokens": special[2:]})
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path, *, spread: float = 6.0, **tokenizer: bool) -> Path:
    """Save with larger weights than a fresh model has: its answers then depend on the input."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(spread)
    model.save_pretrained(folder)
    _tokenizer(folder, **tokenizer)
    return folder


def make_llama(
    folder: Path, *, seed: int = 0, chat: bool = True, heads: int = 8, key_value_heads: int = 2
) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=256,
        eos_token_id=[0, 300],
        bos_token_id=None,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[7:263] *= 0.3  # rather words than single bytes
    return _save(model, folder, chat=chat)


def make_gpt2(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128, eos_token_id=0,
        bos_token_id=0,
    )  # fmt: skip
    return _save(GPT2LMHeadModel(config), folder, chat=False)


def make_bloom(folder: Path, *, seed: int = 0) -> Path:
    """Its positions come from a 2-D mask: no model for slots."""
    torch.manual_seed(seed)
    config = BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4, eos_token_id=0)
    return _save(BloomForCausalLM(config), folder, chat=False)


def make_bert(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=1,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.value.weight *= 20.0  # the text matters, not [CLS] alone
    return _save(model, folder, bert=True)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(models_dir: Path) -> Path:
    return make_llama(models_dir / "llama")


@pytest.fixture(scope="session")
def gpt2(models_dir: Path) -> Path:
    return make_gpt2(models_dir / "gpt2")


@pytest.fixture(scope="session")
def bert(models_dir: Path) -> Path:
    return make_bert(models_dir / "bert")


START = """
import socket, sys
from shared.messages import ToRank
from workers.channel import Channel
from workers.ranks.engine import main
sys.exit(main(Channel(socket.socket(fileno=int(sys.argv[1])), ToRank)))
"""


@dataclass
class Outcome:
    """What an attempt answered."""

    ready: Ready | None = None
    shards: dict[int, ShardComputed] = field(default_factory=dict)
    progress: list[Progress] = field(default_factory=list)
    done: Done | None = None
    failed: Failed | None = None

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of all shards, in input order."""
        return [row for _, shard in sorted(self.shards.items()) for row in shard.results]

    @property
    def texts(self) -> list[str]:
        return [row["output"]["text"] for row in self.results]

    @property
    def codes(self) -> list[str | None]:
        return [row["error"] and row["error"]["code"] for row in self.results]


class EngineProcess:
    """The worker's side of an engine process."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
            )
        theirs.close()
        self.channel: Channel[Report] = Channel(ours, FromRank)
        self.attempts = 0
        self.patience = PATIENCE
        self.seconds: dict[tuple[str, int], float | None] = {}
        """What each row of an attempt took of the device; None: it was not computed."""

    @property
    def attempt_id(self) -> str:
        """Of the attempt that was opened last."""
        return f"att_{self.attempts}"

    def receive(self) -> Report:
        """What it reports next, beside signs of life."""
        while isinstance(report := self.receive_any(), Alive):
            pass
        return report

    def receive_any(self) -> Report:
        report = self.channel.receive(timeout=self.patience)
        assert report is not None, f"nothing in {self.patience} s; log:\n{self.log.read_text()}"
        if isinstance(report, ShardComputed):
            # No two runs have the same: kept beside what tests compare.
            for row in report.results:
                seconds = row["usage"].pop("device_seconds", None)
                self.seconds[report.attempt_id, row["row"]] = seconds
        return report

    def assign(self, model: Path, input_path: Path, **fields: Any) -> Report:
        """Open an attempt; the engine's first answer."""
        self.assign_only(model, input_path, **fields)
        return self.receive()

    def assign_only(self, model: Path, input_path: Path, **fields: Any) -> None:
        """Open an attempt, and wait for nothing."""
        self.attempts += 1
        device = fields.pop("device", {})
        adapter = fields.pop("adapter", None)
        fields = {"task": "text-generation", **fields}
        self.channel.send(
            InferAssignment(
                job_id="job_1",
                attempt_id=self.attempt_id,
                attempt=1,
                token=1,
                device=DeviceHandle(
                    **{"id": "cpu0", "kind": "cpu", "memory_bytes": 2 << 30, **device}
                ),
                spec=InferSpec(model=str(model), input=str(input_path), **fields),
                model_path=str(model),
                input_path=str(input_path),
                adapter_path=None if adapter is None else str(adapter),
            )
        )

    def order(self, shards: Sequence[Shard], attempt_id: str | None = None) -> None:
        self.channel.send(
            ComputeShards(attempt_id=attempt_id or self.attempt_id, shards=tuple(shards))
        )

    def stop(self, reason: str = "finished", attempt_id: str | None = None) -> None:
        self.channel.send(Stop(reason=reason, attempt_id=attempt_id or self.attempt_id))

    def write(self, rows: Sequence[dict[str, Any] | bytes]) -> Path:
        """Rows as a JSONL file; bytes are lines as they are."""
        path = self.folder / f"input-{self.attempts}-{time.monotonic_ns()}.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    def run(
        self,
        model: Path,
        rows: Sequence[dict[str, Any] | bytes],
        *,
        shard_rows: int = 8,
        **fields: Any,
    ) -> Outcome:
        """A whole attempt, all shards ordered at once."""
        path = self.write(rows)
        outcome = Outcome()
        first = self.assign(model, path, **fields)
        if isinstance(first, Failed):
            outcome.failed = first
            return outcome
        assert isinstance(first, Ready), first
        outcome.ready = first
        shards = list(cut_into_shards(path, shard_rows))
        self.order(shards)
        return self.collect(outcome, len(shards))

    def collect(self, outcome: Outcome, shards: int) -> Outcome:
        """Read until so many shards are done, then end the attempt."""
        finishing = False
        while True:
            report = self.receive()
            match report:
                case ShardComputed():
                    assert report.index not in outcome.shards, "a shard was answered twice"
                    outcome.shards[report.index] = report
                case Progress():
                    outcome.progress.append(report)
                case Done():
                    outcome.done = report
                    return outcome
                case Failed():
                    outcome.failed = report
                    return outcome
            if len(outcome.shards) == shards and not finishing:
                finishing = True
                self.stop()

    def close(self) -> int:
        """Leave; the exit status of the engine."""
        self.channel.close()
        return self.process.wait(timeout=PATIENCE)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One engine for all tests, as a device has one for all jobs. Its end is a test as well."""
    process = EngineProcess(tmp_path_factory.mktemp("engine"))
    yield process
    assert process.process.poll() is None, f"the engine died:\n{process.log.read_text()}"
    assert process.close() == 0
