"""Ranks of a model that is stored as integers: its own codes and scales, a share each."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.cli.app import app
from llmopt.cli.outcome import run
from llmopt.engine.ort import OrtEngine
from llmopt.engine.transformers import TransformersEngine
from llmopt.errors import UnsupportedError
from llmopt.export.onnx.levels import in_float32
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import open_source
from llmopt.model.turned import TurnedTensors
from llmopt.pipeline.launching.job import Job
from llmopt.pipeline.launching.shards import materialize
from llmopt.pipeline.quantize import quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.pipeline.stored import open_model, stored_format, stored_schemes
from llmopt.progress import Silent
from llmopt.quantize.scheme import parse_scheme
from tests.decoders import write_decoder
from tests.forked import run_forked
from tests.partition.ranks import layout_of
from tests.plans import CLUSTER

PROMPTS = ((5, 9, 77, 3, 100, 42), (1, 2, 3, 50, 60, 70))
SCHEMES = ["w4a16-g32-sym", "w4a16", "w8a16", "w8a16-channel", "w8a8"]


@pytest.fixture(scope="session")
def wide(six_heads, tmp_path_factory):
    """A folder with a Llama whose heads and channels are cut by two and by three between groups of 32 and of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101,
        hidden_size=384,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    folder = tmp_path_factory.mktemp("wide")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def artifact(wide, tiny_llama, tmp_path_factory):
    """The folder of `wide` in a scheme, written once."""
    folder = tmp_path_factory.mktemp("artifacts")
    model = shutil.copytree(wide, folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama / name, model / name)

    def write(scheme):
        output = folder / scheme
        if not output.exists():
            quantize(QuantizeRequest(model=str(model), output=output, scheme=parse_scheme(scheme), format="hf"))
        return output

    return write


@pytest.fixture
def planned(tmp_path):
    """Plans a model, as people do; the plan's path."""
    cluster = json.loads(json.dumps(CLUSTER))
    cluster["devices"]["cpu"]["speeds"]["w8a8"] = {"tflops": 0.1, "gb_per_s": 10}
    (tmp_path / "c.yaml").write_text(json.dumps(cluster))

    def plan(model, *words):
        path = tmp_path / "plan.json"
        sizes = ["--prompt", "6", "--output-tokens", "4", "--batch", "2", "--dtype", "float32"]
        words = ["partition", str(model), "--cluster", str(tmp_path / "c.yaml"), "-o", str(path), "--force", *words]
        assert run(app, [*words, *sizes, "--quiet"]) == 0
        return path

    return plan


def launched(plan, capsys, *words):
    capsys.readouterr()
    assert run(app, ["launch", str(plan), "--json", "--rounds", "1", *words]) == 0
    return json.loads(capsys.readouterr().out)


def forked(folder, layout, tmp_path, shards=None):
    """What ranks of a model make of two prompts."""
    source = open_model(str(folder), weights=False)
    schemes = stored_schemes(source)
    if shards is not None:
        materialize(source, layout, "a" * 64, shards, Silent(), schemes=schemes)
    job = Job(
        model=str(folder) if shards is None else "not needed any more",
        shards=None if shards is None else str(shards),
        plan_hash="a" * 64,
        layout=layout,
        schemes={name: scheme.name for name, scheme in schemes.items()},
        stored=stored_format(source),
        ids_BT=PROMPTS,
        output=4,
        keep_logits=True,
        timeout_s=30,
    )
    return run_forked(job, tmp_path)


def behind(engine, ids_BT):
    """Another engine's logits behind the prompts and the tokens that followed."""
    whole = np.concatenate([np.array(PROMPTS), ids_BT.numpy()], 1)
    return torch.from_numpy(engine.logits(whole)[:, 5:-1])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("stages", [((2, 2), (2, 2)), ((1, 1), (1, 3), (2, 1))])
def test_ranks_compute_what_transformers_does_from_the_codes_that_are_stored(artifact, tmp_path, scheme, stages):
    folder, layout = artifact(scheme), layout_of(*stages)
    found = forked(folder, layout, tmp_path)
    expected_BTV = behind(TransformersEngine(folder, 1), found.ids_BT)
    assert torch.equal(found.ids_BT, expected_BTV.argmax(-1))
    if scheme == "w8a8":  # sums in another order round to other neighbours
        assert (found.logits_BTV - expected_BTV).norm() < 0.05 * expected_BTV.norm()
    else:
        torch.testing.assert_close(found.logits_BTV, expected_BTV, atol=1e-4, rtol=0)
    again = forked(folder, layout, tmp_path, tmp_path / "shards")
    assert torch.equal(again.logits_BTV, found.logits_BTV)
    held = load_file(tmp_path / "shards" / "rank-00001" / "model.safetensors")
    assert any(tensor.dtype in {torch.int32, torch.int8} for tensor in held.values())


def test_a_quantized_model_is_planned_and_launched_as_people_do(artifact, planned, capsys):
    plan = planned(artifact("w4a16-g32-sym"), "--split", "2,2", "--tp", "1")
    assert set(json.loads(plan.read_text())["schemes"].values()) == {"w4a16-g32-sym"}
    found = launched(plan, capsys, "--verify")
    assert found["verified"]["tokens_equal"]
    assert found["verified"]["largest_difference"] < 1e-4
    shards = plan.parent / "shards"
    for _ in range(2):  # those that are written, and those that are there
        assert launched(plan, capsys, "--materialize", str(shards))["tokens"] == found["tokens"]


def turn(folder, model):
    """Write a graph of the model in another basis into the folder of one."""
    source = open_source(model)
    turn_HH, _ = torch.linalg.qr(torch.randn(384, 384, generator=torch.Generator().manual_seed(0)))
    with open_checkpoint(source) as checkpoint:
        turned = TurnedTensors(checkpoint, source.spec, turn_HH)
        write_decoder(folder, turned.spec, turned, lambda name: "w8a16", [np.array(PROMPTS[0])])


