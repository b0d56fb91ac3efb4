"""Which encoder of rows and which computation each task has."""

from __future__ import annotations

from pathlib import Path

from shared.messages import InferAssignment
from shared.specs import Embedding
from workers.ranks.engine.adapters import Adapted, Adapter
from workers.ranks.engine.classification import Classification
from workers.ranks.engine.computation import Computation
from workers.ranks.engine.device import cache_budget
from workers.ranks.engine.embeddings import Embeddings
from workers.ranks.engine.generation import TextGeneration
from workers.ranks.engine.groups import TextInGroups
from workers.ranks.engine.masks import MaskEncoder, MaskFilling
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.prompts import Encoder, PromptEncoder
from workers.ranks.engine.reranking import PairEncoder, Reranking
from workers.ranks.engine.runners import choose_runner
from workers.ranks.engine.scoring import Scoring, ScoringEncoder
from workers.ranks.engine.tagging import Tagging
from workers.ranks.engine.text2text import TextToText
from workers.ranks.engine.vllm_generation import VllmGeneration
from workers.ranks.engine.words import WordEncoder


def choose_encoder(assignment: InferAssignment, loaded: LoadedModel) -> Encoder:
    """What makes prompts of the rows of a job."""
    spec, tokenizer, context = assignment.spec, loaded.tokenizer, loaded.context
    if spec.task == "token-classification":
        return WordEncoder(tokenizer, spec, context)
    if spec.task == "fill-mask":
        return MaskEncoder(tokenizer, spec, context)
    if spec.task == "scoring":
        return ScoringEncoder(tokenizer, spec, context)
    if spec.task == "reranking":
        return PairEncoder(tokenizer, spec, context)
    return PromptEncoder(tokenizer, spec, context)


def choose_computation(assignment: InferAssignment, loaded: LoadedModel) -> Computation:
    """What computes the prompts of a job.

    Raises:
        UnsupportedModel: the model cannot do what the spec asks of it.
    """
    computation = _of_the_task(assignment, loaded)
    if assignment.adapter_path is None:
        return computation
    return Adapted(computation, Adapter(Path(assignment.adapter_path), loaded.model))


def _of_the_task(assignment: InferAssignment, loaded: LoadedModel) -> Computation:
    spec = assignment.spec
    budget = cache_budget(assignment.device, loaded.weight_bytes)
    match spec.task:
        case "text-classification":
            return Classification(loaded, top_k=spec.top_k_labels)
        case "token-classification":
            return Tagging(loaded, aggregation=spec.aggregation)
        case "fill-mask":
            return MaskFilling(loaded, top_k=spec.top_k_labels)
        case "embeddings":
            return Embeddings(loaded, options=spec.embedding or Embedding())
        case "scoring":
            return Scoring(loaded, tell_tokens=spec.token_logprobs, end_of_text=spec.end_of_text)
        case "reranking":
            return Reranking(loaded, top_n=spec.top_n)
        case "text2text" | "summarization":
            slots = loaded.cache_cost is not None and loaded.cache_cost.slots
            way = TextToText if slots else TextInGroups
            return way(loaded, cache_bytes=budget)
        case "text-generation" if loaded.server is not None:
            return VllmGeneration(loaded, loaded.server)
        case "text-generation":
            runner = choose_runner(loaded.model, loaded.slot_bytes_per_position)
            return TextGeneration(loaded, runner, budget)
