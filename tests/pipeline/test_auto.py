"""Each layer gets what errs least on windows that were not fitted to, and the report says what that was."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.artifact import Journal
from llmopt.engine.blocks import normalize
from llmopt.errors import UsageError
from llmopt.model.spec import ModelSpec
from llmopt.pipeline import parts as parts_module
from llmopt.pipeline.calibration import Calibration
from llmopt.pipeline.calibration_text import require_tokens
from llmopt.pipeline.journal import Part, PartJournal, part_to_bytes
from llmopt.pipeline.moments import Bounded
from llmopt.pipeline.pace import NO_TIME_TO_FIT, NO_TIME_TO_LEARN, Pace
from llmopt.pipeline.parts import CHOSEN, PartReader
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.pipeline.reconstruct import Learning, Reconstruction
from llmopt.progress import Silent
from llmopt.quantize.auto import Auto
from llmopt.quantize.awq import Awq
from llmopt.quantize.gptq import Gptq
from llmopt.quantize.learn import Rates
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme, parse_scheme
from llmopt.quantize.search import Search
from llmopt.quantize.weights import QuantizedWeight
from llmopt.report.results import LayerResult
from tests.decoders import assignments
from tests.families import CASES, random_weights, spec_of
from tests.pipeline.test_calibration import case_named
from tests.pipeline.test_pace import Clock
from tests.ranks import together

WINDOWS = [np.random.default_rng(seed).integers(0, 97, 32) for seed in range(12)]
HELD_OUT = (0, 8)
LEARNING = Learning(steps=8, windows=4, rates=Rates(offset=0.004, scale=0.002))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many steps as a test has time for."""
    monkeypatch.setattr(parts_module, "Reconstruction", lambda one, rule: Reconstruction(one, rule, LEARNING))


