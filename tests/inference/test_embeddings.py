"""A text's vector is the pooled output of its encoder, whatever rows share the pass."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, FNetConfig, FNetModel

from shared.errors import UnsupportedModel
from shared.specs import Embedding
from workers.ranks.engine.embeddings import Embeddings, choose_pooling
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.prompts import Prompt
from workers.ranks.folders import LoadError
from workers.ranks.loading import load_encoder, load_seq2seq

from .tiny import VOCABULARY, finish, make_masked, make_t5, make_tagger, sentence, wordpiece

TASK = {"task": "embeddings"}
TEXTS = [sentence(1 + (11 * i) % 37, i) for i in range(40)]


@pytest.fixture(scope="module")
def encoder(models_dir: Path) -> Path:
    """Saved under a masked-language-model head, and without a pooler."""
    return make_masked(models_dir / "encoder")


def vectors(path: Path, texts: list[str], pooling: str) -> torch.Tensor:
    """By Transformers, one by one; not normalised."""
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        hidden = [model(torch.tensor([tokenizer(t).input_ids])).last_hidden_state[0] for t in texts]
    return torch.stack([h[0] if pooling == "cls" else h.mean(dim=0) for h in hidden])


def found(outcome: Any) -> torch.Tensor:
    assert outcome.failed is None, outcome.failed
    return torch.tensor([row["output"]["embedding"] for row in outcome.results])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_equal_plain_forward_passes(engine, encoder, pooling):
    rows = [{"text": t, "id": i} for i, t in enumerate(TEXTS)]
    options = {"pooling": pooling, "normalize": False}
    outcome = engine.run(encoder, rows, batch_size=8, shard_rows=13, embedding=options, **TASK)
    expected = vectors(encoder, TEXTS, pooling)
    torch.testing.assert_close(found(outcome), expected, atol=1e-5, rtol=1e-5)
    alone = engine.run(encoder, rows, batch_size=1, embedding=options, **TASK)
    assert alone.ready.warm is True
    torch.testing.assert_close(found(outcome), found(alone), atol=1e-5, rtol=0)
    assert [r["output"]["dimensions"] for r in outcome.results] == [32] * 40
    assert [r["id"] for r in outcome.results] == list(range(40))
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    assert [r["usage"]["input_tokens"] for r in outcome.results] == [
        len(tokenizer(t).input_ids) for t in TEXTS
    ]
    # The vectors tell texts apart.
    assert torch.cdist(expected, expected).fill_diagonal_(9).min() > 1e-3


def test_vectors_are_of_unit_length_unless_told_otherwise(engine, encoder):
    unit = found(engine.run(encoder, [{"text": t} for t in TEXTS[:9]], **TASK))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(9), atol=1e-5, rtol=0)
    plain = vectors(encoder, TEXTS[:9], "mean")
    torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


def sentence_transformer(folder: Path, modes: dict[str, Any], *kinds: str) -> Path:
    """The files that sentence-transformers writes beside the model's."""
    (folder / "1_Pooling").mkdir(exist_ok=True, parents=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    modules += [{"path": f"2_{k}", "type": f"sentence_transformers.models.{k}"} for k in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


FLAGS = {
    "word_embedding_dimension": 32,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "include_prompt": True,
}


def test_the_folder_says_how_to_pool_and_how_much_to_read(engine, encoder, models_dir):
    folder = Path(shutil.copytree(encoder, models_dir / "sentences"))
    sentence_transformer(folder, {**FLAGS, "pooling_mode_cls_token": True}, "Normalize")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    rows = [{"text": t} for t in TEXTS]
    options = {"normalize": False}
    outcome = engine.run(folder, rows, embedding=options, too_long="truncate", **TASK)
    lengths = [r["usage"]["input_tokens"] for r in outcome.results]
    assert max(lengths) == 20
    short = [i for i, length in enumerate(lengths) if length < 20]
    expected = vectors(folder, [TEXTS[i] for i in short], "cls")
    torch.testing.assert_close(found(outcome)[short], expected, atol=1e-5, rtol=1e-5)
    # Asked for, the mean is taken all the same.
    mean = engine.run(folder, [rows[0]], embedding={"pooling": "mean", "normalize": False}, **TASK)
    torch.testing.assert_close(
        found(mean), vectors(folder, TEXTS[:1], "mean"), atol=1e-5, rtol=1e-5
    )


def test_pooling_that_is_not_done_here_is_refused(engine, encoder, models_dir, tmp_path):
    auto = Embedding()
    assert choose_pooling(tmp_path, auto) == "mean"
    for modes, expected in (
        ({**FLAGS, "pooling_mode_mean_tokens": True}, "mean"),
        ({**FLAGS, "pooling_mode_cls_token": True}, "cls"),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, "cls"),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
    ):
        assert choose_pooling(sentence_transformer(tmp_path, modes), auto) == expected
    for modes, says in (
        ({**FLAGS, "pooling_mode_max_tokens": True}, "pools by max"),
        ({**FLAGS, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, "cls, max"),
        ({"pooling_mode": "lasttoken"}, "pools by lasttoken"),
    ):
        with pytest.raises(UnsupportedModel, match=says):
            choose_pooling(sentence_transformer(tmp_path, modes), auto)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        choose_pooling(tmp_path, auto)
    folder = Path(shutil.copytree(encoder, models_dir / "dense"))
    sentence_transformer(folder, {**FLAGS, "pooling_mode_mean_tokens": True}, "Dense")
    refused = engine.run(folder, [{"text": "the cat"}], **TASK)
    assert refused.failed.code == "unsupported_model" and "'Dense'" in refused.failed.message
    assert "embedding.pooling" in refused.failed.hint
    taken = engine.run(folder, [{"text": "the cat"}], embedding={"pooling": "mean"}, **TASK)
    assert taken.codes == [None]


def test_bad_and_long_rows(engine, encoder):
    rows = [{"text": sentence(90)}, {"text": "the"}, {"text": " "}, {"x": "a"}, b"", b"nul"]
    refused = engine.run(encoder, rows, **TASK)
    codes = [None, "empty_text", "missing_column", "invalid_json"]
    assert refused.codes == ["too_long", *codes]
    assert "the model takes 64" in refused.results[0]["error"]["message"]
    assert engine.run(encoder, rows, too_long="truncate", **TASK).codes == [None, *codes]


def test_a_model_that_padding_changes_is_computed_row_by_row(engine, models_dir):
    """FNet mixes along the whole width and knows no mask."""
    folder = models_dir / "fnet"
    wordpiece(folder)
    torch.manual_seed(0)
    config = FNetConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=1, intermediate_size=16
    )
    FNetModel(config).save_pretrained(folder)
    outcome = engine.run(
        folder, [{"text": t} for t in TEXTS[:8]], embedding={"normalize": False}, **TASK
    )
    expected = vectors(folder, TEXTS[:8], "mean")
    torch.testing.assert_close(found(outcome), expected, atol=1e-5, rtol=1e-5)
    assert "rows go one by one" in engine.log.read_text()


def test_models_that_are_no_encoders_are_refused(engine, llama, models_dir):
    for model in (llama, make_t5(models_dir / "no-encoder")):
        outcome = engine.run(model, [{"text": "a"}], **TASK)
        assert outcome.failed.code == "unsupported_model" and outcome.failed.hint
        assert "cannot make embeddings" in outcome.failed.message


def test_numbers_that_are_not_finite_are_an_error_of_the_row(encoder):
    loaded, _ = ModelCache().get("embeddings", str(encoder), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        loaded.model.embeddings.word_embeddings.weight[9] = float("nan")
    computation = Embeddings(loaded, options=Embedding())
    computation.join("", 4)
    computation.add([Prompt(0, None, (5, 6)), Prompt(1, "b", (5, 9))])
    results = finish(computation)
    assert results[0]["error"] is None
    assert results[1]["error"]["code"] == "not_finite" and results[1]["id"] == "b"


def test_only_a_pooler_may_be_missing(encoder, models_dir, tmp_path):
    model = load_encoder(encoder, dtype=torch.float32, dropout=0.3)
    assert model.config.hidden_dropout_prob == 0.3 and not model.training
    assert load_encoder(make_tagger(tmp_path / "t"), dtype=torch.bfloat16).dtype == torch.bfloat16
    deeper = json.loads((encoder / "config.json").read_text()) | {"num_hidden_layers": 3}
    folder = Path(shutil.copytree(encoder, tmp_path / "deeper"))
    (folder / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(LoadError, match=r"encoder\.layer\.2") as caught:
        load_encoder(folder, dtype=torch.float32)
    assert caught.value.code == "model_damaged"
    t5 = make_t5(tmp_path / "t5")
    assert load_seq2seq(t5, dtype=torch.float32, dropout=0.2).config.dropout_rate == 0.2
    (t5 / "config.json").write_text(
        (t5 / "config.json").read_text().replace('"num_layers": 2', '"num_layers": 3')
    )
    with pytest.raises(LoadError, match=r"block\.2"):
        load_seq2seq(t5, dtype=torch.float32)


def test_base64_holds_the_very_numbers(engine, encoder):
    rows = [{"text": text} for text in TEXTS[:9]]
    plain = engine.run(encoder, rows, embedding={"normalize": False}, **TASK)
    packed = engine.run(encoder, rows, embedding={"normalize": False, "encoding": "base64"}, **TASK)
    for listed, row in zip(plain.results, packed.results, strict=True):
        data = base64.b64decode(row["output"]["embedding"])
        vector = np.frombuffer(data, "<f4")
        assert row["output"]["dimensions"] == len(vector) == 32 and len(data) == 4 * 32
        assert vector.tolist() == pytest.approx(listed["output"]["embedding"], abs=1e-7)
