import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from llmopt.report.gates import judge, parse_gate
from llmopt.report.markdown import as_markdown
from llmopt.report.render import as_json, print_layers, print_report
from llmopt.report.results import METRICS, Candidate, Delta, LayerResult, Measurement, Report, Subject

HOSTILE = "w8 | [bold]<b>`x`\n| # [a](http://b)"


def measured(metric, value, low=None, high=None):
    return Measurement(value=value, low=low, high=high, n=9, unit=METRICS[metric][0])


@pytest.fixture
def report():
    baseline = Subject(
        name="demo fp32",
        engine="onnxruntime 1",
        metrics={"size_bytes": measured("size_bytes", 538e6), "perplexity": measured("perplexity", 28.7, 27.9, 29.5)},
    )
    candidate = Candidate(
        name="w8a16",
        engine="onnxruntime 1",
        metrics={
            "size_bytes": measured("size_bytes", 143e6),
            "perplexity": measured("perplexity", 28.71, 27.92, 29.52),
            "top1_agreement": measured("top1_agreement", 0.9812, 0.98, 0.982),
        },
        deltas={
            "size_bytes": Delta(relative=-0.734),
            "perplexity": Delta(relative=3e-4, low=1e-4, high=5e-4, noise_low=-2e-4, noise_high=1e-4),
        },
        layers=tuple(
            LayerResult(name=f"h.{index}.up", scheme="w8a16-g64-sym", method="rtn", relative_error=0.01)
            for index in range(3)
        ),
    )
    whole = Report(
        host={"cpu": None}, versions={}, seed=0, baseline=baseline, candidates=(candidate,), notes=("a — b",)
    )
    gates = [*judge(parse_gate("perplexity <= +1%"), whole), *judge(parse_gate("tpot_ms <= 0.5x"), whole)]
    return replace(whole, gates=tuple(gates))


def printed(report, *, width=120, encoding="utf-8", show=print_report):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    show(report, Console(file=stream, width=width))
    stream.flush()
    return raw.getvalue().decode(encoding)


def lines_with(text, word):
    return [" ".join(line.split()) for line in text.splitlines() if word in line]


def test_the_terminal_shows_values_intervals_changes_noise_and_what_could_be_seen(report):
    assert lines_with(printed(report), "w8a16")[:3] == [
        "w8a16 143.0 MB -73.4 %",
        "w8a16 28.71 [27.92, 29.52] +0.030 % [+0.010, +0.050] ±0.02 % 0.02 %",
        "w8a16 98.12 % [98.00, 98.20]",
    ]


def test_what_one_model_lacks_is_a_dash_and_what_all_lack_is_named_below(report):
    text = printed(report)
    assert "demo fp32 —" in lines_with(text, "demo fp32")
    assert "not measured: kl_divergence, ttft_ms, tpot_ms," in text
    assert "time to first token" not in text


def test_below_the_table_stands_how_many_tokens_and_documents_accuracy_comes_from(report):
    text = {"text": "wiki_test.txt", "tokens": 8176, "clusters": 1, "clustered_by": "document"}
    measured_on = replace(report, settings={"fidelity": text})
    assert "\naccuracy on wiki_test.txt: 8,176 tokens of 1 document\n" in printed(measured_on)
    assert "\nAccuracy on wiki\\_test.txt: 8,176 tokens of 1 document.\n" in as_markdown(measured_on)
    assert "accuracy on" not in printed(report)


def test_names_of_layers_are_whole_on_eighty_columns_and_reasons_stand_below():
    layers = [
        LayerResult(name="model.embed_tokens", scheme="w8a16-g64-sym", method="rtn", reason="tables keep 8 bits"),
        *(
            LayerResult(
                name=f"model.layers.{index}.self_attn.q_proj",
                scheme="w4a16-g128-asym",
                method="search",
                relative_error=0.07 + index / 1000,
            )
            for index in range(30)
        ),
    ]
    wide = printed(layers, width=120, show=print_layers).splitlines()
    narrow = printed(layers, width=80, show=print_layers).splitlines()
    assert " ".join(wide[2].split()) == "model.embed_tokens w8a16-g64-sym rtn — tables keep 8 bits"
    assert " ".join(narrow[3].split()) == "layers.{0..29}.self_attn.q_proj w4a16-g128-asym search 0.0700 – 0.0990"
    assert narrow[4:] == ["embed_tokens: tables keep 8 bits"]


