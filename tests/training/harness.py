"""Runs training ranks as real processes, without a worker: the harness plays the worker's side.

``Gang(assignment).run()`` starts one process a rank (forked from a parent that has imported torch
already), answers the rendezvous, and collects every report. ``on_report`` lets a test act at an event.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import select
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

from shared.formats import DataFile, format_of
from shared.messages import (
    CheckpointRef,
    CheckpointWritten,
    DeviceHandle,
    Done,
    Failed,
    FromRank,
    JoinRendezvous,
    Listening,
    Metric,
    Preempt,
    Report,
    Stop,
    ToRank,
    TrainAssignment,
)
from shared.specs import TrainSpec
from workers.channel import Channel, ChannelClosed

DEADLINE = 150.0
"""Seconds. A run takes one to five; on a machine that is busy with more, much longer."""
SPARE_MEMORY_VARIABLE = "TEST_SPARE_MEMORY"
"""Bytes of address space that a rank may take beyond what it has at its start."""
R = TypeVar("R")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "workers.ranks.train",
        "transformers.models.bart.modeling_bart",
        "transformers.models.bert.modeling_bert",
        "transformers.models.t5.modeling_t5",
        "tests.training.harness",
    ]
)


def run_rank(sock: socket.socket, log: str, environment: dict[str, str]) -> None:
    """What a rank's process runs; its exit code is what ``main`` returned."""
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment})
    # As Python itself reads it at its start, which for a forked process is over.
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from workers.ranks.train import main

    if SPARE_MEMORY_VARIABLE in environment:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = in_use + int(environment[SPARE_MEMORY_VARIABLE])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    code = main(Channel(sock, ToRank))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def in_another_process(function: Callable[..., R], *arguments: Any) -> R:
    """Call a function in a process that shares no state with this one."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(DEADLINE), "no answer"
    result: R = ours.recv()
    process.join(DEADLINE)
    return result


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


@dataclass
class Gang:
    """The ranks of one attempt. ``join`` False leaves the order to join unsent."""

    assignment: TrainAssignment
    environment: dict[str, str] = field(default_factory=dict)
    join: bool = True
    ranks: Sequence[int] | None = None
    """Which ranks to start; all of them by default."""
    differing: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By rank: fields of its assignment that are not those of the others."""
    deadline: float = DEADLINE
    """Seconds that ``run`` waits for its ranks."""

    def __post_init__(self) -> None:
        self.reports: list[tuple[int, Report]] = []
        self.processes: dict[int, BaseProcess] = {}
        self._channels: dict[int, Channel[Any]] = {}
        self._sockets: dict[int, socket.socket] = {}

    def own_memory(self, rank: int) -> int:
        """Bytes of memory that are the rank's own, not of files that it has mapped; 0 once it is gone."""
        try:
            status = Path(f"/proc/{self.processes[rank].pid}/status").read_text()
        except (OSError, KeyError):
            return 0
        return int(status.split("RssAnon:")[1].split()[0]) * 1024 if "RssAnon:" in status else 0

    @property
    def log(self) -> Path:
        return Path(self.assignment.work_dir) / "rank.log"

    def start(self) -> None:
        work = Path(self.assignment.work_dir)
        (work / "checkpoints").mkdir(parents=True, exist_ok=True)
        (work / "artifacts").mkdir(exist_ok=True)
        ranks = range(self.assignment.world_size) if self.ranks is None else self.ranks
        for rank in ranks:
            ours, theirs = socket.socketpair()
            process = _context.Process(
                target=run_rank, args=(theirs, str(self.log), self.environment), daemon=True
            )
            process.start()
            theirs.close()
            channel: Channel[Any] = Channel(ours, FromRank)
            own = self.differing.get(rank, {})
            channel.send(self.assignment.model_copy(update={"rank": rank, **own}))
            self.processes[rank], self._channels[rank] = process, channel
            self._sockets[rank] = ours

    def run(self, on_report: Callable[[int, Report], None] | None = None) -> Gang:
        """Start, and collect reports until every rank is gone; fails after ``deadline`` seconds."""
        self.start()
        try:
            self._collect(on_report or (lambda _rank, _report: None))
        finally:
            for process in self.processes.values():
                process.kill()
                process.join(10)
            for channel in self._channels.values():
                channel.close()
        return self

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        self.processes[rank].kill()

    def order_stop(self, rank: int, reason: str = "cancelled") -> None:
        self._channels[rank].send(Stop(reason=reason))

    def ask_back(self, rank: int, seconds: float = 60.0) -> None:
        """The worker wants the rank's device back."""
        self._channels[rank].send(Preempt(reason="the host is needed", seconds=seconds))

    def hang_up(self, rank: int) -> None:
        """The worker's end of the channel is gone, as when the worker is killed."""
        self._sockets[rank].shutdown(socket.SHUT_RDWR)

    def exit_code(self, rank: int) -> int | None:
        return self.processes[rank].exitcode

    def of(self, kind: type[R]) -> list[R]:
        """The reports of one kind, of all ranks, in the order they came."""
        return [report for _, report in self.reports if isinstance(report, kind)]

    @property
    def done(self) -> Done:
        """Rank 0's; fails with the log where the gang did not get there."""
        found = [r for rank, r in self.reports if rank == 0 and isinstance(r, Done)]
        assert found, f"not done: {self.of(Failed)}\n{self.log.read_text()}"
        return found[0]

    @property
    def failed(self) -> Failed:
        """The first failure that was reported."""
        failures = self.of(Failed)
        assert failures, f"no failure\n{self.log.read_text()}"
        return failures[0]

    @property
    def checkpoints(self) -> tuple[CheckpointRef, ...]:
        """Newest first, as the next attempt is given them."""
        return tuple(_reference(report) for report in reversed(self.of(CheckpointWritten)))

    @property
    def best(self) -> tuple[CheckpointRef, ...]:
        """Those of the checkpoints that are the best model of their time, newest first."""
        written = self.of(CheckpointWritten)
        return tuple(_reference(report) for report in reversed(written) if report.best)

    @property
    def model(self) -> Path:
        return Path(self.assignment.work_dir) / "artifacts" / "model"

    @property
    def weights(self) -> str:
        """SHA-256 of the delivered weights."""
        return hashlib.sha256((self.model / "model.safetensors").read_bytes()).hexdigest()

    def _collect(self, on_report: Callable[[int, Report], None]) -> None:
        deadline = time.monotonic() + self.deadline
        open_channels = dict(self._channels)
        while open_channels:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"ranks are not done: {self.reports[-3:]}\n{self.log.read_text()}"
                )
            ready, _, _ = select.select(list(open_channels.values()), [], [], left)
            for rank, channel in list(open_channels.items()):
                if channel in ready:
                    self._receive(rank, channel, open_channels, on_report)
        for process in self.processes.values():
            process.join(max(0.1, deadline - time.monotonic()))

    def _receive(
        self,
        rank: int,
        channel: Channel[Any],
        open_channels: dict[int, Channel[Any]],
        on_report: Callable[[int, Report], None],
    ) -> None:
        try:
            while (report := channel.receive(0)) is not None:
                self.reports.append((rank, report))
                if isinstance(report, Listening) and self.join:
                    self._order_join(f"127.0.0.1:{report.port}")
                on_report(rank, report)
        except ChannelClosed:
            del open_channels[rank]

    def _order_join(self, address: str) -> None:
        for channel in self._channels.values():
            channel.send(JoinRendezvous(address=address))


