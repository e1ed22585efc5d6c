"""Stages as graphs: one behind the other they compute what the whole graph does, and they say where they are."""

import json
from contextlib import closing
from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime
import pytest

from llmopt.engine.ort import OrtEngine
from llmopt.engine.ort_stages import SCHEMA, STAGES, StageFile, StagesEngine, read_stages
from llmopt.errors import ArtifactError, UsageError
from llmopt.export.onnx.decoder import DecoderGraph
from llmopt.export.onnx.levels import in_float32
from llmopt.export.onnx.stage import CONFIGURATION, Stage
from llmopt.export.stages import stages_card
from llmopt.pipeline.parts import PartReader
from llmopt.quantize.rtn import Rtn
from tests.decoders import assignments, write_decoder
from tests.export.test_decoder import IDS_BT, SCHEMES, TOKENS
from tests.families import CASES, random_weights, spec_of
from tests.onnx_nodes import relative_error

FAMILIES = ["llama", "llama, tied, wide heads", "mistral", "qwen3", "phi3", "gemma3", "gpt2", "opt"]
EXACT = 2e-5  # relative error of logits: sums in another order, as of whole graphs
SHIPPED = 0.05  # activations are rounded to int8 in kernels, and what lies between two codes falls to either side


def write(folder, spec, scheme_of, cuts):
    """Stages with so many blocks each."""
    parts = PartReader(spec, random_weights(spec), assignments(spec, scheme_of), Rtn())
    devices = tuple(f"d{number}" for number in range(len(cuts)))
    embedding, blocks, first, files = parts.embedding(), iter(parts.blocks()), 0, []
    for number, count in enumerate(cuts):
        stage = Stage(number=number, devices=devices)
        with closing(DecoderGraph(folder, spec, stage=stage)) as graph:
            if stage.first:
                graph.embedding(embedding.weights)
            for block in spec.blocks[first : first + count]:
                graph.block(block, next(blocks).weights)
            if stage.last:
                graph.head({**embedding.weights, **parts.head(embedding).weights})
            else:
                graph.hidden()
            graph.save("0")
        reads, gives = "hidden_states" if number else "input_ids", "logits" if stage.last else "next_hidden_states"
        layers, data = (first, first + count), f"{stage.file}.data"
        files.append(
            StageFile(file=stage.file, data=data, device=devices[number], layers=layers, reads=reads, gives=gives)
        )
        first += count
    (folder / STAGES).write_text(json.dumps({"schema": SCHEMA, "stages": [asdict(file) for file in files]}))


def in_floats(folder):
    """The same graphs without rounded activations."""
    for path in folder.glob("*.onnx"):
        path.write_bytes(in_float32(onnx.load(path, load_external_data=False)).SerializeToString())


@pytest.fixture(params=[(case, schemes) for case in FAMILIES for schemes in ("float", "w4a16", "w8a8", "mixed")])
def both(request, tmp_path):
    """Folders of a whole graph and of its stages."""
    case, schemes = request.param
    spec = spec_of(CASES[case])
    whole, stages = tmp_path / "whole", tmp_path / "stages"
    whole.mkdir()
    stages.mkdir()
    write_decoder(whole, spec, random_weights(spec), SCHEMES[schemes], [IDS_BT[0]])
    write(stages, spec, SCHEMES[schemes], [1] * len(spec.blocks))
    return whole, stages


def test_stages_compute_what_the_whole_graph_does(both):
    """As they ship, and without rounding; a batch at once, and a prompt followed by token after token."""
    for tolerance, prepared in ((SHIPPED, lambda folder: None), (EXACT, in_floats)):
        for folder in both:
            prepared(folder)
        whole, stages = OrtEngine(both[0], threads=1), StagesEngine(both[1], threads=1)
        assert relative_error(stages.logits(IDS_BT), whole.logits(IDS_BT)) < tolerance
        streams = [engine.stream(TOKENS) for engine in (whole, stages)]
        for piece in np.split(IDS_BT[0], [9, 10, 11, 20]):
            expected, found = (stream.feed(piece) for stream in streams)
            assert relative_error(found, expected) < tolerance


