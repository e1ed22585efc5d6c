import re
import shlex
from dataclasses import replace

import pytest
import yaml

from llmopt.artifact import Manifest
from llmopt.artifact.manifest import FileEntry, Source
from llmopt.calibrate.text import BUILT_IN_CALIBRATION
from llmopt.export.card import Card, card_text
from llmopt.report.results import METRICS, Candidate, Delta, LayerResult, Measurement, Report, Subject

HOSTILE = "evil\n---\nlicense: mit\n# Title\n```sh\nrm -rf / | `id` <script> [a](http://b)"


def measured(metric, value, low=None, high=None):
    return Measurement(value=value, low=low, high=high, n=9, unit=METRICS[metric][0])


def manifest(name="HuggingFaceTB/SmolLM2-135M", **changes):
    made = Manifest(
        source=Source(name=name, revision="a1b2", fingerprint="c0ffee"),
        format="onnx",
        scheme="w4a16-g32-asym",
        method="rtn",
        files={"genai_config.json": FileEntry(sha256="00", bytes=1)},
    )
    return replace(made, **changes)


def report(name="some folder", layers=()):
    candidate = Candidate(
        name=name,
        engine="onnxruntime 1",
        metrics={
            "size_bytes": measured("size_bytes", 96e6),
            "perplexity": measured("perplexity", 33.5, 32.6, 34.4),
            "tpot_ms": measured("tpot_ms", 7.7777, 7, 8),
            "peak_rss_bytes": measured("peak_rss_bytes", 555.5e6, 5e8, 6e8),
        },
        deltas={"perplexity": Delta(relative=0.167, low=0.16, high=0.175, noise_low=0, noise_high=0)},
        layers=layers,
    )
    baseline = Subject(name="x", engine="onnxruntime 1", metrics={"perplexity": measured("perplexity", 28.7, 28, 29.5)})
    text = {"text": "WikiText-2", "tokens": 283287, "clusters": 62, "clustered_by": "document"}
    return Report(host={}, versions={}, seed=0, baseline=baseline, candidates=(candidate,), settings={"fidelity": text})


def card(of=None, measurement=None, config=None, **more):
    return card_text(Card.of(of or manifest(), config or {}, measurement or report(), **more))


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def command(text):
    return shlex.split(re.search(r"```sh\n(llmopt quantize .*)\n```", text)[1])


def test_the_front_matter_places_the_model_under_its_base_on_the_hub():
    assert front_matter(card(license="apache-2.0")) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "quantized",
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "quantized", "int4", "llmopt"],
    }


@pytest.mark.parametrize("name", ["demo", "model.gguf", "a/b/c", "../up", "a/b\nlicense: x", HOSTILE])
def test_what_is_no_hub_id_is_no_base_model(name):
    matter = front_matter(card(manifest(name)))
    assert "base_model" not in matter
    assert "base_model_relation" not in matter
    assert "license" not in matter


def test_accuracy_and_size_are_in_the_table_and_nothing_that_a_clock_or_a_machine_decides():
    text = card()
    assert "| size on disk | baseline | — |" in text
    assert "|  | this model | 33.50 | [32.60, 34.40] | +16.7 % | [+16.0, +17.5] | ±0 % | 0.80 % |" in text
    assert "283,287 tokens of 62 documents" in text
    for word in ("7.778", "555.5", "memory", "token,", "per output token"):
        assert word not in text


def test_the_card_does_not_depend_on_where_the_artifact_was_written():
    assert card(measurement=report("here")) == card(measurement=report("there"))


def test_accuracy_that_was_not_measured_is_said_to_be_so():
    alone = replace(report(), baseline=None, settings={})
    text = card(measurement=alone)
    assert "Accuracy was not measured." in text
    assert "baseline" not in text


def test_the_command_makes_it_again():
    made = manifest(overrides={"lm_head": "w8a16-g64-sym"}, ignore=("*.down_proj",), seed=3)
    assert command(card(made)) == [
        *("llmopt", "quantize", "HuggingFaceTB/SmolLM2-135M", "-o", "OUT", "--format", "onnx", "--revision", "a1b2"),
        *("--scheme", "w4a16-g32-asym", "--method", "rtn", "--override", "lm_head=w8a16-g64-sym"),
        *("--ignore", "*.down_proj", "--seed", "3"),
    ]


def test_what_was_calibrated_on_is_told_and_given_again():
    read = {"text": "wiki.txt", "sha256": "beef", "tokens": 5000, "window": 512}
    text = card(manifest(method="gptq", calibration=read))
    assert "at most 5000 tokens of wiki.txt, whose SHA-256 is `beef`" in text
    assert command(text)[-4:] == ["--calib", "wiki.txt", "--calib-tokens", "5000"]
    own = card(manifest(method="gptq", calibration=read | {"text": BUILT_IN_CALIBRATION}))
    assert "--calib" not in command(own)
    assert command(own)[-2:] == ["--calib-tokens", "5000"]


def test_genai_is_shown_only_where_it_opens_the_folder():
    assert "import onnxruntime_genai" in card()
    without = card(manifest(files={}))
    assert "onnxruntime_genai" not in without
    assert front_matter(without)["library_name"] == "onnxruntime"


def test_genai_has_every_function_that_the_card_calls():
    import onnxruntime_genai as og

    calls = re.findall(r"og\.(\w+)", card())
    assert set(calls) == {"Model", "Tokenizer", "GeneratorParams", "Generator"}
    assert all(hasattr(og, name) for name in calls)
    assert all(hasattr(og.Generator, name) for name in re.findall(r"generator\.(\w+)\(", card()))
    assert all(hasattr(og.GeneratorParams, name) for name in re.findall(r"parameters\.(\w+)\(", card()))


def test_layers_are_listed_with_equal_blocks_in_one_row():
    layers = tuple(
        LayerResult(name=f"h.{index}.up", scheme="w8a16-g64-sym", method="rtn", relative_error=0.01)
        for index in range(30)
    )
    assert "| `h.{0..29}.up` | w8a16-g64-sym | rtn | 0.0100 |  |" in card(measurement=report(layers=layers))


def test_what_comes_from_outside_cannot_add_lines_blocks_or_markup():
    read = {"text": HOSTILE, "sha256": "beef", "tokens": 5000, "window": 512}
    hostile = manifest(HOSTILE, ignore=(HOSTILE,), calibration=read)
    layers = (LayerResult(name=HOSTILE, scheme=None, method=None, reason=HOSTILE),)
    text = card(hostile, report(layers=layers), config={"architectures": [HOSTILE]})
    harmless = card(
        manifest("harmless", ignore=("x",), calibration=read | {"text": "z"}),
        report(layers=(replace(layers[0], name="y", reason="z"),)),
    )
    assert text.count("\n") == harmless.count("\n")
    assert text.count("```") == harmless.count("```")
    assert text.count("\n---\n") == 1
    outside_code = re.sub(r"```.*?```|(?<!\\)`.*?(?<!\\)`", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(http://b", outside_code)
    words = command(text)
    assert words[2] == words[-1] == " ".join(HOSTILE.split()).replace("```", "'''")
