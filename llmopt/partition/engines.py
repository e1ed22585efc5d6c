"""A plan in the words of other engines. What one of them cannot do is refused, not rounded."""

from typing import Any

from llmopt.errors import UnsupportedError, UsageError
from llmopt.model.spec import ModelSpec
from llmopt.partition.plan import Plan

ENGINES = ("vllm", "sglang", "accelerate")


def export(plan: Plan, spec: ModelSpec, engine: str, *, stored: bool = False) -> dict[str, Any]:
    """Flags and environment (vllm, sglang), or a device map (accelerate).

    `stored` says that the model's weights are stored in the plan's schemes.

    Raises:
        UnsupportedError: the engine has no way to do what the plan says.
    """
    if plan.schemes and not stored:
        what = f"{engine} does not round weights to the plan's schemes as it reads them"
        raise UnsupportedError(what, hint="llmopt quantize MODEL -o OUT --format hf, and a plan for OUT")
    if engine == "accelerate":
        return {"device_map": device_map(plan, spec)}
    return _server(plan, engine)


def _server(plan: Plan, engine: str) -> dict[str, Any]:
    degrees = {stage.tp for stage in plan.stages}
    if len(degrees) > 1:
        what = f"{engine} has one tensor-parallel degree for all stages, and the plan has {sorted(degrees)}"
        raise UnsupportedError(what, hint="make the plan with --tp")
    counts = [stage.layers[1] - stage.layers[0] for stage in plan.stages]
    if min(counts) == 0:
        raise UnsupportedError(f"{engine} has no stage without blocks", hint="give one of your own with --split")
    layers = ",".join(map(str, counts))
    degree = str(degrees.pop())
    if engine == "vllm":
        flags = ["--tensor-parallel-size", degree, "--pipeline-parallel-size", str(len(counts))]
        flags += ["--data-parallel-size", str(plan.replicas)] if plan.replicas > 1 else []
        command, variable = ["vllm", "serve", plan.model], "VLLM_PP_LAYER_PARTITION"
    elif engine == "sglang":
        flags = ["--tp-size", degree, "--pp-size", str(len(counts))]
        flags += ["--dp-size", str(plan.replicas)] if plan.replicas > 1 else []
        command = ["python", "-m", "sglang.launch_server", "--model-path", plan.model]
        variable = "SGLANG_PP_LAYER_PARTITION"
    else:
        raise UsageError(f"there is no engine {engine!r}", where="--export", hint=f"known: {', '.join(ENGINES)}")
    flags += ["--dtype", plan.dtype] if plan.dtype is not None else []
    flags += ["--revision", plan.revision] if plan.revision is not None else []
    environment = {variable: layers} if len(counts) > 1 else {}
    return {"environment": environment, "command": [*command, *flags]}


def device_map(plan: Plan, spec: ModelSpec) -> dict[str, int]:
    """The number of the stage, as that of a GPU, for each module: what `from_pretrained(device_map=…)` takes."""
    if any(stage.tp > 1 for stage in plan.stages):
        raise UnsupportedError("accelerate has no tensor parallelism in a device map", hint="make the plan with --tp 1")
    last = len(plan.stages) - 1
    found = {spec.embedding.name: 0}
    if spec.embedding.positions is not None:
        found[spec.embedding.positions.name] = 0
    for number, stage in enumerate(plan.stages):
        for block in spec.blocks[stage.layers[0] : stage.layers[1]]:
            found[_block_name(block.attention_norm.name)] = number
    found[spec.final_norm.name] = last
    # A tied head is the embedding's table: it stays where that is.
    found[spec.head.name] = 0 if spec.tied else last
    rotary = spec.blocks[0].attention.rotary
    return {**found, f"{spec.base_prefix}rotary_emb": 0} if rotary is not None else found


def _block_name(norm: str) -> str:
    """Such as `model.layers.3`."""
    parts = norm.split(".")
    number = next(place for place, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: number + 1])
