"""Plans without a planner: any stages, predictions that need not be right."""

import json

CLUSTER = {
    "schema": "llmopt.cluster/1",
    "devices": {"cpu": {"memory_gb": 4, "speeds": {"float32": {"tflops": 0.05, "gb_per_s": 10}}}},
    "nodes": [{"name": "here", "devices": {"cpu": 4}, "link": {"latency_us": 100, "gb_per_s": 1}}],
}


def plan_file(path, model, stages, **options):
    """Write a plan; see `plan_content`."""
    path.write_text(json.dumps(plan_content(model, stages, **options)))
    return path


def plan_content(model, stages, *, prompt=6, output=4, batch=2, **options):
    """A plan of stages (blocks, tensor-parallel degree); `options` go before all else."""
    first, ranks, found = 0, 0, []
    for number, (blocks, degree) in enumerate(stages):
        found.append(
            {
                "devices": [f"here/cpu:{rank}" for rank in range(ranks, ranks + degree)],
                "tp": degree,
                "layers": [first, first + blocks],
                "embedding": number == 0,
                "lm_head": number == len(stages) - 1,
                "weight_bytes": 100_000,
                "kv_bytes": 1000,
                "activation_bytes": 1000,
                "prefill_ms": 3.0,
                "decode_ms": 1.0,
            }
        )
        first, ranks = first + blocks, ranks + degree
    plan = {
        "schema": "llmopt.plan/1",
        "model": str(model),
        "cluster": CLUSTER,
        "objective": "ttft_ms",
        "workload": {"prompt": prompt, "output": output, "batch": batch},
        "stages": found,
        "predicted": {"ttft_ms": 10.0, "tpot_ms": 3.0, "throughput_tokens_per_s": 100.0},
    }
    return plan | options
