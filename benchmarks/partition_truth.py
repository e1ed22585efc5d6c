"""Whether a plan keeps its word: TTFT, TPOT and memory as predicted beside as measured, for every pair, misses too.

    python -m benchmarks.partition_truth --models FOLDER --results FILE.json [--only vocabulary] [--calibrate]

One call is one pass through every pair that is asked for: it probes this machine, plans and runs the pair on two ranks
in every scheme, and adds what it found to the results. Printed are the medians of all passes there. Models but the
reference one are made into the folder: a wide one, and one whose vocabulary takes more than its blocks; nothing in
llmopt knows them.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from llmopt.cli.probe import probe
from llmopt.model.families import spec_from_config
from llmopt.partition.plan import read_plan
from llmopt.pipeline.launching.calibrate import calibrated
from llmopt.pipeline.launching.launch import LaunchRequest, launch
from llmopt.pipeline.launching.result import Compared, LaunchResult
from llmopt.pipeline.partition import PartitionRequest, partition
from llmopt.pipeline.probing.cluster_file import write_cluster
from llmopt.progress import Silent
from tests.reference import reference_model

PROMPT, OUTPUT, ROUNDS = 256, 24, 7
BLOCKS = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
MADE = {
    "wide": {"intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 16000, "tie_word_embeddings": False},
    "vocabulary": {"intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 150_000},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A model and what is asked of its plan."""

    model: str
    asked: str
    split: str | None = None
    degree: int = 1
    micro_batches: int = 1
    batch: int = 1


PAIRS = (
    Pair(model="reference", asked="blocks 10, 20", split="10,20"),
    Pair(model="reference", asked="blocks 15, 15; prompt in 4", split="15,15", micro_batches=4),
    Pair(model="reference", asked="blocks 15, 15; 4 sequences in 2", split="15,15", micro_batches=2, batch=4),
    Pair(model="wide", asked="blocks 3, 5", split="3,5"),
    Pair(model="wide", asked="blocks 6, 2", split="6,2"),
    Pair(model="wide", asked="tensor 2", split="8", degree=2),
    Pair(model="wide", asked="blocks 4, 4; prompt in 4", split="4,4", micro_batches=4),
    Pair(model="vocabulary", asked="blocks 4, 2", split="4,2"),
    Pair(model="vocabulary", asked="tensor 2", split="6", degree=2),
    Pair(model="vocabulary", asked="even, 2 sequences in 2", split="3,3", micro_batches=2, batch=2),
    Pair(model="vocabulary", asked="planned, 2 sequences in 2", micro_batches=2, batch=2),
)
SCHEMES = (None, "w8a8")
MOST_OTHERS, OTHERS = 0.05, "others"


def made_model(folder: Path, sizes: dict[str, Any]) -> str:
    """A folder with a Llama of random weights."""
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
        config |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, **BLOCKS}
        (folder / "config.json").write_text(json.dumps(config | sizes))
        draw = torch.Generator().manual_seed(0)
        tensors = {
            tensor.name: torch.ones(tensor.shape)
            if len(tensor.shape) == 1
            else 0.02 * torch.randn(tensor.shape, generator=draw)
            for tensor in spec_from_config(config | sizes).tensors()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def run(pair: Pair, scheme: str | None, model: str, cluster: Path, refined: Path | None = None) -> LaunchResult:
    """Plan and launch; with `refined`, the cluster file is written as the run corrects it."""
    with TemporaryDirectory() as name:
        path = Path(name) / "plan.json"
        request = PartitionRequest(
            model=model,
            cluster=cluster,
            output=path,
            objective="throughput",
            prompt=PROMPT,
            output_tokens=OUTPUT,
            batch=pair.batch,
            dtype="float32",
            scheme=scheme,
            degree=pair.degree,
            micro_batches=pair.micro_batches,
            replicas=1,
            split=pair.split,
            order=None if pair.split else "here/cpu:0,here/cpu:1",
        )
        partition(request, Silent())
        result = launch(LaunchRequest(plan=path, rounds=ROUNDS), Silent(), print)
        assert result is not None
        if refined is not None:
            write_cluster(calibrated(read_plan(path), result), refined)
        return result


def numbers(result: LaunchResult) -> dict[str, Any]:
    """What is compared, in ms and MB."""

    def both(compared: Compared, factor: float = 1.0) -> list[float]:
        assert compared.predicted is not None
        assert compared.measured is not None
        return [compared.predicted * factor, compared.measured * factor]

    memory = [both(stage.memory_bytes, 1e-6) for stage in result.stages]
    return {
        "blocks": [stage.layers[1] - stage.layers[0] for stage in result.stages],
        "TTFT ms": both(result.ttft_ms),
        "TPOT ms": both(result.tpot_ms),
        **{f"memory of stage {number}, MB": one for number, one in enumerate(memory)},
        "stages ms": [[*both(stage.prefill_ms), *both(stage.decode_ms)] for stage in result.stages],
    }


def undisturbed(work: Callable[[], LaunchResult]) -> dict[str, Any]:
    """What a run found, and what part of a core other programs had meanwhile; where that is much, of a second run."""
    for last in (False, True):
        (busy_s, own_s), start = busy_and_own_s(), time.perf_counter()
        result = work()
        more_busy_s, more_own_s = busy_and_own_s()
        others = (more_busy_s - busy_s - more_own_s + own_s) / (time.perf_counter() - start)
        if others < MOST_OTHERS or last:
            break
    return numbers(result) | {OTHERS: others}


def busy_and_own_s() -> tuple[float, float]:
    """Seconds that all cores have worked, and what of it was for this process and those that it has ended."""
    times, own = (
        psutil.cpu_times(),
        [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)],
    )
    return times.user + times.nice + times.system, sum(one.ru_utime + one.ru_stime for one in own)