@pytest.mark.parametrize(("scheme", "turned"), [("w4a16", False), ("w8a8", False), ("w8a16", True)])
def test_graphs_are_launched_with_their_own_codes_too(artifact, tmp_path, scheme, turned):
    model = str(artifact("w8a16").parent / "model")
    folder, layout = tmp_path / "graph", layout_of((2, 2), (2, 1))
    quantize(QuantizeRequest(model=model, output=folder, scheme=parse_scheme(scheme)))
    if turned:
        turn(folder, model)
    found = forked(folder, layout, tmp_path)
    if turned:
        with pytest.raises(UnsupportedError, match="turned into another basis"):
            forked(folder, layout, tmp_path, tmp_path / "shards")
    else:
        assert torch.equal(forked(folder, layout, tmp_path, tmp_path / "shards").logits_BTV, found.logits_BTV)
    path = folder / "model.onnx"
    path.write_bytes(in_float32(onnx.load(path, load_external_data=False), integers=True).SerializeToString())
    expected_BTV = behind(OrtEngine(folder, 1), found.ids_BT)
    assert torch.equal(found.ids_BT, expected_BTV.argmax(-1))
    error = (found.logits_BTV - expected_BTV).norm() / expected_BTV.norm()
    assert error < (0.05 if scheme == "w8a8" else 1e-5)


def test_a_graph_is_planned_with_its_table(artifact, planned, capsys):
    folder = artifact("w8a16").parent / "planned"
    model = str(folder.parent / "model")
    quantize(QuantizeRequest(model=model, output=folder, scheme=parse_scheme("w4a16"), force=True))
    plan = planned(folder, "--split", "2,2", "--tp", "1")
    assert json.loads(plan.read_text())["schemes"]["lm_head"] == "w8a16-g64-sym"
    assert launched(plan, capsys, "--verify", "--materialize", str(plan.parent / "shards"))["verified"]["tokens_equal"]


def edited(plan, **changes):
    """The same plan, written by hand."""
    content = json.loads(plan.read_text()) | changes
    plan.write_text(json.dumps(content))
    return plan


def beside(plan):
    """Words for another plan on the same cluster."""
    where = ["--cluster", plan.parent / "c.yaml", "-o", plan.parent / "other.json"]
    return [*where, "--dtype", "float32", "--prompt", "6", "--output-tokens", "4"]


def refused(capsys, *words):
    capsys.readouterr()
    assert run(app, [str(word) for word in words]) in {2, 3}
    return capsys.readouterr().err


def test_a_degree_that_cuts_groups_is_refused_before_anything_is_read(artifact, planned, capsys):
    folder = artifact("w4a16-g128-sym")
    plan = planned(folder, "--split", "4", "--tp", "3")
    what = r"o_proj has 384 inputs in groups of 128, and a device of 2 would get 192"
    told = refused(capsys, "partition", folder, *beside(plan), "--tp", "2")
    assert what in told
    assert "legal degrees: 1, 3" in told
    stage = json.loads(plan.read_text())["stages"][0] | {"tp": 2, "devices": ["here/cpu:0", "here/cpu:1"]}
    told = refused(capsys, "launch", edited(plan, stages=[stage]))
    assert what in told
    assert "legal degrees: 1, 3" in told


def test_a_model_keeps_the_schemes_that_it_has(artifact, planned, capsys):
    folder = artifact("w8a16")
    plan = planned(folder, "--split", "4")
    assert "quantized already" in refused(capsys, "partition", folder, *beside(plan), "--scheme", "w4a16")
    schemes = json.loads(plan.read_text())["schemes"]
    other = schemes | {"model.layers.2.mlp.up_proj": "w4a16"}
    told = refused(capsys, "launch", edited(plan, schemes=other))
    assert "model.layers.2.mlp.up_proj is stored in w8a16-g64-sym, and the plan says w4a16-g32-asym" in told
    assert "the plan says no scheme" in refused(capsys, "launch", edited(plan, schemes={}))


def test_a_model_of_floats_is_not_sharded_as_integers(wide, planned, capsys):
    plan = planned(wide, "--split", "4", "--scheme", "w8a16")
    told = refused(capsys, "launch", plan, "--materialize", plan.parent / "shards")
    assert "the plan quantizes a model of floats as it is read" in told
    assert "--format hf" in told


def test_other_formats_are_refused(artifact, planned, capsys):
    folder = artifact("w8a16")
    plan, model = planned(folder, "--split", "4"), folder.parent / "model"
    output = plan.parent / "gptq"
    quantize(QuantizeRequest(model=str(model), output=output, scheme=parse_scheme("w8a16"), format="gptq"))
    told = refused(capsys, "partition", output, *beside(plan))
    assert "ranks cannot read their parts of an artifact of format gptq" in told


def test_a_damaged_tensor_is_named(artifact, planned, capsys, tmp_path):
    folder = shutil.copytree(artifact("w4a16-g32-sym"), tmp_path / "damaged")
    plan = planned(folder, "--split", "2,2", "--tp", "1")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    scales = tensors.pop("model.layers.3.mlp.up_proj.weight_scale")
    save_file(tensors, path)
    assert "the checkpoint lacks model.layers.3.mlp.up_proj.weight_scale" in refused(capsys, "launch", plan)
    save_file(tensors | {"model.layers.3.mlp.up_proj.weight_scale": scales[:, :1].contiguous()}, path)
    told = refused(capsys, "launch", plan)
    assert "up_proj.weight_scale is F32 [384, 1], where w4a16-g32-sym takes F32 [384, 12]" in told
