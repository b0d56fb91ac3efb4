"""What a rank reads of a model that is going to be cut: its own part, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.training.harness import in_another_process, make_bart, make_bert, make_t5
from tests.training.models import make_gpt2, make_llama, make_masked_bert
from tests.training.parts import differences, memory_taken

R = TypeVar("R")


def on_ranks(ranks: int, function: Callable[..., R], *arguments: Any) -> list[R]:
    """What each rank's call gives; the rank and their number are its last arguments but options."""
    with ThreadPoolExecutor(ranks) as pool:
        calls = [
            pool.submit(in_another_process, function, *arguments, rank, ranks)
            for rank in range(ranks)
        ]
        return [call.result() for call in calls]


def in_half(folder: Path, name: str) -> Path:
    """The model of ``folder`` in half precision, in two files and an index."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder.parent / name, max_shard_size="30KB")
    assert len(list((folder.parent / name).glob("*.safetensors"))) > 1
    return folder.parent / name


def with_old_names(folder: Path, name: str) -> Path:
    """A BERT as the first ones were written: Transformers gives some of its tensors other names."""
    new = folder.parent / name
    new.mkdir()
    (new / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    old = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
        for n, t in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, new / "model.safetensors", metadata={"format": "pt"})
    return new


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_has_what_it_would_have_of_a_model_that_was_loaded_whole(
    tmp_path: Path, ranks: int
) -> None:
    bert, gpt2, llama = (
        make_bert(tmp_path / "bert"),
        make_gpt2(tmp_path / "gpt2"),
        make_llama(tmp_path / "llama"),
    )
    cases = [
        ("classifier", bert, False),
        ("classifier", bert, True),
        ("classifier", with_old_names(bert, "old"), False),
        ("encoder", bert, False),
        ("masked-lm", bert, False),
        ("masked-lm", make_masked_bert(tmp_path / "masked"), False),
        ("causal-lm", gpt2, False),
        ("causal-lm", gpt2, True),
        ("causal-lm", llama, False),
        ("causal-lm", in_half(llama, "half"), True),
        ("seq2seq", make_t5(tmp_path / "t5"), True),
        ("seq2seq", make_bart(tmp_path / "bart"), False),
    ]
    for found in on_ranks(ranks, differences, cases, tmp_path / "store"):
        for case, (names, promised, told) in zip(cases, found, strict=True):
            assert not names, (case, names)
            assert promised, case
            assert not told, (case, told)


def test_a_head_that_is_in_the_folder_is_copied_for_lora_with_its_numbers(tmp_path: Path) -> None:
    config = transformers.BertConfig.from_pretrained(make_bert(tmp_path / "bert"), num_labels=3)
    config.id2label = dict(enumerate(("one", "two", "three")))
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    cases = [("classifier", tmp_path / "bert", True)]
    for [(names, promised, told)] in on_ranks(2, differences, cases, tmp_path / "store"):
        assert not names
        assert not told
        # Those of the copy that is trained as well: the head is a matrix and a vector, as the pooler.
        assert promised > 10


def test_a_model_whose_weights_are_computed_from_the_files_is_loaded_whole(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    cases = [("causal-lm", tmp_path / "experts", False)]
    for [(names, promised, told)] in on_ranks(2, differences, cases, tmp_path / "store"):
        assert (names, promised) == ([], 0)
        [note] = told
        assert (
            "each rank loads the whole of 'experts' into host memory: Transformers computes" in note
        )


def test_a_rank_takes_memory_for_its_own_part_alone(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        intermediate_size=1536,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    # As large models are: what is read has to be cast, and cannot be used where the file is mapped.
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    del model
    small = make_llama(tmp_path / "small")

    def taken(promise: bool) -> int:
        store = tmp_path / f"store-{promise}"
        folders = (small, tmp_path / "model")
        calls = [(memory_taken, *folders, store, rank, 2, promise) for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            return max(pool.map(lambda call: in_another_process(*call), calls))

    assert taken(promise=False) > 0.95 * whole
    # Half of it, and what the allocator holds back.
    assert taken(promise=True) < 0.75 * whole
