"""Times one engine on one model: 512 tokens of prompt, then 128 more, a few times; prints the best of each as JSON.

PYTHON benchmarks/rivals/engine_worker.py llama.cpp|openvino|genai PATH [--threads 2] [--repetitions 5]

PYTHON is that of an environment with llama-cpp-python, openvino-genai and onnxruntime-genai.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT, OUTPUT = 512, 128
Ids = np.ndarray[Any, np.dtype[np.int64]]
# Given a prompt, the seconds until the first token, and those that the others took.
Measure = Callable[[Ids], tuple[float, float]]


def llama_cpp(path: str, threads: int) -> Measure:
    from llama_cpp import Llama

    model = Llama(
        path, n_ctx=1024, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def measure(prompt: Ids) -> tuple[float, float]:
        model.reset()
        began = time.perf_counter()
        model.eval(prompt.tolist())
        first = time.perf_counter()
        for token in range(OUTPUT):
            model.eval([100 + token])
        return first - began, time.perf_counter() - first

    return measure


def openvino(path: str, threads: int) -> Measure:
    from openvino import Tensor
    from openvino_genai import GenerationConfig, LLMPipeline, TokenizedInputs

    pipeline = LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    length = OUTPUT + 1
    settings = GenerationConfig(max_new_tokens=length, min_new_tokens=length, ignore_eos=True, do_sample=False)

    def measure(prompt: Ids) -> tuple[float, float]:
        inputs = TokenizedInputs(Tensor(prompt[None]), Tensor(np.ones((1, PROMPT), np.int64)))
        found = pipeline.generate(inputs, settings).perf_metrics
        return found.get_ttft().mean / 1000, found.get_tpot().mean / 1000 * OUTPUT

    return measure


def genai(path: str, threads: int) -> Measure:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(path)
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model = onnxruntime_genai.Model(config)

    def measure(prompt: Ids) -> tuple[float, float]:
        settings = onnxruntime_genai.GeneratorParams(model)
        length = PROMPT + OUTPUT + 8
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, settings)
        began = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(OUTPUT):
            generator.generate_next_token()
        return first - began, time.perf_counter() - first

    return measure


ENGINES = {"llama.cpp": llama_cpp, "openvino": openvino, "genai": genai}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("path")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    measure = ENGINES[arguments.engine](arguments.path, arguments.threads)
    prompts = [np.random.default_rng(seed).integers(10, 40_000, PROMPT) for seed in range(arguments.repetitions)]
    times = [measure(prompt) for prompt in prompts][1:]  # the first warms up
    prefill, decode = map(min, zip(*times, strict=True))
    print(json.dumps({"prefill": PROMPT / prefill, "decode": OUTPUT / decode}))


if __name__ == "__main__":
    main()
