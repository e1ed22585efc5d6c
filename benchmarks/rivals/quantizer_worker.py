"""Quantizes a model with another tool, and writes what its integers mean as a float32 checkpoint.

PYTHON benchmarks/rivals/quantizer_worker.py gptq|autoround MODEL TEXT OUTPUT [--tokens 32768] [--threads 2]

PYTHON is that of an environment with llmcompressor (GPTQ: 4 bits, groups of 32, symmetric) or auto-round (100
iterations: 4 bits, groups of 32, asymmetric); llmopt need not be there. The last line is JSON: the seconds that
quantizing took, without imports, loading and writing.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 512
Windows = list[list[int]]


def gptq(model: Any, tokenizer: Any, windows: Windows) -> Any:
    """The model with rounded weights, from llm-compressor's GPTQ with its own defaults."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        max_seq_length=WINDOW,
        num_calibration_samples=len(windows),
    )
    return model


def autoround(model: Any, tokenizer: Any, windows: Windows) -> Any:
    """The model with rounded weights, from AutoRound with 100 iterations."""
    from auto_round import AutoRound

    tool = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=4,
        group_size=32,
        sym=False,
        iters=100,
        seqlen=WINDOW,
        nsamples=len(windows),
        dataset=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in map(as_batch, windows)],
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    return tool.quantize()[0]


def as_batch(ids: list[int]) -> torch.Tensor:
    """One window, [1, tokens]."""
    return torch.tensor([ids])


TOOLS = {"gptq": gptq, "autoround": autoround}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=sorted(TOOLS))
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("output")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    count = arguments.tokens // WINDOW
    stride = len(ids) // count  # spread over the text, as llmopt takes its windows
    windows = [ids[stride * place : stride * place + WINDOW] for place in range(count)]
    began = time.perf_counter()
    quantized = TOOLS[arguments.tool](model, tokenizer, windows)
    seconds = time.perf_counter() - began
    # What a tool wraps its modules in is its own affair: values go into a model as it was.
    plain = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    found = dict(quantized.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(found[name].data)
    plain.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