def _reference(report: CheckpointWritten) -> CheckpointRef:
    return CheckpointRef(
        id=f"ckpt_{report.step}", step=report.step, path=report.path, manifest=report.manifest
    )


OF_THE_MACHINE = frozenset({"examples_per_second", "tokens_per_second", "memory_bytes"})


def curve(*attempts: Gang) -> dict[tuple[str, int], dict[str, float]]:
    """What was measured after each step, by later attempts over what earlier ones had measured; but how
    fast they were and what memory they took."""
    return {
        (m.split, m.step): {n: v for n, v in m.values.items() if n not in OF_THE_MACHINE}
        for gang in attempts
        for m in gang.of(Metric)
    }


def make_assignment(
    work_dir: Path,
    model: Path,
    train: Path,
    *,
    ranks: int = 1,
    task: str = "text-classification",
    problem: str = "single-label",
    spec_fields: dict[str, Any] | None = None,
    validation: Path | None = None,
    validation_split: float | None = None,
    checkpoint: dict[str, Any] | None = None,
    columns: dict[str, str] | None = None,
    early_stopping: dict[str, Any] | None = None,
    resume_from: Iterable[CheckpointRef] = (),
    best_from: Iterable[CheckpointRef] = (),
    cache: Path | None = None,
    parallelism: Literal["ddp", "fsdp"] = "ddp",
    teacher: Path | None = None,
    micro_batch: int | None = None,
    **hyperparameters: Any,
) -> TrainAssignment:
    """An assignment as the worker would make it; options not named are hyperparameters."""
    data: dict[str, Any] = {"train": str(train), "columns": columns or {}}
    if validation is not None:
        data["validation"] = str(validation)
    if validation_split is not None:
        data["validation_split"] = validation_split
    spec = TrainSpec.model_validate(
        {
            "kind": "train",
            "task": task,
            "problem": problem,
            "model": model.name,
            "data": data,
            "hyperparameters": hyperparameters,
            "resources": {"devices": ranks},
            "checkpoint": checkpoint or {"every_seconds": None},
            "early_stopping": early_stopping,
            **(spec_fields or {}),
        }
    )
    return TrainAssignment(
        job_id="job_test",
        attempt_id="attempt_test",
        attempt=1,
        token=1,
        rank=0,
        world_size=ranks,
        device=DeviceHandle(id="cpu0@test", kind="cpu", memory_bytes=1 << 30, threads=1),
        spec=spec,
        model_path=str(model),
        teacher_path=None if teacher is None else str(teacher),
        train_path=str(train),
        train_format=format_of(train.name),
        validation_path=None if validation is None else str(validation),
        validation_format=format_of(validation.name) if validation else "jsonl",
        cache_dir=None if cache is None else str(cache),
        work_dir=str(work_dir),
        micro_batch=micro_batch,
        parallelism=parallelism,
        resume_from=tuple(resume_from),
        best_from=tuple(best_from),
    )


