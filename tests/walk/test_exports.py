"""Several exports at once, and one beside another: who gets what, and what the folder says of them."""

import re
import threading
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import xent_quant
from calibration.correction import NOTHING
from calibration.imatrix import Imatrix
from exporters.gguf.export import GGUFExporter
from exporters.gguf.plan import plan
from tests import walking
from tests.conftest import random_weights, write_checkpoint
from tests.walk.conftest import CONFIG, export, tree
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, ExportError
from xent_quant.methods import METHODS
from xent_quant.model.stages import Stage
from xent_quant.model.streaming import StreamingModel
from xent_quant.model.streams import Streams
from xent_quant.recipes import recipe
from xent_quant.tensors import Role
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource
from xent_quant.walk import loop, resources
from xent_quant.walk.lanes import Lane
from xent_quant.walk.loop import Walk

README, FAST = "README.md", {"effort": "fast", "threads": 1}


def told(folder: Path) -> list[str]:
    """Of which exports a card speaks."""
    return re.findall(r"<!-- xent-quant: (.+?) -->", (folder / README).read_text())


@pytest.mark.parametrize("threads", [1, 2])
def test_exports_of_one_walk_are_those_made_alone(threads: int, model: Path, text: Any, tmp_path: Path) -> None:
    """With two threads their streams are measured and quantised side by side."""
    both = {**FAST, "threads": threads}
    together = export(model, tmp_path / "all", type=["Q4_0", "Q8_0"], formats=["gguf", "onnx"], **both, **text)
    assert len(together.exports) == 3
    for one in ({"type": "Q4_0"}, {"type": "Q8_0"}, {"formats": ["onnx"]}):
        export(model, tmp_path / "each", **one, **FAST, **text)
    assert tree(tmp_path / "all") == tree(tmp_path / "each")
    assert told(tmp_path / "all") == ["Model-Q4_0", "Model-Q8_0"]


