"""Planted trouble, in a model or in the text: the whole of `quantize` ends in the right result or a clear error."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from llmopt.engine.ort import OrtEngine
from llmopt.errors import LlmoptError, ModelError, UsageError
from llmopt.pipeline.calibration_text import different_tokens
from llmopt.pipeline.moments import Moment
from llmopt.pipeline.quantize import quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.quantize.scheme import parse_scheme

Weights = dict[str, Tensor]
FITTED = ("search", "gptq", "awq+gptq", "smoothquant+gptq")
METHODS = ("rtn", *FITTED)
BLOCK = "model.layers.0"


def text_of(length: int, seed: int = 0) -> str:
    """Letters, each of which says something about the next, as the tokenizer of `tiny_llama` reads them."""
    steps = np.random.default_rng(seed).integers(1, 9, length).cumsum() % 90
    return "".join(chr(33 + step) for step in steps)


HEALTHY = text_of(4096)
JUDGED = np.array([[ord(letter) - ord(" ") + 4 for letter in text_of(200, seed=1)]])


@dataclass
class Workshop:
    """Makes troubled copies of a model, and quantizes them."""

    model: Path
    folder: Path

    def planted(self, plant: Callable[[Weights], None]) -> Path:
        copy = self.folder / "model"
        shutil.copytree(self.model, copy)
        weights = {name: weight.clone() for name, weight in load_file(copy / "model.safetensors").items()}
        plant(weights)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    def quantized(self, model: Path, method: str, scheme: str = "w4a16", text: str = HEALTHY) -> Path:
        file = self.folder / "text.txt"
        file.write_text(text)
        calib = None if method == "rtn" else str(file)
        output = self.folder / "out"
        request = QuantizeRequest(
            model=str(model), output=output, scheme=parse_scheme(scheme), method=method, calib=calib, force=True
        )
        return quantize(request).path

    def loss(self, model: Path, method: str, scheme: str = "w4a16", text: str = HEALTHY) -> float:
        """How far the artifact's logits are from those of the model in transformers: ‖Δ‖ / ‖logits‖."""
        artifact = OrtEngine(self.quantized(model, method, scheme, text), 1)
        with torch.inference_mode():
            expected = LlamaForCausalLM.from_pretrained(model)(torch.from_numpy(JUDGED)).logits
        found = torch.from_numpy(np.asarray(artifact.logits(JUDGED)))
        return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


