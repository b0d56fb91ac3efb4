"""What ``benchmarks.footprint`` runs in processes of their own: models are made, counted and trained here."""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.footprint import VOCABULARY, Pair, _asked, _spec, pair_of, write_rows


def main() -> None:
    what, folder, name = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    acts = {"make": _make, "measure": _measure, "count": _count, "train": _train}
    print(json.dumps(acts[what](pair_of(name), Path(folder))), flush=True)


def _make(pair: Pair, place: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(5000))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    saved = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]",  # noqa: S106
        model_max_length=512,
    )  # fmt: skip
    _model(pair).save_pretrained(place / "model")
    saved.save_pretrained(place / "model")
    if pair.fields.get("teacher"):
        _model(pair, hidden=512, head=True).save_pretrained(place / "teacher")
        saved.save_pretrained(place / "teacher")
    write_rows(pair, place / "train.jsonl")
    return {}


def _model(pair: Pair, hidden: int = 384, *, head: bool = False) -> Any:
    import transformers as t

    same: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    match pair.model:
        case "bert":
            labels = {n: f"L{n}" for n in range(4)}
            config = t.BertConfig(
                hidden_size=hidden, num_hidden_layers=6, num_attention_heads=8, id2label=labels,
                intermediate_size=4 * hidden, label2id={v: k for k, v in labels.items()}, **same,
            )  # fmt: skip
            return t.BertForSequenceClassification(config) if head else t.BertModel(config)
        case "gpt2":
            return t.GPT2LMHeadModel(
                t.GPT2Config(
                    n_embd=hidden, n_layer=6, n_head=8, eos_token_id=3, bos_token_id=3, **same
                )
            )
        case "llama":
            return t.LlamaForCausalLM(
                t.LlamaConfig(
                    hidden_size=hidden, num_hidden_layers=8, num_attention_heads=8,
                    num_key_value_heads=4, intermediate_size=1024, eos_token_id=3,
                    bos_token_id=3, **same,
                )
            )  # fmt: skip
        case "t5":
            return t.T5ForConditionalGeneration(
                t.T5Config(
                    d_model=hidden, num_layers=5, num_decoder_layers=5, num_heads=8, d_kv=48,
                    d_ff=4 * hidden, eos_token_id=3, **{**same, "decoder_start_token_id": 0},
                )
            )  # fmt: skip
    raise AssertionError(pair.model)


def _measure(pair: Pair, place: Path) -> dict[str, Any]:
    from workers.ranks.footprint.measure import measure

    return {"bytes": measure(_asked(pair, place)[0])}


def _count(pair: Pair, place: Path) -> dict[str, Any]:
    """The tensors of a step on a real model."""
    import torch

    from workers.ranks.footprint.measure import peak_of
    from workers.ranks.footprint.subject import make_subject
    from workers.ranks.footprint.tracker import LiveBytes

    asked, _ = _asked(pair, place)
    subject = make_subject(asked, torch.device("cpu"))
    return {"bytes": peak_of(asked, subject, LiveBytes(), "fp32")}


def _train(pair: Pair, place: Path) -> dict[str, Any]:
    """A whole training rank, spoken to over a socket as its worker does."""
    from shared.messages import (
        DeviceHandle,
        Done,
        Failed,
        FromRank,
        JoinRendezvous,
        Listening,
        Progress,
        ToRank,
        TrainAssignment,
    )
    from workers.channel import Channel
    from workers.ranks.train import main as train

    _warm_up()
    bare = _own_pages()
    work = Path(tempfile.mkdtemp(dir=place))
    (work / "checkpoints").mkdir(parents=True, exist_ok=True)
    (work / "artifacts").mkdir(exist_ok=True)
    spec = _spec(pair, place)
    ours, theirs = socket.socketpair()
    channel = Channel(ours, FromRank)
    channel.send(
        TrainAssignment(
            job_id="job", attempt_id="attempt", attempt=1, token=1, rank=0, world_size=1,
            device=DeviceHandle(id="cpu0@bench", kind="cpu", memory_bytes=1 << 34), spec=spec,
            model_path=str(place / "model"),
            teacher_path=str(place / "teacher") if spec.teacher else None,
            train_path=str(place / "train.jsonl"), validation_path=None, work_dir=str(work),
        )
    )  # fmt: skip
    found: dict[str, Any] = {"bare": bare}

    def listen() -> None:
        while "peak" not in found:
            match channel.receive():
                case Listening(port=port):
                    channel.send(JoinRendezvous(address=f"127.0.0.1:{port}"))
                case Progress(step=1):
                    found["mapped"] = _mapped_weights()
                case Done(summary=summary):
                    found["rate"] = summary["examples_per_second"]
                    found["peak"] = int(summary["peak_memory_bytes"])
                case Failed(message=message):
                    sys.exit(message)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    train(Channel(theirs, ToRank))
    listener.join(60)
    return found


def _warm_up() -> None:
    """What any training brings with it, without a model: libraries, and what they make at first use."""
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.bert.modeling_bert
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama
    import transformers.models.t5.modeling_t5  # noqa: F401

    import workers.ranks.train.lora  # noqa: F401

    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.zeros(2, 8)).sum().backward()
    optimizer.step()


def _mapped_weights() -> int:
    """Weights that training does not change stay pages of their file."""
    mapped, weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            weights = line.endswith(".safetensors")
        elif weights and line.startswith(("Rss:", "Anonymous:")):
            # What was written to is the process's own by now.
            mapped += int(line.split()[1]) * (1024 if line.startswith("Rss:") else -1024)
    return mapped


def _own_pages() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
