"""What a model card says of its format: what it is called, and how to open it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """`written` names the format in a sentence; `tag` and `library` are the Hub's words; `run` is Markdown."""

    written: str
    tag: str
    library: str
    run: str


_LLMOPT = 'With llmopt, in this folder:\n\n```sh\nllmopt generate . "In the morning"\n```'

GENAI = """\
With [onnxruntime-genai](https://github.com/microsoft/onnxruntime-genai):

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=200)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("In the morning"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```"""

_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer("In the morning", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```"""

CAST_HF = f"""\
With llmopt, in this folder, each module in the dtype that it is stored in:

```sh
llmopt generate . "In the morning"
```

or, from Python, `llmopt.engine.cast.open_cast(Path("."))`: a model of transformers, with casts between its modules.

With transformers alone:

{_TRANSFORMERS}

That loads all of it in the one `dtype` of `config.json`: the 16 bits if no layer below is fp32, and else float32, which
takes twice the memory and computes right. Do not give `dtype=torch.float16` then: what was kept would be cast too."""

_GPTQ = f"""\
With vLLM, in this folder:

```sh
vllm serve .
```

With [GPTQModel](https://github.com/ModelCloud/GPTQModel):

```python
from gptqmodel import GPTQModel

model = GPTQModel.load(".")
print(model.tokenizer.decode(model.generate("In the morning")[0]))
```

With transformers, where optimum and gptqmodel are installed:

{_TRANSFORMERS}"""

CAST = "cast"  # the method of artifacts whose floats have another dtype, and no layer a scheme


def opening_of(format_: str, method: str | None) -> Opening:
    """What to say of an artifact."""
    return CAST_OPENING if (format_, method) == ("hf", CAST) else OPENING[format_]


CAST_OPENING = Opening(written="safetensors for transformers", tag="safetensors", library="transformers", run=CAST_HF)
OPENING: Mapping[str, Opening] = {
    "onnx": Opening(written="ONNX for onnxruntime", tag="onnx", library="onnxruntime", run=_LLMOPT),
    "hf": Opening(
        written="compressed-tensors for transformers",
        tag="compressed-tensors",
        library="transformers",
        run=f"With transformers and compressed-tensors, in this folder:\n\n{_TRANSFORMERS}",
    ),
    "gptq": Opening(written="a GPTQ checkpoint for GPTQModel and vLLM", tag="gptq", library="transformers", run=_GPTQ),
}
