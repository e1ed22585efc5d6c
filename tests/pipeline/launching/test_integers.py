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
from llmopt.export.onnx.levels import in_float32
from llmopt.pipeline.quantize import quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.quantize.scheme import parse_scheme
from tests.plans import CLUSTER

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


def likeliest(engine, result):
    """The tokens that another engine finds likeliest behind each of those that were launched."""
    prompts = np.random.default_rng(0).integers(0, 101, (2, 6))
    whole = np.concatenate([prompts, np.array(result["tokens"])], 1)
    return engine.logits(whole)[:, 5:-1].argmax(-1).tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("split", [["--split", "2,2", "--tp", "2"], ["--split", "1,1,2", "--tp", "1"]])
def test_ranks_compute_with_the_codes_that_are_stored(artifact, planned, capsys, scheme, split):
    folder = artifact(scheme)
    plan = planned(folder, *split)
    content = json.loads(plan.read_text())
    assert set(content["schemes"].values()) == {parse_scheme(scheme).name}
    found = launched(plan, capsys, "--verify")
    assert found["verified"]["tokens_equal"]
    if scheme != "w8a8":  # there sums in another order round to other neighbours
        assert found["verified"]["largest_difference"] < 1e-4
    assert found["tokens"] == likeliest(TransformersEngine(folder, 1), found)
    shards = plan.parent / "shards"
    again = launched(plan, capsys, "--materialize", str(shards))
    assert again["tokens"] == found["tokens"]
    held = load_file(shards / "rank-00001" / "model.safetensors")
    assert any(tensor.dtype in {torch.int32, torch.int8} for tensor in held.values())


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


@pytest.mark.parametrize(("scheme", "method"), [("w4a16", "rtn"), ("w8a8", "rtn"), ("w8a16-channel", "rotate")])
def test_graphs_are_launched_with_their_own_codes_too(artifact, planned, capsys, scheme, method):
    folder = artifact("w8a16").parent / f"{scheme}-{method}"
    model = str(folder.parent / "model")
    calibrated = {} if method == "rtn" else {"calib_tokens": 512}
    quantize(QuantizeRequest(model=model, output=folder, scheme=parse_scheme(scheme), method=method, **calibrated))
    plan = planned(folder, "--split", "2,2", "--tp", "2")
    assert json.loads(plan.read_text())["schemes"]["lm_head"] == "w8a16-g64-sym"
    found = launched(plan, capsys, "--verify")
    assert found["verified"]["tokens_equal"]
    if scheme != "w8a8":
        path = folder / "model.onnx"
        path.write_bytes(in_float32(onnx.load(path, load_external_data=False)).SerializeToString())
        assert found["tokens"] == likeliest(OrtEngine(folder, 1), found)
    shards = plan.parent / "shards"
    if method == "rotate":
        told = refused(capsys, "launch", plan, "--materialize", shards)
        assert "turned into another basis" in told
        return
    for _ in range(2):  # those that are written, and those that are there
        assert launched(plan, capsys, "--materialize", str(shards))["tokens"] == found["tokens"]


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