class Recording(Auto):
    """Remembers what every group of linears was quantized from."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    @property
    def candidates(self):
        seen = self.seen

        class Noted(Rtn):
            def quantize(self, weight_OI: Tensor, scheme: Scheme, inputs: InputStatistics | None = None):
                seen.append((weight_OI, inputs))
                return super().quantize(weight_OI, scheme, inputs)

        return Noted(), Search(), Gptq()


def reader_of(spec: ModelSpec, ranks: Ranks = ALONE, method: Auto | None = None, scheme="w4a16", **more) -> PartReader:
    calibration = Calibration(spec, WINDOWS, ranks, holds_out=True)
    found = assignments(spec, lambda name: scheme)
    return PartReader(spec, random_weights(spec), found, method or Auto(), calibration, **more)


def all_parts(reader: PartReader) -> list[Part]:
    embedding = reader.embedding()
    return [embedding, *reader.blocks(), reader.head(embedding)]


def layers_of(parts: list[Part]) -> list[LayerResult]:
    return [layer for part in parts for layer in part.layers]


def squared_outputs(weight_OI: Tensor, moment_II: Tensor) -> float:
    return float(torch.einsum("oi,ij,oj->", weight_OI.double(), moment_II.double(), weight_OI.double()))


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_each_layer_has_the_method_that_errs_least_on_held_out_text(scheme: str) -> None:
    """Against each candidate by itself on every linear."""
    spec, method = spec_of(CASES[case_named("llama")]), Recording()
    reader = reader_of(spec, method=method, scheme=scheme)
    layers = {layer.name: layer for layer in layers_of(all_parts(reader))}
    expected: dict[str, dict[str, float]] = {}
    groups = [
        group
        for block in spec.blocks
        for group in (block.attention.inputs, [block.attention.output], block.mlp.inputs, [block.mlp.down])
    ]
    for group, (weight_OI, inputs) in zip([*groups, [spec.head]], method.seen, strict=True):  # type: ignore[attr-defined]
        rows = torch.split(weight_OI, [linear.out_features for linear in group])
        for linear, one_OI in zip(group, rows, strict=True):
            size = squared_outputs(one_OI, inputs.held_out_II)
            expected[linear.name] = {
                candidate.name: (
                    squared_outputs(
                        one_OI - candidate.quantize(one_OI, parse_scheme(scheme), inputs).dequantize(),
                        inputs.held_out_II,
                    )
                    / size
                )
                ** 0.5
                for candidate in (Rtn(), Search(), Gptq())
            }
    for name, errors in expected.items():
        assert layers[name].held_out_errors == pytest.approx(errors, rel=1e-3), name
        found = layers[name].held_out_errors
        assert found is not None
        assert layers[name].method in {best := min(found, key=found.__getitem__), f"{best}+reconstruct"}
        assert CHOSEN in (layers[name].reason or "")
    assert layers[spec.embedding.name].held_out_errors is None


def test_what_is_judged_on_is_not_fitted_to() -> None:
    spec = spec_of(CASES[case_named("llama")])
    weights, block = random_weights(spec), spec.blocks[0]
    calibration = Calibration(spec, WINDOWS, holds_out=True)
    calibration.embedding({tensor.name: weights.read(tensor) for tensor in spec.embedding.tensors()})
    floats = {tensor.name: weights.read(tensor) for tensor in block.tensors()}
    entering = [normalize(block.attention_norm, floats, state)[0] for state in calibration.hidden]
    seen: list[InputStatistics] = []
    calibration.block(block, dict(floats), lambda linears, inputs: seen.append(inputs))
    bounded = Bounded(ALONE)
    kept = [bounded(x_TI) for x_TI in entering]  # the first window of all says how much a token may be
    fitted_TI = torch.cat([x_TI for index, x_TI in enumerate(kept) if index not in HELD_OUT])
    held_out_TI = torch.cat([kept[index] for index in HELD_OUT])
    assert seen[0].tokens == len(fitted_TI) == 10 * 32
    assert seen[0].held_out_II is not None
    torch.testing.assert_close(seen[0].second_moment_II, fitted_TI.T @ fitted_TI / 320, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0].held_out_II, held_out_TI.T @ held_out_TI / 64, rtol=1e-4, atol=1e-5)


def test_text_that_is_held_out_does_not_count_as_fitted_to() -> None:
    spec = spec_of(CASES[case_named("llama")])
    widest = max(linear.in_features for linear in spec.linears())
    windows = [np.random.default_rng(seed).integers(0, 97, widest // 4) for seed in range(4)]
    assert require_tokens(spec, windows) == 4 * (widest // 4)
    with pytest.raises(UsageError, match="to calibrate on, beside those held out, and"):
        require_tokens(spec, windows, holds_out=True)
    with pytest.raises(UsageError, match="0 tokens to calibrate on, beside those held out"):
        require_tokens(spec, windows[:1], holds_out=True)


def test_a_table_that_serves_as_the_head_is_chosen_for_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(CASES["llama, tied, wide heads"])
    whole, *_ = layers_of([reader_of(spec).embedding()])
    monkeypatch.setattr(parts_module, "CHUNK_WEIGHTS", 40 * spec.hidden_size)
    reader = reader_of(spec)
    embedding = reader.embedding()
    (in_pieces,) = embedding.layers
    assert whole.held_out_errors is not None
    assert in_pieces.held_out_errors == pytest.approx(whole.held_out_errors, rel=1e-3)
    assert in_pieces.method == min(whole.held_out_errors, key=whole.held_out_errors.__getitem__)
    (head,) = reader.head(embedding).layers
    assert (head.method, head.held_out_errors) == (in_pieces.method, in_pieces.held_out_errors)


def test_folds_stand_before_it() -> None:
    spec = spec_of(CASES[case_named("llama")])
    layers = layers_of(all_parts(reader_of(spec, folds=(Awq(),))))
    assert any((layer.method or "").startswith("awq+") and layer.held_out_errors for layer in layers)


@pytest.mark.parametrize("case", ["llama", "llama, tied, wide heads"])
def test_several_processes_choose_what_one_does(case: str) -> None:
    spec = spec_of(CASES[case_named(case)])
    alone = layers_of(all_parts(reader_of(spec)))
    first, *others = together(3, lambda ranks: all_parts(reader_of(spec, ranks)))
    for layer, expected in zip(layers_of(first), alone, strict=True):
        assert (layer.name, layer.reason) == (expected.name, expected.reason)
        assert layer.held_out_errors == (expected.held_out_errors and pytest.approx(expected.held_out_errors, rel=0.1))
    for found in others:
        assert layers_of(found) == layers_of(first)
        assert list(map(part_to_bytes, found)) == list(map(part_to_bytes, first))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    spec = spec_of(CASES[case_named("llama")])

    def journal() -> PartJournal:
        return PartJournal(Journal(tmp_path), assignments(spec, lambda name: "w4a16"), WINDOWS, Silent())

    expected = all_parts(reader_of(spec))
    stopped = reader_of(spec, journal=journal())
    stopped.embedding()
    next(stopped.blocks())
    found = all_parts(reader_of(spec, journal=journal()))
    assert list(map(part_to_bytes, found)) == list(map(part_to_bytes, expected))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of a machine on which GPTQ takes a second a call and learning a hundred, and all else nothing."""
    found = Clock()

    def slow(method: Callable[..., object], seconds: float) -> Callable[..., object]:
        def slowed(*arguments: object) -> object:
            found.now += seconds
            return method(*arguments)

        return slowed

    monkeypatch.setattr(Gptq, "quantize", slow(Gptq.quantize, 1))
    monkeypatch.setattr(Reconstruction, "refit", slow(Reconstruction.refit, 100))
    return found


