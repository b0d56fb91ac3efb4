"""Transformers: ``generate`` one by one, ``pipeline`` in batches, and its continuous batching."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, pipeline

from benchmarks.baselines.measuring import Answers, Compute, Load, measure


def prepare(load: Load, args: argparse.Namespace) -> Compute:
    """``--how``: ``one``, ``pipeline:16`` (batch size), ``continuous:32`` (rows at once)."""
    torch.set_num_threads(args.threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(load.model)
    model: Any = AutoModelForCausalLM.from_pretrained(load.model, dtype=torch.float32)
    model.eval()
    kind, _, size = args.how.partition(":")
    if kind == "one":
        return lambda some: one_by_one(model, tokenizer, some)
    if kind == "pipeline":
        pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return lambda some: in_a_pipeline(pipe, some, int(size))
    return lambda some: continuously(model, tokenizer, some, int(size))


@torch.inference_mode()
def one_by_one(model: Any, tokenizer: Any, load: Load) -> Answers:
    answers = []
    for text in load.texts:
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=load.most, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        tokenizer.decode(new, skip_special_tokens=True)
        answers.append(new)
    return answers


def in_a_pipeline(pipe: Any, load: Load, batch: int) -> Answers:
    """Its batches are of requests as they come, filled up on the left to the longest."""
    found = pipe(
        load.texts, batch_size=batch, max_new_tokens=load.most, do_sample=False, return_tensors=True
    )
    answers = []
    for place, ((each,), _) in enumerate(zip(found, load.texts, strict=True)):
        first = place - place % batch
        width = max(len(ids) for ids in load.ids[first : first + batch])
        answers.append([int(token) for token in each["generated_token_ids"][width:]])
    return answers


def continuously(model: Any, tokenizer: Any, load: Load, rows: int) -> Answers:
    """With a cap on rows, and on the cache, which would else take most of the memory there is."""
    config = ContinuousBatchingConfig(max_requests_per_batch=rows, num_blocks=rows * 4)
    options = model.generation_config
    options.max_new_tokens, options.do_sample = load.most, False
    ids = [tokenizer(text)["input_ids"] for text in load.texts]
    found = model.generate_batch(
        inputs=ids, generation_config=options, continuous_batching_config=config, progress_bar=False
    )
    answers = []
    # Requests are named in the order in which they were given.
    for name in sorted(found, key=lambda name: int(name.rsplit("_", 1)[-1])):
        assert not found[name].error, found[name].error
        tokenizer.decode(found[name].generated_tokens, skip_special_tokens=True)
        answers.append(list(found[name].generated_tokens))
    return answers


if __name__ == "__main__":
    measure(__doc__ or "", prepare)