@pytest.fixture
def workshop(tiny_llama: Path, tmp_path: Path) -> Iterator[Workshop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Workshop(tiny_llama, tmp_path)
    torch.set_num_threads(threads)


def dead_behind_the_norm(weights: Weights) -> None:
    weights[f"{BLOCK}.input_layernorm.weight"][5] = 0
    for name in "qkv":
        weights[f"{BLOCK}.self_attn.{name}_proj.weight"][:, 5] = 100


def dead_value(weights: Weights) -> None:
    weights[f"{BLOCK}.self_attn.v_proj.weight"][3] = 0
    weights[f"{BLOCK}.self_attn.o_proj.weight"][:, 3] = 100


def dead_in_the_mlp(weights: Weights) -> None:
    weights[f"{BLOCK}.mlp.up_proj.weight"][7] = 0
    weights[f"{BLOCK}.mlp.down_proj.weight"][:, 7] = 100


def rows_of_zeros(weights: Weights) -> None:
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weight[:4] = 0


def matrices_of_zeros(weights: Weights) -> None:
    weights[f"{BLOCK}.mlp.down_proj.weight"].zero_()
    weights["model.layers.1.self_attn.v_proj.weight"].zero_()


def no_inputs_at_all(weights: Weights) -> None:
    weights[f"{BLOCK}.input_layernorm.weight"].zero_()


def huge_channel(weights: Weights) -> None:
    """One input is a hundred times as large, and its weights as small."""
    weights[f"{BLOCK}.input_layernorm.weight"][5] *= 100
    for name in "qkv":
        weights[f"{BLOCK}.self_attn.{name}_proj.weight"][:, 5] /= 100


def overflowing(weights: Weights) -> None:
    """Weights are finite; gate times up is not."""
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e20
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e20


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("plant", [dead_behind_the_norm, dead_value, dead_in_the_mlp])
def test_weights_of_an_input_that_is_always_zero_take_no_part_of_the_grid(
    workshop: Workshop, plant: Callable[[Weights], None], method: str
) -> None:
    healthy = workshop.loss(workshop.model, method)
    assert workshop.loss(workshop.planted(plant), method) < 1.1 * healthy


@pytest.mark.parametrize("method", FITTED)
def test_nor_of_the_rows_of_int8_products(workshop: Workshop, method: str) -> None:
    healthy = workshop.loss(workshop.model, method, "w8a8")
    assert workshop.loss(workshop.planted(dead_behind_the_norm), method, "w8a8") < 1.1 * healthy


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plant", [rows_of_zeros, matrices_of_zeros, no_inputs_at_all])
def test_zeros_cost_nothing(workshop: Workshop, plant: Callable[[Weights], None], method: str) -> None:
    healthy = workshop.loss(workshop.model, method)
    assert workshop.loss(workshop.planted(plant), method) < 1.1 * healthy


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
@pytest.mark.parametrize("method", ["awq+gptq", "smoothquant+gptq"])
def test_folds_take_the_harm_out_of_a_huge_channel(workshop: Workshop, method: str, scheme: str) -> None:
    healthy, model = workshop.loss(workshop.model, method, scheme), workshop.planted(huge_channel)
    assert workshop.loss(model, method, scheme) < 1.1 * healthy < workshop.loss(model, "rtn", scheme)


@pytest.mark.parametrize("method", FITTED)
def test_one_token_over_and_over_is_refused(workshop: Workshop, method: str) -> None:
    with pytest.raises(UsageError, match=r"repeats itself: of its 4000 tokens 8 differ") as caught:
        workshop.quantized(workshop.model, method, text="a" * 4000)
    assert "128 inputs" in caught.value.what
    assert "--calib" in str(caught.value.hint)
    assert not (workshop.folder / "out").exists()


@pytest.mark.parametrize("method", FITTED)
def test_a_text_that_comes_twice_is_as_good_as_once(workshop: Workshop, method: str) -> None:
    once = workshop.loss(workshop.model, method, text=HEALTHY[:2048])
    assert workshop.loss(workshop.model, method, text=HEALTHY[:2048] * 2) == pytest.approx(once, rel=0.03)


@pytest.mark.parametrize("method", FITTED)
def test_the_fewest_tokens_that_are_let_in_do_no_harm(workshop: Workshop, method: str) -> None:
    assert workshop.loss(workshop.model, method, text=HEALTHY[:128]) < 1.05 * workshop.loss(workshop.model, "rtn")
    with pytest.raises(UsageError, match=r"127 tokens to calibrate on, and .*down_proj has 128 inputs"):
        workshop.quantized(workshop.model, method, text=HEALTHY[:127])


@pytest.mark.parametrize("method", FITTED)
def test_activations_that_overflow_in_calibration_name_the_linear(workshop: Workshop, method: str) -> None:
    with pytest.raises(LlmoptError, match="inputs of a linear are NaN or infinite") as caught:
        workshop.quantized(workshop.planted(overflowing), method)
    assert caught.value.where == "model.layers.1.mlp.down_proj"
    assert "transformers" in str(caught.value.hint)
    assert not (workshop.folder / "out").exists()


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_model_that_overflows_is_no_defect_of_the_export(workshop: Workshop, scheme: str) -> None:
    with pytest.raises(ModelError, match="activations are NaN or infinite") as caught:
        workshop.quantized(workshop.planted(overflowing), "rtn", scheme)
    assert caught.value.where == "behind block 1"
    assert not (workshop.folder / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_nan_is_named(workshop: Workshop, method: str) -> None:
    def plant(weights: Weights) -> None:
        weights["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan

    with pytest.raises(ModelError, match=r"down_proj.weight holds NaN or infinity: 1 of 8192 values, .* \[3, 4\]"):
        workshop.quantized(workshop.planted(plant), method)


def test_a_linear_that_no_token_reached_is_named() -> None:
    with pytest.raises(LlmoptError, match="no token of the calibration text reached") as caught:
        Moment(8).statistics("experts.3.up_proj")
    assert caught.value.where == "experts.3.up_proj"


def test_tokens_are_told_apart_by_what_is_before_them() -> None:
    assert different_tokens([np.arange(1, 100)]) == 99
    assert different_tokens([np.arange(1, 100), np.arange(1, 100)]) == 99
    assert different_tokens([np.tile(np.arange(1, 11), 20)]) == 17
