"""The program of a rank that measures: `python -m llmopt.pipeline.probing.worker PROBE.json`."""

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Join the others and measure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    import torch.distributed as dist  # noqa: PLC0415 (after SIGINT is dealt with)

    from llmopt.pipeline.launching.rank import rank_device  # noqa: PLC0415
    from llmopt.pipeline.probing.probe import probe_rank  # noqa: PLC0415

    device = rank_device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    probe_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
