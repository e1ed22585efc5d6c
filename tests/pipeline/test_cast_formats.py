"""Every family in mixed precision, whatever is kept: graphs and checkpoints compute what the plan means in torch."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from llmopt.engine.cast import CastEngine, open_cast
from llmopt.engine.ort import OrtEngine
from llmopt.errors import UnsupportedError, UsageError
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.cast_check import CastReferences
from llmopt.pipeline.formats.cast import CAST_FORMATS, CastHf, CastOnnx, find_cast_format
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.scan import Scan
from llmopt.pipeline.verify import Verification
from llmopt.precision.cast import DTYPES, CastPlan, choose, module_of, modules
from llmopt.progress import Silent
from tests.decoders import assignments
from tests.families import CASES, Saved, random_weights, spec_of

WINDOWS = [np.random.default_rng(seed).integers(0, 97, 24) for seed in (0, 1)]
KEPT = {
    "nothing": lambda names: (),
    "every seventh": lambda names: names[::7],
    "the embedding": lambda names: names[:1],
    "all but norms": lambda names: [name for name in names if "norm" not in name],
    "norms": lambda names: [name for name in names if "norm" in name or "ln_" in name],
}


def reader(spec: ModelSpec, saved: Saved) -> PartReader:
    return PartReader(spec, saved, assignments(spec, lambda name: None), None)


def planned(spec: ModelSpec, saved: Saved, dtype: str, keep: Sequence[str]) -> CastPlan:
    ranges = Scan(spec, WINDOWS, DTYPES[dtype]).run(reader(spec, saved), Silent())
    return choose(spec, ranges, dtype, tolerance=0.5, keep_fp32=keep)


def written(folder: Path, case: str, dtype: str, kept: str, format_: str) -> tuple[CastPlan, Verification]:
    torch.set_num_threads(1)
    config, cast_format = CASES[case], CAST_FORMATS[format_]
    spec = spec_of(config)
    saved = random_weights(spec)
    plan = planned(spec, saved, dtype, KEPT[kept](list(modules(spec))))
    references = CastReferences(spec, WINDOWS, plan, short_tables=cast_format.short_tables)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with closing(cast_format.writer(spec, plan, folder)) as writer:
        parts = reader(spec, saved)
        embedding = parts.embedding()
        references.embedding(writer.embedding(embedding.weights))
        for block, part in zip(spec.blocks, parts.blocks(), strict=True):
            references.block(block, writer.block(block, part.weights))
        references.head(writer.head(parts.head(embedding).weights))
        writer.save()
    return plan, cast_format.verify(folder, references, plan, 1, Silent())


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", CASES)
def test_a_graph_computes_what_the_plan_means(case: str, kept: str, tmp_path: Path) -> None:
    plan, verification = written(tmp_path, case, "fp16", kept, "onnx")
    assert verification.exact.relative_error < 2e-5
    assert verification.shipped is not None
    assert verification.shipped.relative_error < 1e-2
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    linears = {linear.name for linear in spec_of(CASES[case]).linears()}
    stored = {tensor.name for tensor in graph.initializer}
    for name in linears & {tensor.removesuffix(".weight") for tensor in stored}:
        assert (f"{name}.weight" in half) == plan.choices[name].half, name


@pytest.mark.parametrize(("dtype", "kept"), [*(("fp16", kept) for kept in KEPT), ("bf16", "every seventh")])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_computes_what_the_plan_means(case: str, dtype: str, kept: str, tmp_path: Path) -> None:
    plan, verification = written(tmp_path, case, dtype, kept, "hf")
    assert verification.exact.relative_error < 2e-5
    spec = spec_of(CASES[case])
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.dtype == plan.dtype_of(module_of(spec, name)), name


def test_a_stream_of_a_graph_says_what_its_logits_say(tmp_path: Path) -> None:
    """Over caches of two dtypes."""
    plan, _ = written(tmp_path, "llama", "fp16", "every seventh", "onnx")
    assert {choice.half for name, choice in plan.choices.items() if name.endswith("q_proj")} == {True, False}
    engine = OrtEngine(tmp_path, threads=1)
    ids_T = WINDOWS[0]
    stream = engine.stream(capacity=len(ids_T))
    stream.feed(ids_T[:20])
    for token in ids_T[20:23]:
        stream.feed(np.array([token]))
    last_V = stream.feed(ids_T[23:24])
    np.testing.assert_allclose(last_V, engine.logits(ids_T[None])[0, -1], atol=0.02 * float(np.abs(last_V).max()))


def test_a_stream_of_a_checkpoint_says_what_its_logits_say(tmp_path: Path) -> None:
    written(tmp_path, "qwen3", "fp16", "every seventh", "hf")
    engine = CastEngine(tmp_path, threads=1).cast()
    ids_T = WINDOWS[0]
    stream = engine.stream(capacity=len(ids_T))
    stream.feed(ids_T[:20])
    last_V = stream.feed(ids_T[20:])
    np.testing.assert_allclose(last_V, engine.logits(ids_T[None])[0, -1], atol=0.02 * float(np.abs(last_V).max()))


def test_what_is_opened_from_python_has_the_dtypes_of_the_file(tmp_path: Path) -> None:
    plan, _ = written(tmp_path, "llama", "fp16", "every seventh", "hf")
    model = open_cast(tmp_path)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.q_proj"):
        assert model.get_submodule(name).weight.dtype == plan.dtype_of(name), name


@pytest.mark.parametrize(("kept", "gives"), [("norms", torch.float32), ("nothing", torch.float16)])
def test_a_norm_gives_what_it_reads_unless_it_is_kept(kept: str, gives: torch.dtype, tmp_path: Path) -> None:
    written(tmp_path, "llama", "fp16", kept, "hf")
    norm = open_cast(tmp_path).get_submodule("model.norm")
    x_H = torch.full((64,), 300.0, dtype=torch.float16)
    assert norm(x_H).dtype == gives
    assert norm(x_H.float()).dtype == torch.float32


def test_bfloat16_graphs_are_refused_for_there_are_no_kernels() -> None:
    spec = spec_of(CASES["llama"])
    CastOnnx().check(spec, "fp16")
    CastHf().check(spec, "bf16")
    with pytest.raises(UnsupportedError, match="no bf16 kernels") as caught:
        CastOnnx().check(spec, "bf16")
    assert caught.value.hint == "--dtype fp16, or --format hf"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="no format 'gptq' to cast to"):
        find_cast_format("gptq")