TOPICS = {
    "animal": ["fish", "dog", "cat", "bird", "horse"],
    "food": ["bread", "soup", "rice", "cake", "apple"],
    "place": ["town", "river", "hill", "lake", "road"],
}
FILLER = ["the", "a", "of", "with", "very", "old", "new", "small", "large", "and", "is", "in"]


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of 3 to 24 words; a few words of the topic give the label away."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(sorted(TOPICS))
        words = draw.choices(FILLER, k=draw.randint(2, 22))
        words += draw.choices(TOPICS[label], k=draw.randint(2, 4))
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_bert(folder: Path, seed: int = 0) -> Path:
    """A BERT encoder of 2 layers and 32 hidden, untrained, with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(w for t in TOPICS.values() for w in t)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_from_scratch(folder: str, spec: TrainSpec, train: str) -> str:
    """The initial model of a spec, in a folder; SHA-256 of all that is in it."""
    from workers.ranks.train.scratch import make_model, make_tokenizer

    tokenizer = make_tokenizer(spec, DataFile(Path(train), "jsonl"))
    tokenizer.save_pretrained(folder)
    make_model(spec, tokenizer).save_pretrained(folder)
    sha = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        sha.update(file.name.encode() + file.read_bytes())
    return sha.hexdigest()


def make_t5(folder: Path, seed: int = 0) -> Path:
    """A T5 of 2 + 2 layers and 32 hidden, untrained: relative positions, one embedding for all."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    size = _save_word_tokenizer(folder)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_bart(folder: Path, seed: int = 0) -> Path:
    """A BART of 1 + 1 layers and 32 hidden, untrained: 64 learned positions."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    size = _save_word_tokenizer(folder)
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=1,
        init_std=0.1,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def _save_word_tokenizer(folder: Path) -> int:
    """A token a word of the topics, small and in capitals, with ``</s>`` at the end of a text;
    returns how many it knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*FILLER, *(word for topic in TOPICS.values() for word in topic), *TOPICS]
    words = ["<pad>", "</s>", "<s>", "<unk>", *words, *(word.upper() for word in words)]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=64,
    ).save_pretrained(folder)
    return len(words)
