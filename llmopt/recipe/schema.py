"""What a recipe may say, as types. The strings under the fields are the descriptions that editors show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from llmopt.errors import UsageError, near_match
from llmopt.quantize.scheme import parse_scheme

SCHEMA = "llmopt.recipe/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Words that a recipe uses and rooms above this one define: each raises UsageError for what is none."""

    check_method: Callable[[str], object]
    check_minutes: Callable[[float, str], object]
    parse_gate: Callable[[str], object]
    parse_budget: Callable[[str], object]


def _vocabulary(info: ValidationInfo) -> Vocabulary:
    assert isinstance(info.context, Vocabulary)
    return info.context


def _refused(error: UsageError) -> PydanticCustomError:
    return PydanticCustomError("refused", "{what}", {"what": error.what, "hint": error.hint})


def _known_scheme(text: str) -> str:
    try:
        parse_scheme(text)
    except UsageError as error:
        raise _refused(error) from error
    return text


def _known_method(name: str, info: ValidationInfo) -> str:
    try:
        _vocabulary(info).check_method(name)
    except UsageError as error:
        raise _refused(error) from error
    return name


def _usable_minutes(minutes: float | None, info: ValidationInfo) -> float | None:
    try:
        if minutes is not None and "method" in info.data:  # else that is the mistake
            _vocabulary(info).check_minutes(minutes, info.data["method"])
    except UsageError as error:
        raise _refused(error) from error
    return minutes


def _known_gate(expression: str, info: ValidationInfo) -> str:
    try:
        _vocabulary(info).parse_gate(expression)
    except UsageError as error:
        raise _refused(error) from error
    return expression


def _known_budget(text: str, info: ValidationInfo) -> str:
    try:
        _vocabulary(info).parse_budget(text)
    except UsageError as error:
        raise _refused(error) from error
    return text


def _gate_from_text(value: Any) -> Any:
    return {"assert": value} if isinstance(value, str) else value


