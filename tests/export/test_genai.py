"""What onnxruntime-genai is told, and that it opens the artifact and says the same."""

import dataclasses
import gc
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai
import pytest

from llmopt.engine.ort import GENAI_CONFIG, OrtEngine
from llmopt.export.genai import genai_config
from llmopt.model.spec import ModelSpec
from tests.decoders import write_decoder
from tests.families import CASES, random_weights, spec_of
from tests.onnx_nodes import relative_error

PROMPT = [43, 72, 79, 79, 82]
TOKENS = 30
STOP = 96


@pytest.fixture
def spec() -> ModelSpec:
    found = spec_of(CASES["llama"])
    return dataclasses.replace(found, bos_token_id=1, eos_token_ids=(2,), pad_token_id=None)


def config_of(spec: ModelSpec, **generation: object) -> dict:
    found = genai_config(spec, generation, "model.onnx")
    assert found is not None
    return found


def test_sizes_are_those_of_the_spec(spec: ModelSpec) -> None:
    model = config_of(spec)["model"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("llama", 97, 64)
    decoder = model["decoder"]
    assert decoder["filename"] == "model.onnx"
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[name] for name in sizes] == [16, 64, 4, 3, 2]


def test_the_context_is_what_the_graph_can_rotate() -> None:
    """Beyond its original length a longrope model would need other tables."""
    config = config_of(spec_of(CASES["phi3"]))
    assert (config["model"]["context_length"], config["search"]["max_length"]) == (32, 32)


def test_names_are_those_of_the_graph(spec: ModelSpec, tmp_path: Path) -> None:
    write_decoder(tmp_path, spec, random_weights(spec), lambda name: None, [np.arange(3)])
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    decoder = config_of(spec)["model"]["decoder"]

    def named(names: dict[str, str]) -> set[str]:
        return {name % block if "%d" in name else name for name in names.values() for block in range(3)}

    assert named(decoder["inputs"]) == {value.name for value in graph.input}
    assert named(decoder["outputs"]) == {value.name for value in graph.output}


@pytest.mark.parametrize(
    ("bos", "eos", "pad", "expected"),
    [
        (1, (2,), 3, (1, 2, 3)),
        (1, (2,), None, (1, 2, 2)),
        (1, (2, 4), None, (1, [2, 4], 2)),
        (None, (2,), 0, (0, 2, 0)),
    ],
)
def test_tokens_that_the_model_does_not_name_are_filled_in(
    spec: ModelSpec, bos: int | None, eos: tuple[int, ...], pad: int | None, expected: tuple
) -> None:
    spec = dataclasses.replace(spec, bos_token_id=bos, eos_token_ids=eos, pad_token_id=pad)
    model = config_of(spec)["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == expected


def test_sampling_is_what_the_model_was_published_with(spec: ModelSpec) -> None:
    plain, told = config_of(spec)["search"], config_of(spec, temperature=0.2, do_sample=True, top_p=0.9)["search"]
    assert (plain["temperature"], plain["do_sample"], plain["top_p"], plain["top_k"]) == (1.0, False, 1.0, 50)
    assert (told["temperature"], told["do_sample"], told["top_p"], told["top_k"]) == (0.2, True, 0.9, 50)
    assert plain["past_present_share_buffer"]
    assert plain["max_length"] == 64


def test_the_ends_of_turns_that_a_chat_model_names_are_stops(spec: ModelSpec) -> None:
    assert config_of(spec, eos_token_id=7)["model"]["eos_token_id"] == 7
    assert config_of(spec, eos_token_id=[2, 7, 9])["model"]["eos_token_id"] == [2, 7, 9]


def test_stops_beyond_the_vocabulary_are_left_out(spec: ModelSpec) -> None:
    """onnxruntime-genai would not open the artifact."""
    assert config_of(spec, eos_token_id=[2, 97])["model"]["eos_token_id"] == 2
    assert config_of(dataclasses.replace(spec, eos_token_ids=(32000,)))["model"]["eos_token_id"] == []


def test_a_family_that_genai_does_not_know_gets_no_config(spec: ModelSpec) -> None:
    assert genai_config(dataclasses.replace(spec, genai_type=None), {}, "model.onnx") is None


@pytest.mark.parametrize("case", CASES)
def test_genai_opens_every_family_and_says_what_a_stream_says(case: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(spec_of(CASES[case]), eos_token_ids=(STOP,))
    write_decoder(tmp_path, spec, random_weights(spec), lambda name: "w8a16", [np.arange(3)])
    (tmp_path / GENAI_CONFIG).write_text(json.dumps(config_of(spec)))
    stream = OrtEngine(tmp_path, threads=1).stream(capacity=TOKENS)

    generator = generator_of(tmp_path, do_sample=False)
    expected, said = stream.feed(np.array(PROMPT)), list(PROMPT)
    generator.append_tokens(np.array(PROMPT, np.int32))
    while len(said) < TOKENS and (best := int(expected.argmax())) != STOP:
        assert relative_error(generator.get_logits()[0, -1], expected) < 1e-5
        generator.generate_next_token()
        said.append(best)
        expected = stream.feed(np.array([best]))
    assert [int(token) for token in generator.get_sequence(0)] == said


def test_genai_reads_a_prompt_in_the_pieces_that_are_in_the_config(spec: ModelSpec, tmp_path: Path) -> None:
    write_decoder(tmp_path, spec, random_weights(spec), lambda name: "w8a16", [np.arange(3)])
    config = config_of(spec)
    config["search"]["chunk_size"] = 2
    config["model"]["decoder"]["session_options"]["enable_profiling"] = str(tmp_path / "profile")
    (tmp_path / GENAI_CONFIG).write_text(json.dumps(config))
    generator = generator_of(tmp_path)
    generator.append_tokens(np.array(PROMPT, np.int32))
    del generator  # writes the profile
    gc.collect()
    (profile,) = tmp_path.glob("profile*")
    details = [event["args"] for event in json.loads(profile.read_text()) if "args" in event]
    calls = [each for each in details if each.get("op_name") == "GroupQueryAttention"]
    assert len(calls) == len(spec.blocks) * 3  # pieces of five tokens
    assert {call["input_type_shape"][0]["float"][1] for call in calls} <= {1, 2}


def generator_of(folder: Path, **search: object) -> onnxruntime_genai.Generator:
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=TOKENS, **search)
    return onnxruntime_genai.Generator(model, parameters)
