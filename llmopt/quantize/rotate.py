"""Rotation: mix the channels of a head, or of the residual stream, so that none stands out from the others.

Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv 2404.00456), section 4: values are
turned as they are made, and turned back by the product that reads them; and everything around the residual stream is
turned with it (`llmopt.model.turned`). Random Hadamard matrices spread a channel
evenly over all; Liu et al. 2024, "SpinQuant: LLM Quantization with Learned Rotations" (arXiv 2405.16406), section 2.2,
found that some are much better than others, so several are tried.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.quantize.fold import Heads, InputSample, Turning


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """Orthogonal matrices for the values of heads, and for the residual stream; there are none for other inputs."""

    tries: int = 4
    stream_tries: int = 2
    name: str = "rotate"

    def candidates(self, weight_OI: Tensor, inputs: InputSample, heads: Heads | None) -> Iterator[Turning]:
        """Random rotations, the same on every run."""
        if heads is None:
            return
        channels = weight_OI.shape[1] // (heads[0] * heads[1])
        for seed in range(self.tries):
            yield Turning(random_rotation(channels, torch.Generator().manual_seed(seed)))

    def of_stream(self, width: int, seed: int) -> Tensor:
        """One of the `stream_tries` matrices, [width, width], for the residual stream; the same on every run."""
        return random_rotation(width, torch.Generator().manual_seed(seed))


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """diag(±1) H / √size, with Sylvester's H where it exists, or else Q of a random matrix; [size, size]."""
    if size & (size - 1):
        turn_DD: Tensor = torch.linalg.qr(torch.randn((size, size), generator=generator, dtype=torch.float64)).Q
        return turn_DD.float()
    hadamard_DD = torch.ones((1, 1))
    while len(hadamard_DD) < size:
        above_DD = torch.cat([hadamard_DD, hadamard_DD], 1)
        hadamard_DD = torch.cat([above_DD, torch.cat([hadamard_DD, -hadamard_DD], 1)])
    signs_D = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    return hadamard_DD * signs_D / math.sqrt(size)
