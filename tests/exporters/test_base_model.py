"""The model's own name in every file, what its card says, and outputs that would replace the model."""

import json
from pathlib import Path

import gguf
import pytest

import xent_quant
from exporters.base_model import BaseModel
from tests.checkpoint.folders import SMALL, write
from xent_quant.errors import ExportError

COMMIT = "3f2a9c1d5e7b8a90123456789abcdef012345678"
NAME = "XVERSE-Ent-A4.2B"


def cache(tmp_path: Path) -> Path:
    """As huggingface_hub lays a model out: blobs, and a snapshot of links to them."""
    folder = tmp_path / f"models--xverse--{NAME}"
    blobs = write(folder / "blobs", None, {**SMALL, "num_hidden_layers": 1})
    (blobs / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    return snapshot


def test_a_hub_models_exports_have_its_name(tmp_path: Path) -> None:
    snapshot, out = cache(tmp_path), tmp_path / "out"
    done = xent_quant.quantize(snapshot, type="Q8_0", formats=["gguf", "onnx", "bnb"], bits=8, method="rtn", output=out)
    assert {path.name for path in out.iterdir()} == {
        *(f"{NAME}-Q8_0.{end}" for end in ("gguf", "Modelfile")),
        *("README.md", "onnx", "bnb"),
    }
    fields = gguf.GGUFReader(out / f"{NAME}-Q8_0.gguf").fields
    assert fields["general.name"].contents() == NAME
    assert fields["general.base_model.0.name"].contents() == NAME
    assert fields["general.base_model.0.repo_url"].contents() == f"https://huggingface.co/xverse/{NAME}"
    for path in (out / "README.md", out / "onnx" / "README.md", out / "bnb" / "README.md"):
        title = next(line for line in path.read_text().splitlines() if line.startswith("# "))
        assert title.startswith(f"# {NAME}")
    for path in out.rglob("*"):
        assert COMMIT not in path.name
        assert not path.is_file() or COMMIT.encode() not in path.read_bytes()
    assert not [note for note in done.notes if COMMIT in note]


@pytest.mark.parametrize(
    ("folder", "name", "repository"),
    [
        (f"models--xverse--{NAME}/snapshots/{COMMIT}", NAME, f"xverse/{NAME}"),
        (f"models--xverse--{NAME}/snapshots/{COMMIT}/sub", NAME, f"xverse/{NAME}"),
        ("modelscope/hub/models/xverse/XVERSE-Ent-A4___2B", NAME, f"xverse/{NAME}"),
        ("modelscope/hub/models/me/My___Model", "My.Model", None),
        (NAME, NAME, f"xverse/{NAME}"),
        ("my___model", "my___model", None),
    ],
)
def test_the_name_of_a_folder(tmp_path: Path, folder: str, name: str, repository: str | None) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / folder)
    for path in (tmp_path / folder, tmp_path / "link"):
        assert (BaseModel.of(path).name, BaseModel.of(path).repository) == (name, repository)


@pytest.mark.parametrize(
    "header",
    ["license: [apache", "a: b: c", "date: 2024-13-45", "x: " + "[" * 5000, "\tlicense: mit", "n: !!python/object:os.system x"],
    ids=["open", "colons", "date", "deep", "tab", "object"],
)
def test_a_header_that_is_not_yaml_is_a_note(tmp_path: Path, header: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Card\n")
    base = BaseModel.of(tmp_path)
    (note,) = base.notes
    assert "README.md: its header is not YAML" in note
    assert "\n" not in note
    assert (base.licence, base.languages) == (None, ())


def test_text_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text('---\nlicense: "\\ud800"\nlanguage: ["\\ud800", zh]\nlicense_name: mine\n---\n')
    base = BaseModel.of(tmp_path)
    assert (base.licence, base.licence_name, base.languages, base.notes) == (None, "mine", ("zh",), ())


def test_the_model_is_not_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "README.md").write_text("The model's own.")
    (tmp_path / "link").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for output in (folder, tmp_path / "link", folder / "x" / ".."):
        for act in (xent_quant.plan, xent_quant.quantize):
            with pytest.raises(ExportError, match="is where the model itself lies, whose files would be replaced"):
                act(folder, type="F32", output=output, force=True)
    for name in ("config.json", "README.md", "model.safetensors"):
        for act in (xent_quant.calibrate, xent_quant.sensitivity):
            with pytest.raises(ExportError, match=f"{name}: is a file of the model itself"):
                act(folder, output=folder / name, force=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_the_model_may_be_the_output(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    assert xent_quant.quantize(folder, type="F32", output=folder / "out").files[0].is_file()


def test_an_exported_folder_that_is_the_model_is_not_replaced(tmp_path: Path) -> None:
    xent_quant.quantize(write(tmp_path / "model"), formats=["bnb"], bits=16, output=tmp_path / "out")
    exported = tmp_path / "out" / "bnb"
    assert json.loads((exported / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ExportError, match="is where the model itself lies"):
        xent_quant.quantize(exported, formats=["bnb"], bits=16, output=tmp_path / "out", force=True)
