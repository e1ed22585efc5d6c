"""Whether slow links are predicted: two ranks of this machine in networks of their own, joined by one that is slowed.

    sudo python -m benchmarks.slow_links --cluster cluster.yaml --mbit 200 50

Needs Linux, root and iproute2. `tc` lets so many bits a second through, both ways, as a token bucket; the link is
measured as `llmopt probe` measures one, put in place of the cluster file's, and a plan of two stages is made and run
over it. A delay would need a kernel with netem.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from llmopt.partition.cluster import load_cluster
from llmopt.partition.device import Link
from llmopt.pipeline.partition import PartitionRequest, partition
from llmopt.pipeline.probing.cluster_file import write_cluster
from llmopt.pipeline.probing.links import line, message_seconds
from llmopt.progress import Silent
from tests.reference import reference_model

SPACES = ("llmopt-a", "llmopt-b")
INTERFACE, PORT, BLOCKS = "llmopt0", "29655", "10,20"
CASES = ((1, 256), (4, 256))  # micro-batches, tokens of a prompt


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=not check)


@contextmanager
def slowed(mbit: int) -> Iterator[None]:
    """Two network namespaces with a slow link between them."""
    try:
        for space in SPACES:
            ip("netns", "add", space)
        pair = ["link", "add", INTERFACE, "netns", SPACES[0], "type", "veth", "peer", "name", INTERFACE]
        ip(*pair, "netns", SPACES[1])
        for number, space in enumerate(SPACES, 1):
            ip("-n", space, "addr", "add", f"10.99.0.{number}/24", "dev", INTERFACE)
            ip("-n", space, "link", "set", INTERFACE, "up")
            ip("-n", space, "link", "set", "lo", "up")
            bucket = f"tbf rate {mbit}mbit burst 16kb latency 400ms"
            subprocess.run(["tc", "-n", space, *f"qdisc add dev {INTERFACE} root {bucket}".split()], check=True)
        yield
    finally:
        for space in SPACES:
            ip("netns", "del", space, check=False)


def in_both(command: Sequence[str]) -> str:
    """Run one rank in each namespace; what the first prints."""
    cores = sorted(os.sched_getaffinity(0))
    meeting = {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": INTERFACE, "WORLD_SIZE": "2"}
    ranks = []
    for rank, space in enumerate(SPACES):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
        words = ["ip", "netns", "exec", space, "taskset", "-c", str(cores[rank % len(cores)]), *command]
        ranks.append(subprocess.Popen(words, env=os.environ | meeting | place, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank ended with {[rank.returncode for rank in ranks]}")
    return said[0]


def measure() -> None:
    """What a rank does to measure the link; the first prints it."""
    dist.init_process_group("gloo")
    found = line(message_seconds(int(os.environ["RANK"]), torch.device("cpu")))
    if os.environ["RANK"] == "0":
        print(json.dumps(asdict(found)))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", type=Path, help="as llmopt probe --ranks 2 wrote it")
    parser.add_argument("--mbit", type=int, nargs="+", default=[200, 50])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        return measure()
    print("| link | measured | plan | TTFT ms | TPOT ms |\n| --- | --- | --- | --- | --- |", flush=True)
    for mbit in asked.mbit:
        with slowed(mbit):
            link = json.loads(in_both([sys.executable, "-m", "benchmarks.slow_links", "--measure"]).splitlines()[-1])
            for micro_batches, prompt in CASES:
                print(row(asked.cluster, mbit, link, micro_batches, prompt), flush=True)
    return None


def row(known: Path, mbit: int, link: dict[str, float], micro_batches: int, prompt: int) -> str:
    with TemporaryDirectory() as name:
        cluster, plan = Path(name) / "cluster.yaml", Path(name) / "plan.json"
        found = load_cluster(known)
        slow = Link(latency_us=1e6 * link["latency_s"], gb_per_s=link["bytes_per_s"] / 1e9)
        node = found.nodes[0].model_copy(update={"link": slow, "sums": None})
        write_cluster(found.model_copy(update={"nodes": (node,)}), cluster)
        request = PartitionRequest(
            model=str(reference_model()),
            cluster=cluster,
            output=plan,
            prompt=prompt,
            output_tokens=16,
            dtype="float32",
            split=BLOCKS,
            micro_batches=micro_batches,
            degree=1,
        )
        partition(request, Silent())
        result = json.loads(in_both([sys.executable, "-m", "llmopt", "launch", str(plan), "--json", "-q"]))
    cells = [
        f"{one['predicted']:.4g} → {one['measured']:.4g} ({100 * one['error']:+.0f} %)"
        for one in (result["ttft_ms"], result["tpot_ms"])
    ]
    said = f"{slow.latency_us:.0f} µs + {1e3 * slow.gb_per_s:.3g} MB/s"
    return f"| {mbit} Mbit/s | {said} | {BLOCKS}, {micro_batches} micro-batches | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
