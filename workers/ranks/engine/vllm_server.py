"""vLLM behind a pair of pipes. Runs in the interpreter of vLLM's own environment, which need not have any of
this project's packages: it imports the standard library and vLLM alone.

One line of JSON is one message. The first line in says how to load the model; the first line out is
``{"ready": true}`` or ``{"failed": "..."}``. Then, in:

    {"add": 7, "tokens": [...], "options": {...}}   compute a row; options are those of ``SamplingParams``
    {"drop": [7, ...]}                              rows that are not wanted any more

and out, once for each step that brought something:

    {"rows": [[7, [ids...], [logprobs...] or null, finished], ...]}
    {"refused": 7, "why": "..."}                    a row that vLLM does not take

``logprobs`` has for each token a list of [id, log-probability], its own first. The process ends with its standard
input, and with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)
    # Libraries print to standard output as they like: messages go out on a copy of it, the rest into the log.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # One process: what ends it ends all of it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    serve(sys.stdin, out)


def serve(incoming: TextIO, out: TextIO) -> None:
    load = json.loads(incoming.readline())
    try:
        from vllm import EngineArgs, LLMEngine

        engine = LLMEngine.from_engine_args(EngineArgs(disable_log_stats=True, **load))
    except Exception as error:
        _send(out, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        raise
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(incoming, messages), daemon=True).start()
    _send(out, {"ready": True})
    while True:
        # Idle, it waits for a message; busy, it takes those that are there.
        while not messages.empty() or not engine.has_unfinished_requests():
            _take(engine, messages.get(), out)
        rows = []
        for output in engine.step():
            text = output.outputs[0]
            rows.append(
                [int(output.request_id), list(text.token_ids), _told(text), output.finished]
            )
        if rows:
            _send(out, {"rows": rows})


def _take(engine: Any, message: dict[str, Any], out: TextIO) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if "drop" in message:
        engine.abort_request([str(number) for number in message["drop"]])
        return
    number = message["add"]
    try:
        options = SamplingParams(
            **message["options"], detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        engine.add_request(str(number), {"prompt_token_ids": message["tokens"]}, options)
    except ValueError as error:
        _send(out, {"refused": number, "why": str(error)})


def _told(text: Any) -> list[list[list[float]]] | None:
    """vLLM's dictionaries have the chosen token first, then the likeliest ones."""
    if text.logprobs is None:
        return None
    return [
        [[token, entry[token].logprob], *([t, e.logprob] for t, e in _ranked(entry))]
        for token, entry in zip(text.token_ids, text.logprobs)  # noqa: B905 - for any Python
    ]


def _ranked(entry: Any) -> list[tuple[int, Any]]:
    return sorted(entry.items(), key=lambda item: -item[1].logprob)


def _read(incoming: TextIO, messages: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in incoming:
        messages.put(json.loads(line))
    os._exit(0)


def _send(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