T = TypeVar("T")
# A YAML list makes a tuple, which strict validation would refuse; its items stay strict.
Many = Annotated[tuple[T, ...], Field(strict=False)]
Count = Annotated[int, Field(ge=1)]
Scheme = Annotated[str, AfterValidator(_known_scheme)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Section(BaseModel):
    """A mapping with known keys; one that is not known is refused with the nearest that is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_unknown_key(cls, content: Any) -> Any:
        # pydantic would refuse it as well, but only here is it known which keys there are to mistype.
        if isinstance(content, Mapping):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in content:
                if key not in known:
                    raise PydanticCustomError(
                        "unknown_key", "unknown key '{key}'", {"key": key, "hint": near_match(key, known)}
                    )
        return content


class Training(Section):
    """How a method that ends in qat trains."""

    data: str | None = None
    """Text to learn from, named as for calib. null: that of calib, else llmopt's own stories."""
    steps: Count | None = None
    """How many steps. null: 400, or as many as fit into the minutes."""
    batch: Count = 2
    """Windows of 512 tokens in a step."""
    cross_entropy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the text's own cross entropy in the loss; the rest is the divergence from the float model."""
    lora_rank: Count | None = None
    """Weights move by products of thin matrices of that rank. null: each by itself."""
    by_block: bool = False
    """Train one block at a time, for models that do not fit into memory as a whole."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What products are computed in; weights and updates are fp32."""
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.002
    """How far weights go in a step at first, in codes."""


class QuantizeStep(Section):
    """Quantize the model; the artifact is a folder of the step's name under the recipe's output."""

    name: Name
    """Names the artifact's folder, and the candidate in gates and reports."""
    scheme: Scheme = "w8a16"
    """Such as w8a16, w4a16-g32-asym or w8a8."""
    budget: Annotated[str, AfterValidator(_known_budget)] | None = None
    """Choose each layer's scheme within 92MB, 4.5bits or '+2% perplexity'. null: every layer gets `scheme`."""
    method: Annotated[str, AfterValidator(_known_method)] = "rtn"
    """How the numbers are found: rtn, search, gptq, reconstruct or auto; awq, smoothquant or rotate may stand before,
    as in smoothquant+gptq. qat may stand behind: reconstruct+qat."""
    minutes: Annotated[float | None, AfterValidator(_usable_minutes)] = None
    """How long quantizing by auto, or with training, may take. null: all that it needs."""
    training: Training | None = None
    """How a method that ends in qat trains. null: as it does by default."""
    calib: str | None = None
    """Text for a budget and methods that look at inputs: a file, relative to the recipe, or a Hugging Face dataset such
    as Salesforce/wikitext:wikitext-2-raw-v1:train. null: llmopt's own stories."""
    calib_tokens: Count | None = None
    """How much of it is read, in tokens. null: 32768."""
    ignore: Many[str] = ()
    """Patterns of linears that keep their weights."""
    overrides: dict[str, Scheme] = {}
    """Another scheme for the linears whose names match a pattern."""
    format: Literal["onnx", "hf", "gptq"] = "onnx"
    """What the artifact is written as: onnx for onnxruntime, hf for transformers, gptq for GPTQModel and vLLM."""
    cast: Literal["fp16", "bf16"] | None = None
    """With format hf, the dtype of what is not quantized, but for what that cannot hold. null: the model's."""
    kernels: Literal["measured", "default"] | None = None
    """How onnxruntime's kernels are chosen: measured, by what is fastest on this machine; default, for other machines.
    null: measured where the format is onnx."""


class CastStep(Section):
    """Cast the model to 16 bits, but for what these cannot hold; the artifact is a folder of the step's name."""

    name: Name
    """Names the artifact's folder, and the candidate in gates and reports."""
    dtype: Literal["fp16", "bf16"]
    """What modules get that bear it."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """How much of what a module gives may be lost, relative to its size, before it stays float32."""
    keep_fp32: Many[str] = ()
    """Patterns of modules that stay float32."""
    calib: str | None = None
    """Text whose activations are looked at: a file, relative to the recipe, or a Hugging Face dataset. null: llmopt's
    own stories."""
    calib_tokens: Count | None = None
    """How much of it is read, in tokens. null: 4096."""
    format: Literal["onnx", "hf"] = "onnx"
    """What the artifact is written as: onnx for onnxruntime (fp16 alone), hf for transformers."""
    kernels: Literal["measured", "default"] | None = None
    """The pieces in which a prompt is read: measured, what is fastest on this machine; default, all at once.
    null: measured where the format is onnx."""


class PartitionStep(Section):
    """Plan which device has which blocks; plan.json and timeline.svg stand in a folder of the step's name."""

    name: Name
    """Names the folder, and the candidate in gates about what is predicted."""
    cluster: str
    """The cluster file, relative to the recipe."""
    objective: Literal["ttft", "tpot", "throughput", "devices", "price"] = "tpot"
    """What the plan is to be best at."""
    slo: Many[str] = ()
    """Promises that the plan keeps, such as ttft_ms<=300; without such a plan the recipe ends with exit code 3."""
    prompt: Count = 512
    """Tokens of a prompt."""
    output: Count = 128
    """Tokens behind it."""
    batch: Count = 1
    """Sequences at once."""
    dtype: str | None = None
    """What it computes in. null: the config's."""
    scheme: Scheme | None = None
    """Plan for the model quantized: such as w8a16. null: as it is."""
    joint: bool = False
    """Choose each block's scheme as well: the least estimated loss that fits."""
    tp: Count | None = None
    """Only this tensor-parallel degree. null: whatever is best."""
    micro_batches: Count | None = None
    """Only so many micro-batches. null: whatever is best."""
    replicas: Count | None = None
    """Only so many copies. null: whatever is best."""


class Step(Section):
    """One step of work. Its only key says which."""

    quantize: QuantizeStep | None = None
    """Quantize the model."""
    cast: CastStep | None = None
    """Cast the model to 16 bits."""
    partition: PartitionStep | None = None
    """Plan the model on the devices of a cluster file."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "Step":
        if len([work for work in (self.quantize, self.cast, self.partition) if work is not None]) != 1:
            raise PydanticCustomError("refused", "a step does one thing", {"hint": "quantize, cast or partition"})
        return self

    @property
    def kind(self) -> str:
        """The step's only key."""
        if self.partition is not None:
            return "partition"
        return "cast" if self.quantize is None else "quantize"

    @property
    def work(self) -> QuantizeStep | CastStep | PartitionStep:
        """What stands under it."""
        work = self.quantize or self.cast or self.partition
        assert work is not None
        return work


class BenchStep(Section):
    """How candidates are measured against the baseline."""

    text: str | None = None
    """Text to measure accuracy on: a file, relative to the recipe, or a Hugging Face dataset such as
    Salesforce/wikitext:wikitext-2-raw-v1:test. null: the text that comes with llmopt."""
    tokens: Count = 8192
    """How much of the text is read, in tokens, spread evenly over it."""
    window: Annotated[int, Field(ge=2)] = 512
    """Tokens that the model sees at once."""
    prompt: Count = 128
    """Tokens of the prompt, when latency is measured."""
    output: Count = 32
    """Tokens generated behind it."""
    rounds: Count = 5
    """Interleaved rounds, each in fresh processes. More rounds give narrower intervals."""
    latency: bool = True
    """Whether latency and memory are measured, which is for artifacts in onnxruntime."""


class Gate(Section):
    """A promise about what was measured."""

    candidate: str | None = None
    """The step that the promise is about. null: every step whose artifact is measured."""
    expression: Annotated[str, Field(alias="assert"), AfterValidator(_known_gate)]
    """Such as `perplexity <= +1%` (against the baseline) or `tpot_ms <= 20`; of a plan, ttft_ms or tpot_ms as they are
    predicted."""


class Recipe(Section):
    """What to do with a model, and what must come out of it."""

    schema_: Annotated[Literal["llmopt.recipe/1"], Field(alias="schema")]
    """The version of this language."""
    model: str
    """A hub id, a folder, a .gguf file, or demo."""
    output: str
    """The folder under which each step writes, relative to the working folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random draw comes from it."""
    threads: Count | None = None
    """Threads to compute with. null: as many as the machine has cores."""
    steps: Annotated[tuple[Step, ...], Field(strict=False, min_length=1)]
    """What is done, in this order."""
    bench: BenchStep | None = None
    """Measure the artifacts of all steps against the model. null: measure nothing."""
    gates: Many[Annotated[Gate, BeforeValidator(_gate_from_text, json_schema_input_type=str | Gate)]] = ()
    """Promises that make the exit code: a gate as text is for every step."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return draft | Recipe.model_json_schema(by_alias=True)