# Three blocks of four groups, and a head: so many seconds for GPTQ.
BLOCKS = 12


@pytest.mark.parametrize(
    ("seconds", "fitted", "learnt"),
    [(500, 3, 3), (BLOCKS + 220, 3, 2), (BLOCKS + 30, 3, 0), (11, 2, 0), (1, 1, 0)],
)
def test_time_decides_which_blocks_get_what_and_their_layers_say_so(
    clock: Clock, seconds: float, fitted: int, learnt: int
) -> None:
    spec = spec_of(CASES[case_named("llama")])
    pace = Pace(seconds / 60, clock)
    _, *blocks, _ = all_parts(reader_of(spec, pace=pace))
    reasons = [{layer.reason for layer in block.layers} for block in blocks]
    assert all(len(one) == 1 for one in reasons)
    told = [str(reason) for (reason,) in reasons]
    assert sum(NO_TIME_TO_FIT not in reason for reason in told) == fitted
    assert sum(NO_TIME_TO_FIT not in reason and NO_TIME_TO_LEARN not in reason for reason in told) == learnt
    for block, reason in zip(blocks, told, strict=True):
        for layer in block.layers:
            assert ("gptq" in (layer.held_out_errors or {})) == (NO_TIME_TO_FIT not in reason)
            assert "reconstruct" not in str(layer.method) or NO_TIME_TO_LEARN not in reason
    assert pace.took_s == clock.now - pace.started


def test_the_clock_of_the_first_process_counts_for_all(clock: Clock) -> None:
    """That of another says that there is no time at all."""
    spec = spec_of(CASES[case_named("llama")])
    paces = [Pace(500 / 60, Clock()), Pace(1e-9, clock)]
    clock.now += 10
    first, second = together(2, lambda ranks: layers_of(all_parts(reader_of(spec, ranks, pace=paces[ranks.rank]))))
    assert first == second
    assert not any("no time" in (layer.reason or "") for layer in first)


def test_a_weight_that_no_method_can_err_on_gets_the_quickest() -> None:
    moment_II = torch.eye(64)
    inputs = InputStatistics(tokens=64, second_moment_II=moment_II, held_out_II=moment_II)
    found: QuantizedWeight = Auto().quantize(torch.zeros(4, 64), parse_scheme("w4a16"), inputs)
    assert torch.equal(found.dequantize(), torch.zeros(4, 64))
