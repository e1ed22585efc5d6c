"""Flags of training, which `quantize` has for method qat."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmopt.pipeline.qat.options import QatOptions

TrainData = Annotated[
    str | None,
    typer.Option(
        "--train-data",
        metavar="TEXT",
        help="With --method qat: text to learn from, named as for --calib; the more, the better. Default: that of "
        "--calib, else stories that come with llmopt.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, metavar="N", help="With qat: train for so many steps. [default: 400, or --minutes]"),
]
Batch = Annotated[
    int | None,
    typer.Option("--batch", min=1, metavar="N", help="With qat: windows of 512 tokens in a step. [default: 2]"),
]
CrossEntropy = Annotated[
    float | None,
    typer.Option(
        "--cross-entropy",
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="With qat: the share of the text's own cross entropy in the loss, the rest of which is the divergence "
        "from the float model. [default: 0]",
    ),
]
LoraRank = Annotated[
    int | None,
    typer.Option(
        "--lora-rank",
        min=1,
        metavar="R",
        help="With qat: weights move by products of thin matrices of that rank, which takes less memory. They are "
        "folded into the weights before these are rounded. Default: each weight moves by itself.",
    ),
]
ByBlock = Annotated[
    bool,
    typer.Option(
        "--by-block", help="With qat: train one block at a time, for models that do not fit into memory as a whole."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="TYPE",
        help="With qat: what products are computed in, fp32, bf16 or fp16; weights and updates are fp32. "
        "[default: fp32]",
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--rate", metavar="R", help="With qat: how far weights go in a step at first, in codes. [default: 0.002]"
    ),
]
Shard = Annotated[
    bool | None,
    typer.Option(
        "--shard/--no-shard",
        help="With qat, of several processes: divide among them what training takes, so that none holds all of it. "
        "Default: if memory has no room otherwise.",
    ),
]


def training_options(
    data: str | None,
    steps: int | None,
    batch: int | None,
    cross_entropy: float | None,
    lora_rank: int | None,
    by_block: bool,
    precision: str | None,
    rate: float | None,
    shard: bool | None,
) -> "QatOptions | None":
    """What was said of training; None if nothing was."""
    from llmopt.pipeline.qat.options import QatOptions

    said = {
        "data": data,
        "steps": steps,
        "batch": batch,
        "cross_entropy": cross_entropy,
        "lora_rank": lora_rank,
        "by_block": by_block or None,
        "precision": precision,
        "rate": rate,
        "shard": shard,
    }
    given = {name: value for name, value in said.items() if value is not None}
    return QatOptions(**given) if given else None  # type: ignore[arg-type]
