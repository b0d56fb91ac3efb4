"""Model folders that are hostile, damaged or of another kind: each is refused with its reason."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from tests.training.models import make_gpt2
from workers.ranks.loading import (
    LoadError,
    known_labels,
    load_causal_lm,
    load_sequence_classifier,
    load_tokenizer,
)

LABELS = ("a", "b", "c")


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    """A sound copy to spoil."""
    return Path(shutil.copytree(bert, tmp_path / "model"))


def _shard(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_outside(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    _shard(folder, "../other.safetensors")


def _index_absolute(folder: Path) -> None:
    _shard(folder, str(folder / "part.safetensors"))


def _index_pickle(folder: Path) -> None:
    _shard(folder, "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(b"")


def _index_dangling(folder: Path) -> None:
    _shard(folder, "gone.safetensors")


def _link_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors").symlink_to("../model.safetensors")


def _folder_link_outside(folder: Path) -> None:
    (folder / "sub").symlink_to("/etc")


def _missing_tensors(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1.attention" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.target,)


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(folder.parent / "exploded")))


def _own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("from pathlib import Path\nPath('../exploded').touch()\n")


def _weights_elsewhere(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "../other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')


def _distributed(folder: Path) -> None:
    (folder / "shard-00001-model-00001-of-00001.safetensors").touch()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _config_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _encoder_decoder_only(folder: Path) -> None:
    shutil.rmtree(folder)
    T5EncoderModel(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (_index_outside, "model_unsafe", "names '../other.safetensors'"),
        (_index_absolute, "model_unsafe", "a file outside the folder"),
        (_index_pickle, "model_unsafe", "not safetensors"),
        (_index_dangling, "model_damaged", "'gone.safetensors' is missing"),
        (_link_outside, "model_unsafe", "links to a place outside it"),
        (_folder_link_outside, "model_unsafe", "'sub'"),
        (_missing_tensors, "model_damaged", "encoder.layer.1.attention"),
        (_other_shape, "model_damaged", "another shape"),
        (_truncated, "model_damaged", "damaged"),
        (_pickle_only, "model_unsafe", "only as a pickle"),
        (_own_code, "model_unsuitable", "config.json"),
        (_weights_elsewhere, "model_unsafe", "its own weight file"),
        (_adapter, "model_unsuitable", "adapter"),
        (_distributed, "model_unsuitable", "distributed checkpoint"),
        (_no_weights, "model_not_found", "model.safetensors"),
        (_config_list, "model_damaged", "no JSON object"),
        (_encoder_decoder_only, "model_unsuitable", "cannot classify text"),
    ],
)
def test_a_spoilt_folder_is_refused(
    folder: Path, spoil: Callable[[Path], None], code: str, says: str
) -> None:
    load_sequence_classifier(folder, labels=LABELS)
    spoil(folder)
    with pytest.raises(LoadError) as caught:
        load_sequence_classifier(folder, labels=LABELS)
    assert caught.value.code == code
    assert says in caught.value.message
    assert not (folder.parent / "exploded").exists()
    assert not Path("exploded").exists()


def test_an_index_that_stays_inside_is_followed(folder: Path) -> None:
    whole = load_sequence_classifier(folder, labels=LABELS, seed=1).model.state_dict()
    _shard(folder, "part.safetensors")
    sharded = load_sequence_classifier(folder, labels=LABELS, seed=1).model.state_dict()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_what_is_no_folder_is_never_taken_for_a_hub_id(tmp_path: Path) -> None:
    for path in ("bert-base-uncased", tmp_path / "gone", "/etc/hostname"):
        with pytest.raises(LoadError) as caught:
            load_sequence_classifier(path)
        assert caught.value.code == "model_not_found"


def test_a_fresh_head_follows_its_seed_and_leaves_the_generator_alone(bert: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    heads = [
        load_sequence_classifier(bert, labels=LABELS, seed=seed).model.classifier.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_trained_head_is_kept_and_one_of_another_size_replaced(
    bert: Path, tmp_path: Path
) -> None:
    first = load_sequence_classifier(bert, labels=LABELS, dropout=0.3)
    assert first.fresh_head
    assert first.model.dropout.p == 0.3
    first.model.save_pretrained(tmp_path)
    assert known_labels(tmp_path) == LABELS
    assert known_labels(bert) is None
    kept = load_sequence_classifier(tmp_path)
    assert not kept.fresh_head
    assert torch.equal(kept.model.classifier.weight, first.model.classifier.weight)
    replaced = load_sequence_classifier(tmp_path, labels=("x", "y"))
    assert replaced.fresh == ("classifier.bias", "classifier.weight")
    assert replaced.model.config.id2label == {0: "x", 1: "y"}


def test_a_language_model_may_lack_nothing(bert: Path) -> None:
    with pytest.raises(LoadError, match=r"cls\.predictions"):
        load_causal_lm(bert, torch.float32)


def test_a_tied_head_is_not_missing_and_dropout_is_overridden(tmp_path: Path) -> None:
    model = load_causal_lm(make_gpt2(tmp_path / "gpt2"), torch.float32, dropout=0.25)
    assert "lm_head.weight" not in load_file(tmp_path / "gpt2" / "model.safetensors")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(LoadError) as caught:
        load_tokenizer(folder)
    assert caught.value.code == "model_unsuitable"
    (folder / "tokenizer_config.json").write_text(
        '{"fast_tokenizer_files": ["../tokenizer.4.json"]}'
    )
    with pytest.raises(LoadError) as caught:
        load_tokenizer(folder)
    assert caught.value.code == "model_unsafe"