def one_pass(
    only: str, schemes: Sequence[str | None], folder: Path, known: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pair that is asked for, run once behind a probe, unless the cluster is known."""
    for pair in PAIRS:
        names = {f"{pair.model}, {scheme or 'float32'}: {pair.asked}": scheme for scheme in schemes}
        asked = {name: scheme for name, scheme in names.items() if only in name}
        with TemporaryDirectory() as scratch:
            cluster = known or Path(scratch) / "cluster.yaml"
            if asked and known is None:
                probe(cluster, ranks=2, quiet=True)
            for name, scheme in asked.items():
                yield name, undisturbed(partial(run, pair, scheme, model_of(pair, folder), cluster))


def model_of(pair: Pair, folder: Path) -> str:
    """Where its model is, made if it has to be."""
    return str(reference_model()) if pair.model == "reference" else made_model(folder / pair.model, MADE[pair.model])


def calibration(folder: Path, cluster: Path) -> Iterator[str]:
    """One run corrects the cluster file: how far off predictions are before and behind, of its plan and of another."""
    first, other = (pair for pair in PAIRS if pair.model == "wide" and pair.micro_batches == 1 and pair.degree == 1)
    model, refined = model_of(first, folder), folder / "refined.yaml"
    run(first, None, model, cluster, refined)
    yield "| plan | TTFT, before → behind | TPOT, before → behind |\n| --- | --- | --- |"
    for pair in (first, other):
        before, behind = (run(pair, None, model, file) for file in (cluster, refined))
        cells = (
            f"{100 * (one.error or 0):+.0f} % → {100 * (two.error or 0):+.0f} %"
            for one, two in ((before.ttft_ms, behind.ttft_ms), (before.tpot_ms, behind.tpot_ms))
        )
        yield f"| {pair.model}: {pair.asked} | {' | '.join(cells)} |"


def table(results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Rows of Markdown, and how far off all of them are."""
    yield "| pair | passes | TTFT ms | TPOT ms | memory of a stage, MB |"
    yield "| --- | --- | --- | --- | --- |"
    errors: list[float] = []
    for name, passes in results.items():
        cells = {"TTFT ms": [], "TPOT ms": [], "memory": []}
        for key in passes[0]:
            if key in ("blocks", "stages ms", OTHERS):
                continue
            predicted, measured = (median(one[key][which] for one in passes) for which in range(2))
            errors.append(predicted / measured - 1)
            cells[key if key in cells else "memory"].append(
                f"{predicted:.4g} → {measured:.4g} ({100 * errors[-1]:+.0f} %)"
            )
        yield f"| {name} | {len(passes)} | {' | '.join('; '.join(cell) for cell in cells.values())} |"
    off = sorted(abs(error) for error in errors)
    within = sum(one <= 0.15 for one in off)
    yield f"\n{within} of {len(off)} within 15 %, median {100 * median(off):.1f} %, largest {100 * off[-1]:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder of the models that are made")
    parser.add_argument("--results", type=Path, required=True, help="what earlier passes found, and where this adds")
    parser.add_argument("--only", default="", help="pairs whose names hold this")
    parser.add_argument("--scheme", choices=("float32", "w8a8"), help="only this one")
    parser.add_argument("--cluster", type=Path, help="this cluster file, in place of probes")
    parser.add_argument("--calibrate", action="store_true", help="show what launch --calibrate corrects, and no more")
    parser.add_argument("--table", action="store_true", help="only print")
    asked = parser.parse_args()
    results = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    if not asked.table:
        schemes = SCHEMES if asked.scheme is None else [None if asked.scheme == "float32" else asked.scheme]
        if asked.calibrate:
            with TemporaryDirectory() as name:
                cluster = asked.cluster or Path(name) / "cluster.yaml"
                if asked.cluster is None:
                    probe(cluster, ranks=2, quiet=True)
                print("\n".join(calibration(asked.models, cluster)))
            return
        for pair, found in one_pass(asked.only, schemes, asked.models, asked.cluster):
            results.setdefault(pair, []).append(found)
            asked.results.write_text(json.dumps(results))
            print(pair, found, flush=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
