"""What calibration sees enter each linear is what enters it, with the layers before it quantized."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.calibrate.text import Corpus
from llmopt.engine.blocks import RotaryTables, block_forward, embed, normalize
from llmopt.errors import LlmoptError, UsageError
from llmopt.model.spec import Linear, ModelSpec
from llmopt.pipeline.calibration import Calibration
from llmopt.pipeline.calibration_text import CalibrationText
from llmopt.pipeline.moments import Moment
from llmopt.pipeline.parts import PartReader
from llmopt.quantize.execute import quantized_apply
from llmopt.quantize.gptq import Gptq
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight
from tests.decoders import Saved, assignments
from tests.families import CASES, random_weights, spec_of

FAMILIES = ["llama", "gpt2", "gemma3", "qwen3", "opt"]
WINDOWS = [np.random.default_rng(seed).integers(0, 97, length) for seed, length in enumerate((40, 40, 33, 40))]


class Recording(Gptq):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    def quantize(self, weight_OI: Tensor, scheme: Scheme, inputs: InputStatistics | None = None) -> QuantizedWeight:
        self.seen.append((weight_OI, inputs))  # type: ignore[attr-defined]
        return super().quantize(weight_OI, scheme, inputs)


def case_named(name: str) -> str:
    return next(case for case in CASES if case.startswith(name))


def recorded_inputs(spec: ModelSpec, scheme: str) -> tuple[dict[str, Tensor], dict[str, InputStatistics]]:
    """Second moments found the long way, through the model that came out; and those that the method was given."""
    saved: Saved = random_weights(spec)
    method = Recording()
    reader = PartReader(
        spec,
        saved,
        assignments(spec, lambda name: scheme),
        method,
        Calibration(spec, WINDOWS),  # type: ignore[arg-type]
    )
    embedding = reader.embedding()
    blocks = list(reader.blocks())
    head = reader.head(embedding)
    found: dict[str, Tensor] = {}
    tables = RotaryTables(spec, 40)
    dense = {
        name: weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        for name, weight in embedding.weights.items()
    }
    hidden = [embed(spec.embedding, dense, torch.from_numpy(ids)[None]) for ids in WINDOWS]

    limits: dict[str, float] = {}

    def see(linear: Linear, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        squares = [float(row @ row) for row in rows]
        limit = limits.setdefault(linear.name, sorted(squares)[(len(squares) - 1) // 2])
        flat = torch.stack([row * min(1, limit / square) ** 0.5 for row, square in zip(rows, squares, strict=True)])
        found[linear.name] = found.get(linear.name, torch.zeros(())) + flat.T @ flat

    for block, part in zip(spec.blocks, blocks, strict=True):

        def apply(linear: Linear, x: Tensor, part=part) -> Tensor:  # type: ignore[no-untyped-def]
            see(linear, x)
            return quantized_apply(part.weights, linear, x)

        norms = {name: weight for name, weight in part.weights.items() if isinstance(weight, Tensor)}
        hidden = [
            block_forward(block, norms, state, tables.turn(block, 0, state.shape[1]), apply=apply) for state in hidden
        ]
    norms = {name: weight for name, weight in head.weights.items() if isinstance(weight, Tensor)}
    for state in hidden:
        see(spec.head, normalize(spec.final_norm, norms, state))
    groups: list[Sequence[Linear]] = []
    for block in spec.blocks:
        groups += [block.attention.inputs, [block.attention.output], block.mlp.inputs, [block.mlp.down]]
    groups += [] if spec.tied else [[spec.head]]
    # A tied table of 4 bits is fitted before all others.
    seen = [inputs for _, inputs in method.seen][-len(groups) :]  # type: ignore[attr-defined]
    given = {linear.name: inputs for group, inputs in zip(groups, seen, strict=True) for linear in group}
    return {name: moment / sum(map(len, WINDOWS)) for name, moment in found.items()}, given


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_is_fitted_to_the_inputs_that_it_will_have(family: str, scheme: str) -> None:
    expected, given = recorded_inputs(spec_of(CASES[case_named(family)]), scheme)
    for name, inputs in given.items():
        assert inputs.tokens == 153
        error = torch.linalg.norm(inputs.second_moment_II - expected[name]) / torch.linalg.norm(expected[name])
        # With rounded activations a value halfway may fall either way in sums of another order.
        assert error < (1e-4 if scheme == "w4a16" else 0.02), name


def test_a_massive_token_counts_no_more_than_a_typical_one() -> None:
    tokens_NI = torch.randn((64, 8), generator=torch.Generator().manual_seed(0))
    plain, massive = Moment(8), Moment(8)
    plain.add(tokens_NI)
    tokens_NI[0] *= 1000
    massive.add(tokens_NI)
    expected, found = (moment.statistics("o_proj").second_moment_II for moment in (plain, massive))
    assert torch.linalg.norm(found - expected) < 0.1 * torch.linalg.norm(expected)


def test_tokens_without_inputs_are_no_trouble() -> None:
    moment = Moment(8)
    moment.add(torch.zeros((3, 8)))
    moment.add(torch.ones((1, 8)))
    assert torch.allclose(moment.statistics("o_proj").second_moment_II, torch.full((8, 8), 0.25))


def test_layers_that_calibration_cannot_reach_say_how_they_were_rounded() -> None:
    spec = spec_of(CASES[case_named("llama")])
    reader = PartReader(
        spec, random_weights(spec), assignments(spec, lambda name: "w4a16"), Gptq(), Calibration(spec, WINDOWS)
    )
    embedding = reader.embedding()
    assert not spec.tied
    assert embedding.layers[0].method == "rtn"
    assert {layer.method for part in reader.blocks() for layer in part.layers} == {"gptq"}


def test_a_table_that_serves_as_the_head_is_fitted_to_what_enters_the_head() -> None:
    spec = spec_of(CASES["llama, tied, wide heads"])
    assert spec.tied
    saved, method = random_weights(spec), Recording()
    reader = PartReader(
        spec,
        saved,  # type: ignore[arg-type]
        assignments(spec, lambda name: "w4a16"),
        method,
        Calibration(spec, WINDOWS),
    )
    embedding = reader.embedding()
    (_, inputs) = method.seen[0]  # type: ignore[attr-defined]
    floats = {tensor.name: saved.read(tensor) for tensor in spec.tensors()}
    moment = Moment(spec.head.in_features)
    tables = RotaryTables(spec, 40)
    for ids in WINDOWS:
        state = embed(spec.embedding, floats, torch.from_numpy(ids)[None])
        for block in spec.blocks:
            state = block_forward(block, floats, state, tables.turn(block, 0, state.shape[1]))
        moment.add(normalize(spec.final_norm, floats, state))
    expected = moment.statistics("lm_head").second_moment_II
    assert torch.allclose(inputs.second_moment_II, expected, rtol=1e-4, atol=1e-5)
    assert embedding.layers[0].method == "gptq"
    assert reader.head(embedding).layers[0].method == "gptq"


def test_fewer_tokens_than_inputs_are_refused_before_anything_is_read() -> None:
    spec = spec_of(CASES[case_named("llama")])
    with pytest.raises(UsageError, match="9 tokens to calibrate on") as caught:
        Calibration(spec, [np.arange(9)])
    assert "--calib-tokens" in str(caught.value.hint)


def test_inputs_that_are_not_finite_name_the_linear() -> None:
    spec = spec_of(CASES[case_named("llama")])
    weights = random_weights(spec)
    reader = PartReader(spec, weights, assignments(spec, lambda name: "w4a16"), Gptq(), Calibration(spec, WINDOWS))
    reader.embedding()
    assert reader.calibration is not None
    reader.calibration.hidden[1] = reader.calibration.hidden[1] * torch.inf
    with pytest.raises(LlmoptError, match="NaN or infinite") as caught:
        next(reader.blocks())
    assert "layers.0" in str(caught.value.where)


def test_the_text_is_cut_into_windows_that_the_model_can_read() -> None:
    class Letters:
        bos_id = None

        def encode(self, text: str) -> Sequence[int]:
            return [ord(letter) for letter in text]

    text = CalibrationText(corpus=Corpus("letters", ("ab" * 500,)), tokens=150)
    spec = spec_of(CASES[case_named("llama")])
    windows = text.windows(spec, Letters())  # type: ignore[arg-type]
    assert sum(map(len, windows)) == 150
    assert max(map(len, windows)) <= spec.context_length
    assert max(int(ids.max()) for ids in windows) < spec.vocab_size
    assert text.entry()["tokens"] == 150
    assert text.entry()["sha256"] != CalibrationText(corpus=Corpus("letters", ("a", "b")), tokens=150).entry()["sha256"]