def test_verdicts_and_what_was_compared_stand_beside_each_gate(report):
    text = printed(report)
    assert lines_with(text, "pass") == ["pass perplexity <= +1% w8a16 +0.030 % [+0.010, +0.050]"]
    assert lines_with(text, "inconclusive") == ["inconclusive tpot_ms <= 0.5x w8a16 —"]


def test_a_ratio_is_shown_as_one(report):
    faster = replace(report.candidates[0], deltas={"tpot_ms": Delta(relative=-0.6, low=-0.61, high=-0.59)})
    judged = replace(report, gates=judge(parse_gate("tpot_ms <= 0.5x"), replace(report, candidates=(faster,))))
    assert lines_with(printed(judged), "pass") == ["pass tpot_ms <= 0.5x w8a16 0.4000 x [0.3900, 0.4100]"]


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_number_is_ever_cut_and_no_line_is_too_long(report, width):
    text = printed(report, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    if width >= 80:
        assert all(number in text for number in ("[27.92, 29.52]", "[+0.010, +0.050]", "±0.02 %", "28.71"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_stream_can_show_it(report, encoding):
    text = printed(replace(report, notes=("模型 — ×",)), encoding=encoding)
    assert ("±" in text) == (encoding != "ascii")
    if encoding == "ascii":
        assert "+/-0.02 %" in text
        assert r"note: \u6a21\u578b - x" in text


def test_names_from_outside_are_shown_and_not_read_as_markup(report):
    hostile = replace(report, candidates=(replace(report.candidates[0], name=HOSTILE),), gates=())
    assert "[bold]<b>`x`" in printed(hostile, width=200)


def test_there_is_no_colour_off_a_terminal(report):
    assert "\x1b" not in printed(report)


def test_layers_are_printed_with_equal_blocks_on_one_line(report):
    text = printed(report.candidates[0].layers, show=print_layers)
    assert lines_with(text, "h.") == ["h.{0..2}.up w8a16-g64-sym rtn 0.0100"]


def test_json_is_the_contract_and_ends_in_a_newline(report):
    text = as_json(report)
    assert json.loads(text) == report.to_json()
    assert text.endswith("}\n")
    assert text == as_json(report)
    loaded = json.loads(text)
    assert loaded["schema"] == "llmopt.report/1"
    assert set(loaded["candidates"][0]["metrics"]) == set(METRICS)
    assert loaded["candidates"][0]["metrics"]["tpot_ms"] is None
    assert loaded["candidates"][0]["deltas"]["perplexity"]["detectable"] == pytest.approx(2e-4)


def test_a_nan_never_reaches_the_json(report):
    broken = replace(report.baseline, metrics={"perplexity": measured("perplexity", float("nan"))})
    with pytest.raises(ValueError, match="JSON compliant"):
        as_json(replace(report, baseline=broken))


def test_markdown_holds_the_same_rows(report):
    text = as_markdown(report)
    assert "|  | w8a16 | 28.71 | [27.92, 29.52] | +0.030 % | [+0.010, +0.050] | ±0.02 % | 0.02 % |" in text
    assert "| pass | `perplexity <= +1%` | w8a16 | +0.030 % | [+0.010, +0.050] |" in text
    assert "| `h.{0..2}.up` | w8a16-g64-sym | rtn | 0.0100 |  |" in text
    assert "- a — b" in text
    assert "Not measured: `kl_divergence`" in text


def test_markdown_tables_stay_whole_whatever_the_names_hold(report):
    hostile = replace(report, candidates=(replace(report.candidates[0], name=HOSTILE),), gates=(), notes=())
    rows = [line for line in as_markdown(hostile).splitlines() if line.startswith("|") and "28.71" in line]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 9
    assert "<b>" not in rows[0]
    assert "](" not in rows[0].replace("\\]", "")


def test_a_report_without_a_baseline_still_renders(report):
    alone = replace(report, baseline=None, gates=(), notes=())
    assert "28.71" in printed(alone)
    assert "28.71" in as_markdown(alone)


def test_names_of_layers_stay_whole_where_sentences_can_be_folded():
    reason = "tables keep 8 bits and float activations unless an override names them"
    layer = LayerResult(name="model.layers.0.self_attn.q_proj", scheme="w4a16-g32-asym", method="gptq", reason=reason)
    text = printed([layer, replace(layer, name="model.layers.12.self_attn.q_proj")], width=110, show=print_layers)
    assert "model.layers.{0,12}.self_attn.q_proj " in text
    assert max(map(len, text.splitlines())) <= 110
