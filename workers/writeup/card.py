"""The model card: README.md beside a model, as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from typing import Any

import yaml

from workers.writeup.facts import Facts
from workers.writeup.figures import duration, fixed
from workers.writeup.page import metric_names

_AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text": "AutoModelForSeq2SeqLM",
    "summarization": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "embeddings": "AutoModel",
}
_PIPELINES = {"text2text": "text2text-generation", "embeddings": "feature-extraction"}
_METRICS = {
    "macro_f1": "f1",
    "micro_f1": "f1",
    "rouge1": "rouge",
    "rouge2": "rouge",
    "rougeL": "rouge",
}
"""What the hub calls our metrics, where that is not their own name."""
_REFERENCE = re.compile(r"job:|.*@")
_MOST_EVALUATIONS = 20


def render(facts: Facts) -> str:
    """YAML front matter and Markdown. No license: nobody here knows that of the base model or the data."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n\n# {_plain(facts.title)}\n",
        f"{_plain(facts.base)}, trained for {facts.task} by {facts.spec.get('method')} training, "
        f"{facts.steps:,} steps ({facts.extent}) in {duration(facts.seconds)}. "
        f"Job `{facts.job_id}`, {facts.finished_at:%Y-%m-%d}.\n",
        f"```python\nfrom transformers import {_AUTO[facts.task]}, AutoTokenizer\n\n"
        f'model = {_AUTO[facts.task]}.from_pretrained("path/of/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n```\n',
    ]
    if facts.values:
        head = f"## Metrics\n\nJudged by {facts.judged_by} on the validation data.\n"
        parts.append(f"{head}\n{_values(facts)}")
    if facts.evaluations:
        parts.append(f"## Evaluations\n\n{_evaluations(facts)}")
    if facts.labels:
        parts.append(
            "## Labels\n\n" + ", ".join(f"`{_code(label)}`" for label in facts.labels) + "\n"
        )
    parts.append(f"## Data\n\n{_data(facts)}")
    versions = "\n".join(f"- {name} {version}" for name, version in facts.versions.items())
    parts.append(f"## Versions\n\n{versions}\n")
    spec = yaml.safe_dump(dict(facts.spec), sort_keys=False, allow_unicode=True)
    parts.append(f"## Spec\n\n````yaml\n{spec.replace('````', '``` `')}````\n")
    return "\n".join(parts)


def _front_matter(facts: Facts) -> dict[str, Any]:
    task = _PIPELINES.get(facts.task, facts.task)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    model = facts.spec.get("model")
    if model and not _REFERENCE.match(str(model)):
        front["base_model"] = str(model)
    front["tags"] = [
        "gpuyard",
        *([] if facts.spec.get("method") == "full" else [facts.spec["method"]]),
    ]
    measured = {name: value for name, value in facts.values.items() if name != "generated_examples"}
    if measured:
        front["metrics"] = sorted({_METRICS.get(name, name) for name in measured})
        source = facts.rows[-1].source
        front["model-index"] = [
            {
                "name": facts.title,
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"name": source, "type": "custom", "split": "validation"},
                        "metrics": [
                            {"type": _METRICS.get(name, name), "name": name, "value": value}
                            for name, value in measured.items()
                        ],
                    }
                ],
            }
        ]
    return front


def _values(facts: Facts) -> str:
    rows = [[name.replace("_", " "), fixed(value)] for name, value in facts.values.items()]
    return _table(["metric", "value"], rows)


def _evaluations(facts: Facts) -> str:
    names, entries = metric_names(facts), facts.evaluations
    every = -(-len(entries) // _MOST_EVALUATIONS)
    kept = [e for i, e in enumerate(entries) if i % every == 0 or e is entries[-1]]
    rows = [
        [f"{int(e['step']):,}", f"{facts.epoch(e['step']):.2f}"]
        + [fixed(e[name]) if name in e else "" for name in names]
        for e in kept
    ]
    return _table(["step", "epoch", *(name.replace("_", " ") for name in names)], rows)


def _data(facts: Facts) -> str:
    rows = [
        [r.split, r.source, f"{r.examples:,}", str(r.median_tokens), f"`{r.sha256}`"] for r in facts.rows
    ]  # fmt: skip
    return _table(["split", "source", "examples", "median tokens", "SHA-256 as tokenised"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(_plain, line)) + " |\n" for line in lines)


def _plain(text: str) -> str:
    """One line in which nothing begins markup of another kind."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
