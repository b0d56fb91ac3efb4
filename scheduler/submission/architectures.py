"""Can a model of this architecture do that task? Told from its ``config.json`` alone. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ENCODERS = """
    albert bert big_bird camembert convbert data2vec-text deberta deberta-v2
    distilbert electra ernie esm eurobert flaubert fnet ibert layoutlm longformer
    megatron-bert mobilebert modernbert mpnet nezha nystromformer rembert roberta
    roberta-prelayernorm roformer squeezebert xlm xlm-roberta xlm-roberta-xl xmod
    yoso
"""
ENCODERS = frozenset(_ENCODERS.split())
"""Model types that read a text whole: what can be fine-tuned under a head of any kind."""
_SEQ2SEQ = """
    bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp
    nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 umt5
"""
SEQ2SEQ_TYPES = frozenset(_SEQ2SEQ.split())
"""Model types that read one text and write another."""
_ENCODER_HINT = "For instance bert, distilbert, roberta, electra, mpnet or modernbert."


def why_unsuitable(config: Mapping[str, Any], task: str, *, trains: bool) -> tuple[str, str] | None:
    """None where the model can do the task, or be trained for it; else what it is, and what to do.

    The first reads on from "model 'x' is": ``BertModel: it has no trained classification head``.
    """
    made_as = [str(a) for a in config.get("architectures") or ()]
    kind = str(config.get("model_type") or "")
    what = made_as[0] if made_as else kind or "an unknown architecture"

    def has_head(*heads: str) -> bool:
        return any(a.endswith(heads) for a in made_as)

    match task:
        case "text-generation" | "scoring":
            causal = has_head("ForCausalLM", "LMHeadModel")
            # BERT and kin carry `is_decoder: false` and see the future under such a head, too.
            if causal and (kind not in ENCODERS or config.get("is_decoder")):
                return None
            cannot = "score" if task == "scoring" else "generate"
            return (
                f"{what} and cannot {cannot} text",
                "Choose a causal language model (GPT, Llama and kin).",
            )
        case "text2text" | "summarization":
            if kind in SEQ2SEQ_TYPES and (
                has_head("ForConditionalGeneration", "MTModel") or trains
            ):
                return None
            return (
                f"{what} and does not write one text for another",
                "Choose an encoder-decoder (T5, BART and kin).",
            )
        case "embeddings":
            if kind in ENCODERS:
                return None
            return f"{what}: embeddings need a BERT-type encoder", _ENCODER_HINT
        case "fill-mask":
            if has_head("ForMaskedLM", "ForPreTraining") or (trains and kind in ENCODERS):
                return None
            if kind in ENCODERS:
                return _untrained(what, "masked-language-model head", "fill-mask")
            return f"{what}: fill-mask needs a BERT-type encoder", _ENCODER_HINT
        case "reranking":
            labels = config.get("id2label")
            many = isinstance(labels, dict) and len(labels) > 2
            if has_head("ForSequenceClassification") and not many:
                return None
            lacks = (
                "it tells more than two labels apart" if many else "it has no classification head"
            )
            return (
                f"{what}: {lacks}",
                "Choose a cross-encoder: a sequence classifier with one label, or with two.",
            )
        case "token-classification":
            head, of = "ForTokenClassification", "tagging head"
        case "text-classification":
            head, of = "ForSequenceClassification", "classification head"
    if has_head(head):
        return None
    if not trains:
        return _untrained(what, of, task)
    if kind not in ENCODERS:
        return f"{what}: {task} needs a BERT-type encoder", _ENCODER_HINT
    return None


def _untrained(what: str, head: str, task: str) -> tuple[str, str]:
    return (
        f"{what}: it has no trained {head}",
        f"Fine-tune it for {task} first and use `job:<id>` of that job.",
    )