def test_every_node_says_its_stage_and_the_model_its_devices(tmp_path):
    spec = spec_of(CASES["gpt2"])  # the checker does not know the norms of others, which onnxruntime has
    write(tmp_path, spec, SCHEMES["w8a8"], [2, 1])
    for number in range(2):
        path = tmp_path / f"stage-{number}.onnx"
        onnx.checker.check_model(str(path))
        model = onnx.load(path, load_external_data=False)
        assert model.ir_version >= 11
        (plan,) = model.configuration
        assert (plan.name, plan.num_devices, list(plan.device)) == (CONFIGURATION, 2, ["d0", "d1"])
        branches = [attribute.g.node for node in model.graph.node for attribute in node.attribute]
        assert any(branches), "no node is inside another"
        for node in [*model.graph.node, *(node for branch in branches for node in branch)]:
            (said,) = node.device_configurations
            assert (said.configuration_id, said.pipeline_stage) == (CONFIGURATION, number)


def test_a_stage_has_the_cache_of_its_own_blocks(tmp_path):
    write(tmp_path, spec_of(CASES["llama"]), SCHEMES["float"], [2, 1])
    sessions = [onnxruntime.InferenceSession(tmp_path / f"stage-{number}.onnx") for number in range(2)]
    first, last = ([node.name for node in session.get_inputs()] for session in sessions)
    assert first[:2] == ["input_ids", "attention_mask"]
    assert last[:2] == ["hidden_states", "attention_mask"]
    assert {name.split(".")[1] for name in first[2:]} == {"0", "1"}
    assert {name.split(".")[1] for name in last[2:]} == {"2"}
    assert [session.get_outputs()[0].name for session in sessions] == ["next_hidden_states", "logits"]


def test_the_program_in_the_card_says_what_the_engine_says(tmp_path, capsys, monkeypatch):
    write(tmp_path, spec_of(CASES["llama"]), SCHEMES["float"], [2, 1])
    card = stages_card("a model", read_stages(tmp_path))
    assert "| stage-1.onnx | d1 | 2 to 2 | hidden_states | logits |" in card
    monkeypatch.chdir(tmp_path)
    exec(card.partition("```python\n")[2].partition("```")[0], {})
    stream = StagesEngine(tmp_path, 1).stream(20)
    ids = [int(stream.feed(np.array([1, 2, 3])).argmax())]
    while len(ids) < 8:
        ids.append(int(stream.feed(np.array(ids[-1:])).argmax()))
    assert capsys.readouterr().out.strip() == str(ids)
    with pytest.raises(UsageError, match="21 tokens do not fit"):
        stream.feed(np.arange(11))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file"),
        ("{", "this is no list of stages"),
        ({"schema": SCHEMA}, "this is no list of stages"),
        ({"schema": SCHEMA, "stages": []}, "this llmopt knows"),
        ({"schema": "llmopt.stages/9"}, "this llmopt knows"),
        ({"stages": [{"file": "../stage-0.onnx"}]}, "this llmopt knows"),
    ],
)
def test_a_list_that_says_something_else_is_refused(tmp_path, content, told):
    write(tmp_path, spec_of(CASES["llama"]), SCHEMES["float"], [2, 1])
    path = tmp_path / STAGES
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    else:
        known = json.loads(path.read_text())
        stages = [known["stages"][0] | one for one in content.get("stages", [])] if "stages" in content else None
        changed = known | content | ({} if stages is None else {"stages": stages})
        path.write_text(json.dumps(changed if content != {"schema": SCHEMA} else content))
    with pytest.raises(ArtifactError, match=told):
        StagesEngine(tmp_path, 1)


def test_a_missing_graph_is_named(tmp_path):
    write(tmp_path, spec_of(CASES["llama"]), SCHEMES["float"], [2, 1])
    (tmp_path / "stage-1.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"stage-1\.onnx\.data is missing"):
        StagesEngine(tmp_path, 1)
