"""What is downloaded of a repository on the Hub, which is none here: its list of files, and what the patterns leave of it."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import filter_repo_objects

from calibration.text import sources
from exporters.hub_files import COPIED
from xent_quant.checkpoint.fingerprint import BESIDE
from xent_quant.checkpoint.hub import resolve
from xent_quant.errors import CalibrationError, CheckpointError

TEXTS = {*COPIED, *BESIDE, "README.md", "LICENSE", "additional_chat_templates/rag.jinja"}


def downloaded(names: set[str], monkeypatch: pytest.MonkeyPatch, offline: bool = False) -> set[str]:
    siblings = [{"rfilename": name} for name in sorted(names)]
    found: list[str] = []

    def info(*_: Any) -> ModelInfo:
        if offline:
            raise ConnectionError
        return ModelInfo(id="a/b", siblings=siblings, private=False, downloads=0, likes=0, tags=[], sha="0" * 40)

    def snapshot(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        found.extend(filter_repo_objects(sorted(names), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return f"/cache/{repository}"

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("a/b") == Path("/cache/a/b")
    return set(found)


def test_all_that_is_read_and_no_weights_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"model.safetensors.index.json", "any-00001-of-00001.safetensors"}
    torch = {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}
    useless = {"consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx", "a.gguf", "training_args.bin"}
    wanted = downloaded(TEXTS | index | torch | useless, monkeypatch)
    assert wanted == TEXTS | index | {"pytorch_model.bin.index.json"}
    assert downloaded(TEXTS | torch | useless, monkeypatch) == TEXTS | torch
    both = TEXTS | {"model.safetensors", "pytorch_model.bin"}
    assert downloaded(both, monkeypatch) == both - {"pytorch_model.bin"}
    assert downloaded(both, monkeypatch, offline=True) == both


@pytest.mark.parametrize("typed", ["模型/XVERSE", "out/my--model", "data/a..b", "x/y.git", "a/b-", "~nobody-at-all/b", "a"])
def test_a_path_that_is_not_there_is_not_asked_for_on_the_hub(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match="no such folder, and not a Hub id"):
        resolve(typed)
    if typed != "a":
        with pytest.raises(CalibrationError, match="no such file or folder, not a Hub dataset id"):
            sources((typed,), None, False)