@pytest.mark.parametrize("which", ["model", "narrow"])
def test_experts_side_by_side_change_no_byte_of_statistics_or_of_what_is_made_with_them(
    which: str, text: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, made = request.getfixturevalue(which), []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        export(model, folder, type="Q4_0", method="imatrix", effort="fast", threads=threads, **text)
        xent_quant.calibrate(model, output=folder / "imatrix.gguf", threads=threads, **text)
        made.append(tree(folder))
    assert made[0] == made[1]
    assert len(made[0]) == 4


def test_statistics_by_products_in_bfloat16_are_nearly_the_same(narrow: Path, text: Any, tmp_path: Path, monkeypatch) -> None:
    """But for a token on the edge between experts; with Hessians all is float32, to the last byte."""
    found, exact = [], []
    for by_itself in (True, False):
        monkeypatch.setattr("calibration.session.multiplies_bfloat16", lambda by_itself=by_itself: by_itself)
        file = tmp_path / f"{by_itself}.gguf"
        xent_quant.calibrate(narrow, output=file, **text)
        found.append(Imatrix.read(file).entries)
        export(narrow, tmp_path / str(by_itself), type="Q4_0", **FAST, **text)
        exact.append(tree(tmp_path / str(by_itself)))
    assert exact[0] == exact[1]
    differing = [name for name in found[0] if not np.array_equal(found[0][name].sums, found[1][name].sums)]
    assert differing
    for name in found[0]:
        one, other = (each[name].sums.sum() for each in found)
        assert abs(one - other) < 0.01 * other, name


def test_an_unfinished_run_by_other_products_is_not_gone_on_with(
    narrow: Path, text: Any, tmp_path: Path, interrupt, monkeypatch
) -> None:
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        export(narrow, tmp_path, type="Q4_0", method="imatrix", **FAST, **text)
    interrupt(None)
    monkeypatch.setattr("calibration.session.multiplies_bfloat16", lambda: False)
    with pytest.raises(ExportError, match=r'products of weights was "torch.bfloat16", is "torch.float32"'):
        export(narrow, tmp_path, type="Q4_0", method="imatrix", **FAST, **text)


def test_slices_of_the_head_side_by_side_change_no_byte(model: Path, text: Any, tmp_path: Path, monkeypatch) -> None:
    """Slices are cut in the same places whatever the number of threads."""
    monkeypatch.setattr(Checkpoint, "SLICE", 1000)
    made, under_way = [], []
    put = Lane.put

    def watched(self: Lane, tensor: Any, *args: Any, **options: Any) -> Any:
        if options.get("head"):
            under_way.append(threading.current_thread().name)
        return put(self, tensor, *args, **options)

    monkeypatch.setattr(Lane, "put", watched)
    for threads in (1, 2):
        export(model, tmp_path / str(threads), type="Q4_0", effort="fast", threads=threads, **text)
        made.append((tree(tmp_path / str(threads)), len(under_way), len(set(under_way))))
        under_way.clear()
    assert made[0][0] == made[1][0]
    assert made[0][1] == made[1][1] > 4
    assert (made[0][2], made[1][2]) == (1, 2)


@pytest.mark.parametrize("formats", [["gguf"], ["onnx", "bnb"]], ids=" ".join)
def test_pieces_side_by_side_change_no_byte(formats: list[str], model: Path, tmp_path: Path, monkeypatch) -> None:
    made = {}
    for threads, piece in ((1, loop.PIECE), (1, 1000), (2, 1000)):
        monkeypatch.setattr(loop, "PIECE", piece)
        export(model, tmp_path / "out", formats=formats, bits=4, method="rtn", threads=threads)
        made[threads, piece] = tree(tmp_path / "out")
        rmtree(tmp_path / "out")
    whole, *others = made.values()
    assert all(other == whole for other in others)


def test_how_many_inner_rows_are_kept_changes_no_byte(model: Path, text: Any, tmp_path: Path, monkeypatch) -> None:
    """All of an expert's, those of its first tokens, none."""
    made = []
    for kept in (16384, 7, 0):
        monkeypatch.setattr(resources, "KEPT_ROWS", kept)
        export(model, tmp_path / "out", type="Q4_0", **FAST, **text)
        made.append(tree(tmp_path / "out"))
        rmtree(tmp_path / "out")
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("threads", [1, 2])
def test_of_two_damaged_tensors_the_first_is_named(threads: int, model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "PIECE", 1000)
    folder, layer = tmp_path / "Model", "model.layers.1.mlp.experts"
    copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    for name, row in ((f"{layer}.0.down_proj.weight", 63), (f"{layer}.1.gate_proj.weight", 0)):
        weights[name][row, 0] = np.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{re.escape(layer)}\.0\.down_proj\.weight: NaN or infinite weight in row 63;"):
        export(folder, tmp_path / "out", type="Q8_0", method="rtn", threads=threads)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_follower_that_chooses_other_experts_disturbs_nobody(tmp_path: Path, text: Any, monkeypatch) -> None:
    config = {**CONFIG, "num_experts": 12, "moe_top_k": 3, "hidden_size": 256, "num_shared_experts": 1, "num_hidden_layers": 1}
    folder, text = write_checkpoint(tmp_path / "Model", config, random_weights(config)), {**text, "tokens": 60}
    chosen: list[list[torch.Tensor]] = []
    close = Streams.close

    def closed(streams: Streams) -> None:
        chosen.append([stream.chosen.sort(1).values for stream in streams.run.streams])
        close(streams)

    monkeypatch.setattr(Streams, "close", closed)
    export(folder, tmp_path / "all", type=["Q2_K", "Q8_0"], **FAST, **text)
    _, coarse, fine = chosen[-1]
    assert (coarse != fine).any(1).float().mean() > 0.1
    for kind in ("Q2_K", "Q8_0"):
        export(folder, tmp_path / "each", type=kind, **FAST, **text)
    assert tree(tmp_path / "all") == tree(tmp_path / "each")


def test_one_type_after_another_into_one_folder(model: Path, tmp_path: Path) -> None:
    for kind in ("Q8_0", "Q4_0"):
        export(model, tmp_path, type=kind, method="rtn")
    assert told(tmp_path) == ["Model-Q4_0", "Model-Q8_0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"Model-{kind}.{what}" for kind in ("Q4_0", "Q8_0") for what in ("Modelfile", "gguf")),
        README,
    ]
    (tmp_path / "Model-Q8_0.gguf").unlink()
    export(model, tmp_path, type="Q4_0", method="rtn", name="Model-Q8_0", tensor_types=["output=Q8_0"])
    assert told(tmp_path) == ["Model-Q4_0", "Model-Q8_0-Q4_0"]  # names that begin alike are not taken for one another


def test_what_cannot_be_replaced_is_refused_before_any_work(model: Path, tmp_path: Path, monkeypatch) -> None:
    export(model, tmp_path, type="Q4_0", method="rtn")
    monkeypatch.setattr(Walk, "run", lambda walk: pytest.fail("work was done"))
    modelfile, card = tmp_path / "Model-Q4_0.Modelfile", tmp_path / README
    modelfile.unlink()
    modelfile.mkdir()
    before = tree(tmp_path)
    with pytest.raises(ExportError, match=r"Model-Q4_0\.Modelfile: is a folder, where a file is to be written"):
        export(model, tmp_path, type="Q4_0", method="rtn", force=True)
    modelfile.rmdir()
    card.rename(tmp_path / "elsewhere")
    before = tree(tmp_path)
    for force in (False, True):
        card.symlink_to("elsewhere")
        with pytest.raises(ExportError, match=r"README\.md: is a link or a folder"):
            export(model, tmp_path, type="Q8_0", method="rtn", force=force)
        card.unlink()
        card.mkdir()
        with pytest.raises(ExportError, match=r"README\.md: is a link or a folder"):
            export(model, tmp_path, type="Q8_0", method="rtn", force=force)
        card.rmdir()
    assert tree(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_a_tied_embedding_is_followed_as_the_rows_that_are_looked_up(tmp_path: Path, text: Any, monkeypatch) -> None:
    """It is in the file twice, and the stream begins with the coarser copy."""
    config = {**CONFIG, "hidden_size": 256, "intermediate_size": 32, "tie_word_embeddings": True}
    folder = write_checkpoint(tmp_path / "Model", config, random_weights(config))
    types = ["token_embd=Q2_K", "output.weight=Q6_K"]
    checkpoint = Checkpoint.open(folder)
    weights = checkpoint.read(checkpoint.architecture.embedding.name)
    coarse, fine = (
        kind.dequantize(METHODS["imatrix"]("fast").quantize(weights, kind, None, name=""))
        for kind in map(formats.get, ("Q2_K", "Q6_K"))
    )
    assert np.abs(coarse - fine).max() > 0.01

    planned = plan(checkpoint.architecture, recipe(type="Q8_0", tensor_types=types, imatrix=True))
    exporter = GGUFExporter(checkpoint, planned, tmp_path, "Model", METHODS["gptq"]("fast"))
    writer = exporter.open(tmp_path, {}, fresh=True)
    tensor = checkpoint.architecture.embedding
    lane = Lane(exporter, writer, 1)
    read = lane.put(tensor, 0, weights, NOTHING)
    np.testing.assert_array_equal(read, coarse)
    np.testing.assert_array_equal(lane.put(tensor, 0, weights, NOTHING, head=True), fine)
    assert Lane(exporter, writer, 0).put(tensor, 0, weights, NOTHING) is None
    writer.close()

    embedded: dict[int, np.ndarray] = {}
    embed = Streams.embed

    def spy(streams: Streams, stream: int, start: int, rows: np.ndarray) -> None:
        embedded[stream] = rows
        embed(streams, stream, start, rows)

    monkeypatch.setattr(Streams, "embed", spy)
    export(folder, tmp_path / "out", type="Q8_0", tensor_types=types, **FAST, **text)
    np.testing.assert_array_equal(embedded[0], weights)
    np.testing.assert_array_equal(embedded[1], coarse)


def test_a_router_makes_up_for_what_drifted(tmp_path: Path, model: Path) -> None:
    """Behind coarse weights, on tokens that nobody saw, its logits are nearer to the model's than the model's own router's."""
    source, random = Checkpoint.open(model), torch.Generator().manual_seed(0)
    windows = torch.randint(4, 20, (60, 32), generator=random)
    planned = plan(source.architecture, recipe(type="IQ4_NL", tensor_types=["attn=Q4_0"], imatrix=True))
    exporter = GGUFExporter(source, planned, tmp_path, "Model", METHODS["gptq"]("fast"))
    (done,) = walking.export(source, [exporter], tmp_path, windows=windows[:48])
    made = GGUFSource(GGUFFile(done.files[0]), source.architecture)
    rows: list[dict[str, torch.Tensor]] = []
    for weights in (source, made):
        seen: dict[str, torch.Tensor] = {}

        def observe(stage: Stage, seen: dict[str, torch.Tensor] = seen) -> None:
            if stage.weights and stage.weights[0].role is Role.ROUTER:
                seen[stage.weights[0].name] = torch.cat([batch.inputs for batch in stage.batches(0)])

        StreamingModel(weights).hidden_states(windows[48:], observe)
        rows.append(seen)
    shares = []
    for name, exact in rows[0].items():
        kept, moved = (torch.from_numpy(weights.read(name)) for weights in (source, made))
        errors = [float((rows[1][name] @ router.T - exact @ kept.T).norm()) for router in (kept, moved)]
        shares.append(errors[1] / errors[0])
    assert max(shares) < 1
    assert min(shares) < 0.9


def test_rare_experts_have_one_rule(tmp_path: Path, text: Any, monkeypatch) -> None:
    """Importance that is measured along the walk, and from the file of `calibrate` on the same text."""
    import xent_quant

    config = {**CONFIG, "num_experts": 16, "moe_top_k": 2}
    folder = write_checkpoint(tmp_path / "Model", config, random_weights(config))
    text = {**text, "tokens": 120, "seqlen": 40}
    monkeypatch.setattr("calibration.session.SPARE", 0)
    result = xent_quant.calibrate(folder, output=tmp_path / "imatrix.gguf", **text)
    counts = np.array(result.coverage.tokens)
    assert (counts < 64).any()
    assert (counts >= 1).any()
    used: dict[str, np.ndarray] = {}
    quantise = METHODS["imatrix"].quantize

    def spy(method: Any, weights: Any, kind: Any, statistics: Any, *, name: str, pull: Any = None) -> Any:
        if statistics is not None:
            used[name] = statistics.importance
        return quantise(method, weights, kind, statistics, name=name)

    monkeypatch.setattr(METHODS["imatrix"], "quantize", spy)
    export(folder, tmp_path / "text", type="Q4_0", method="imatrix", **FAST, **text)
    measured = dict(used)
    used.clear()
    export(folder, tmp_path / "file", type="Q4_0", imatrix=tmp_path / "imatrix.gguf", **FAST)
    assert measured.keys() == used.keys()
    for name, importance in measured.items():
        np.testing.assert_allclose(importance, used[name], rtol=1e-4, err_msg=name)
    Imatrix.read(tmp_path / "imatrix.gguf").check(Checkpoint.open(folder).architecture)
