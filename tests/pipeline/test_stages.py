"""`llmopt partition --export onnx`: the stages of a plan as graphs, from floats and from integers."""

import json

import numpy as np
import onnx
import pytest

from llmopt.artifact import load_manifest
from llmopt.cli.app import app
from llmopt.cli.outcome import run
from llmopt.engine.ort import OrtEngine
from llmopt.engine.ort_stages import StagesEngine
from llmopt.engine.transformers import TransformersEngine
from llmopt.errors import VerificationError
from llmopt.export.onnx.levels import in_float32
from llmopt.pipeline import stages as module
from llmopt.pipeline.quantize import quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.quantize.scheme import parse_scheme
from tests.onnx_nodes import relative_error
from tests.plans import CLUSTER
from tests.whole_way import bytes_of

IDS_BT = np.random.default_rng(1).integers(0, 128, (1, 20))


@pytest.fixture
def partition(tmp_path):
    """Plans a model and writes its stages; gives the exit code."""
    cluster = json.loads(json.dumps(CLUSTER))
    cluster["devices"]["cpu"]["speeds"]["w8a8"] = {"tflops": 0.1, "gb_per_s": 10}
    (tmp_path / "c.yaml").write_text(json.dumps(cluster))

    def do(model, *words, split="1,1", to="stages", degree=1):
        places = ["--cluster", tmp_path / "c.yaml", "-o", tmp_path / "plan.json", "--export-to", tmp_path / to]
        sizes = ["--prompt", "6", "--output-tokens", "4", "--dtype", "float32", "--split", split, "--tp", degree]
        return run(app, [str(word) for word in ["partition", model, *places, *sizes, "--export", "onnx", *words]])

    return do


@pytest.mark.parametrize("scheme", [None, "w4a16", "w8a16", "w8a8"])
def test_stages_are_what_the_model_is_as_one_graph(tiny_llama, partition, tmp_path, capsys, scheme):
    asked = [] if scheme is None else ["--scheme", scheme]
    assert partition(tiny_llama, *asked, "--json") == 0
    found = json.loads(capsys.readouterr().out)["export"]
    assert [stage["file"] for stage in found["stages"]] == ["stage-0.onnx", "stage-1.onnx"]
    assert found["relative_error"] < 1e-4
    load_manifest(tmp_path / "stages", verify=True)
    if scheme is None:
        from llmopt.engine.torch import TorchEngine
        from llmopt.model.checkpoint import open_checkpoint
        from llmopt.model.source import open_source

        source = open_source(str(tiny_llama))
        with open_checkpoint(source) as checkpoint:
            expected = TorchEngine(source.spec, checkpoint).logits(IDS_BT)
        assert relative_error(StagesEngine(tmp_path / "stages", 1).logits(IDS_BT), expected) < 1e-4
        return
    quantize(QuantizeRequest(model=str(tiny_llama), output=tmp_path / "whole", scheme=parse_scheme(scheme)))
    for path in [*(tmp_path / "stages").glob("*.onnx"), tmp_path / "whole" / "model.onnx"]:
        path.write_bytes(in_float32(onnx.load(path, load_external_data=False)).SerializeToString())
    expected = OrtEngine(tmp_path / "whole", 1).logits(IDS_BT)
    assert relative_error(StagesEngine(tmp_path / "stages", 1).logits(IDS_BT), expected) < 1e-4


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16-channel", "w8a8"])
def test_integers_are_those_of_the_artifact(tiny_qwen2, partition, tmp_path, scheme):
    whole = tmp_path / "whole"
    quantize(QuantizeRequest(model=str(tiny_qwen2), output=whole, scheme=parse_scheme(scheme), format="hf"))
    assert partition(whole) == 0
    for path in (tmp_path / "stages").glob("*.onnx"):
        path.write_bytes(in_float32(onnx.load(path, load_external_data=False)).SerializeToString())
    engine = TransformersEngine(whole, 1)
    engine.round_activations(False)
    found = StagesEngine(tmp_path / "stages", 1).logits(IDS_BT)
    # transformers unpacks weights with zero points in bfloat16, which rounds them once more.
    assert relative_error(found, engine.logits(IDS_BT)) < (0.02 if scheme == "w4a16" else 1e-4)


def test_a_graph_is_cut_with_its_own_codes(tiny_llama, partition, tmp_path):
    whole = tmp_path / "whole"
    quantize(QuantizeRequest(model=str(tiny_llama), output=whole, scheme=parse_scheme("w4a16"), method="search"))
    assert partition(whole) == 0
    for path in [*(tmp_path / "stages").glob("*.onnx"), whole / "model.onnx"]:
        path.write_bytes(in_float32(onnx.load(path, load_external_data=False)).SerializeToString())
    expected = OrtEngine(whole, 1).logits(IDS_BT)
    assert relative_error(StagesEngine(tmp_path / "stages", 1).logits(IDS_BT), expected) < 1e-5


def test_generate_runs_them(tiny_llama, partition, tmp_path, capsys):
    assert partition(tiny_llama) == 0
    capsys.readouterr()
    said = []
    for model in (tmp_path / "stages", tiny_llama):
        assert run(app, ["generate", str(model), "abc", "--max-tokens", "8"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    words = ["bench", str(tmp_path / "stages"), "--baseline", str(tiny_llama)]
    assert run(app, words) == 2
    assert "is cut into stages" in capsys.readouterr().err


def test_the_same_plan_gives_the_same_bytes_and_is_not_overwritten_unasked(tiny_llama, partition, tmp_path, capsys):
    assert partition(tiny_llama, "--scheme", "w4a16") == 0
    first = bytes_of(tmp_path / "stages")
    (tmp_path / "plan.json").unlink()
    assert partition(tiny_llama, "--scheme", "w4a16") == 3
    assert "the output exists already" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
    assert partition(tiny_llama, "--scheme", "w4a16", "--force") == 0
    assert bytes_of(tmp_path / "stages") == first


def test_a_graph_that_computes_something_else_never_appears(tiny_llama, partition, tmp_path, capsys, monkeypatch):
    def wrong(model, folder, feeds, output, threads):
        return [array * 1.01 for array in right(model, folder, feeds, output, threads)]

    right = module.run_in_segments
    monkeypatch.setattr(module, "run_in_segments", wrong)
    assert partition(tiny_llama) == VerificationError.exit_code
    assert "what stage-0.onnx gives is 0.01 of its norm away" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"split": "2", "degree": 2}, "a graph is for one device, and stage 0 has 2"),
        ({"split": "2,0"}, "stage 1 has no blocks"),
    ],
)
def test_what_is_no_graph_is_refused(tiny_llama, partition, capsys, options, told):
    assert partition(tiny_llama, **options) == 3
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--export", "onnx"], ["--export", "vllm", "--export-to", "f"], ["--export-to", "f"]]
)
def test_graphs_and_their_folder_are_asked_for_together(tiny_llama, tmp_path, capsys, words):
    places = ["--cluster", str(tmp_path / "c.yaml"), "-o", str(tmp_path / "plan.json")]
    assert run(app, ["partition", str(tiny_llama), *places, *words]) == 2
    assert "neither is without the other" in capsys.readouterr().err
