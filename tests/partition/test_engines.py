"""A plan in the words of other engines: their own flags, and a refusal of what they cannot do."""

import pytest

from llmopt.errors import UnsupportedError
from llmopt.partition.engines import export
from llmopt.partition.plan import plan_from_json
from tests.families import CASES, spec_of
from tests.plans import plan_content

SPEC = spec_of(CASES["llama"])
TIED = spec_of(CASES["qwen3"])


def plan(*stages, **options):
    return plan_from_json(plan_content("some/model", stages, **options), where="here")


def test_vllm_has_a_flag_for_each_degree_and_a_variable_for_layers():
    found = export(plan((1, 2), (2, 2), replicas=3, dtype="bfloat16", revision="abc"), SPEC, "vllm")
    assert found["environment"] == {"VLLM_PP_LAYER_PARTITION": "1,2"}
    assert found["command"] == [
        *["vllm", "serve", "some/model", "--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"],
        *["--data-parallel-size", "3", "--dtype", "bfloat16", "--revision", "abc"],
    ]


def test_sglang_has_its_own():
    found = export(plan((2, 1), (1, 1), replicas=2), SPEC, "sglang")
    assert found["environment"] == {"SGLANG_PP_LAYER_PARTITION": "2,1"}
    assert found["command"] == [
        *["python", "-m", "sglang.launch_server", "--model-path", "some/model"],
        *["--tp-size", "1", "--pp-size", "2", "--dp-size", "2"],
    ]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_one_stage_needs_no_variable(engine):
    assert export(plan((3, 2)), SPEC, engine)["environment"] == {}


def test_accelerate_gets_every_module_and_a_tied_head_where_its_table_is():
    found = export(plan((1, 1), (2, 1)), SPEC, "accelerate")["device_map"]
    assert found == {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.layers.2": 1,
        "model.norm": 1,
        "lm_head": 1,
        "model.rotary_emb": 0,
    }
    assert export(plan((1, 1), (2, 1)), TIED, "accelerate")["device_map"]["lm_head"] == 0


def test_a_device_map_names_every_parameter_of_a_model_of_transformers():
    import transformers

    names = [name for name, _ in transformers.LlamaForCausalLM(CASES["llama"]).named_parameters()]
    found = export(plan((1, 1), (2, 1)), SPEC, "accelerate")["device_map"]
    assert [name for name in names if not any(name.startswith(f"{module}.") for module in found)] == []


@pytest.mark.parametrize("engine", ["vllm", "sglang", "accelerate"])
def test_schemes_are_for_a_model_that_is_stored_in_them(engine):
    quantized = plan((1, 1), (2, 1), schemes={"model.layers.0.mlp.up_proj": "w8a16"})
    with pytest.raises(UnsupportedError, match=f"{engine} does not round weights"):
        export(quantized, SPEC, engine)
    assert export(quantized, SPEC, engine, stored=True)


@pytest.mark.parametrize(
    ("stages", "engine", "told"),
    [
        (((1, 1), (2, 2)), "vllm", "one tensor-parallel degree for all stages"),
        (((0, 1), (3, 1)), "sglang", "no stage without blocks"),
        (((3, 2),), "accelerate", "no tensor parallelism in a device map"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(stages, engine, told):
    with pytest.raises(UnsupportedError, match=told):
        export(plan(*stages), SPEC, engine)
