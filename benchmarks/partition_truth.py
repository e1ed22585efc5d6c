"""Whether a plan keeps its word: predicted beside measured for every pair of model and plan, misses too.

python -m benchmarks.partition_truth --cluster cluster.yaml [--model reference] [--scheme float32]
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, ".")
from llmopt.pipeline.launching.launch import LaunchRequest, launch
from llmopt.pipeline.partition import PartitionRequest, partition
from llmopt.progress import Silent

MODELS = {
    "reference": "/root/.cache/llmopt/tests/smollm2-135m-instruct",
    "wide": "/tmp/truth/wide",
    "vocab": "/tmp/truth/vocab",
}
CASES = [
    ("reference", "pp 10/20", dict(split="10,20")),
    ("reference", "pp 15/15 m4", dict(split="15,15", micro_batches=4)),
    ("wide", "pp 3/5", dict(split="3,5")),
    ("wide", "tp 2", dict(split="8", degree=2)),
    ("wide", "pp 4/4 m4", dict(split="4,4", micro_batches=4)),
    ("vocab", "pp 4/2", dict(split="4,2")),
    ("vocab", "tp 2", dict(split="6", degree=2)),
]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--cluster", type=Path)
    p.add_argument("--model")
    p.add_argument("--scheme")
    p.add_argument("--only")
    a = p.parse_args()
    for m, name, kw in CASES:
        if a.model and a.model != m:
            continue
        if a.only and a.only not in name:
            continue
        for scheme in (None, "w8a8"):
            if a.scheme and a.scheme != (scheme or "float32"):
                continue
            with TemporaryDirectory() as t:
                plan = Path(t) / "p.json"
                partition(
                    PartitionRequest(
                        model=MODELS[m],
                        cluster=a.cluster,
                        output=plan,
                        objective="ttft",
                        prompt=256,
                        output_tokens=24,
                        dtype="float32",
                        scheme=scheme,
                        **({"micro_batches": 1} | kw),
                    ),
                    Silent(),
                )
                r = launch(LaunchRequest(plan=plan, rounds=3), Silent(), print)

                def c(x, f=1):
                    return f"{x.predicted * f:9.1f} {x.measured * f:9.1f} {100 * x.error:+6.0f}%"

                print(f"{m:10}{name:12}{scheme or 'float32':8} TTFT {c(r.ttft_ms)} TPOT {c(r.tpot_ms)}", flush=True)
                for s in r.stages:
                    print(
                        f"     {s.layers} pre {c(s.prefill_ms)} dec {c(s.decode_ms)} mem {c(s.memory_bytes, 1e-6)}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
