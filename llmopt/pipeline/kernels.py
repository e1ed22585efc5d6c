"""Which CPUs an artifact's int8 products are written for, and whether this machine is one of them."""

import platform
from collections.abc import Mapping
from typing import Any, Literal

from llmopt.artifact import Manifest
from llmopt.errors import ArtifactError, UnsupportedError, UsageError
from llmopt.measure.host import describe_host
from llmopt.pipeline.export import rounds_activations
from llmopt.quantize.assign import Assignment

Cpu = Literal["auto", "any", "vnni"]
INT8_KERNEL = "int8_kernel"
SIGNED, UNSIGNED = "signed", "unsigned"


def parse_cpu(text: str) -> Cpu:
    """Read `--cpu`.

    Raises:
        UsageError: it is none of the words.
    """
    match text:
        case "auto" | "any" | "vnni":
            return text
    raise UsageError(f"there is no CPU kind {text!r}", hint="--cpu auto, any or vnni")


def sums_in_32_bits() -> bool:
    """Whether this machine multiplies unsigned by signed bytes without saturating: x86 with VNNI, or any Arm."""
    if platform.machine().lower() not in {"x86_64", "amd64", "i686", "i386"}:
        return True
    return bool({"avx512_vnni", "avx_vnni"} & set(describe_host(1)["isa"] or ()))


def signed_int8(cpu: Cpu) -> bool:
    """Whether to write signed weights: faster with VNNI, wrong on x86 without it."""
    return cpu == "vnni" or (cpu == "auto" and sums_in_32_bits())


def engine_facts(assignments: Mapping[str, Assignment], cpu: Cpu) -> dict[str, Any]:
    """What a manifest says of the kernels; nothing where no layer has int8 activations."""
    if not rounds_activations(assignments):
        return {}
    return {INT8_KERNEL: SIGNED if signed_int8(cpu) else UNSIGNED}


def check_can_verify(assignments: Mapping[str, Assignment], cpu: Cpu) -> None:
    """See that this machine can hold the export against what it should compute.

    Raises:
        UnsupportedError: it is asked for signed products, which would saturate here.
    """
    if cpu == "vnni" and not sums_in_32_bits() and rounds_activations(assignments):
        raise UnsupportedError(
            "int8 products for VNNI cannot be verified here: this CPU has none, and they would saturate",
            hint="run this on a machine with VNNI, or use --cpu any",
        )


def check_runs_here(manifest: Manifest, *, where: str) -> None:
    """See that this machine computes what the artifact means.

    Raises:
        ArtifactError: its int8 products would saturate here, and every token be a little wrong.
    """
    if manifest.engine.get(INT8_KERNEL) == SIGNED and not sums_in_32_bits():
        raise ArtifactError(
            "the artifact was written for CPUs with VNNI, and this one has none: its int8 sums would saturate",
            where=where,
            hint="write it again with --cpu any",
        )
