"""What a linear's numbers look like: bits, groups, symmetry, and what happens to its activations.

A scheme has one name, which people type and reports print:

    w<bits>a<bits>[-g<group size> | -channel][-sym | -asym]

`w4a16` is short for `w4a16-g32-asym`, `w2a16` for `w2a16-g32-sym`, `w8a16` for `w8a16-g64-sym`, `w8a8` for
`w8a8-channel-sym`. onnxruntime has no kernel for 3 bits.
"""

import re
from dataclasses import dataclass

from llmopt.errors import UsageError

GROUP_SIZES = (32, 64, 128)
CHANNEL = None  # one group a row

_NAME = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(?:-(?:g(?P<group>\d+)|(?P<channel>channel)))?(?:-(?P<sym>a?sym))?")
_DEFAULTS: dict[tuple[int, int], tuple[int | None, bool]] = {
    # Groups of 64 keep an 8-bit model below 8.6 bits a weight, and the error far below that of fp16 activations.
    (8, 16): (64, True),
    # Asymmetric groups of 32 lose least at 4 bits, and the int4 kernels take their zero points at no cost in speed.
    (4, 16): (32, False),
    # Of four codes, a zero point says little that the sign of a scale does not: groups of 32 of a Gaussian err as much.
    (2, 16): (32, True),
    (8, 8): (CHANNEL, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Integer weights of `bits` bits, `group_size` of them sharing a scale (None: a whole row, "per channel").

    Activations stay floating point at 16 `activation_bits`; at 8 they are rounded to int8 per token as they come.
    """

    bits: int
    activation_bits: int
    group_size: int | None
    symmetric: bool

    @property
    def name(self) -> str:
        """The full name, which parses back to this scheme."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.bits}a{self.activation_bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    def __str__(self) -> str:
        return self.name

    @property
    def levels(self) -> int:
        """How many values a weight can take."""
        return int(2**self.bits)


def parse_scheme(text: str) -> Scheme:
    """Read a scheme's name.

    Raises:
        UsageError: it is no scheme's name, or one that has no kernel.
    """
    hint = "w8a16, w4a16, w2a16 or w8a8, with -g32, -g64, -g128 or -channel and -sym or -asym behind: w4a16-g128-sym"
    match = _NAME.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is not a scheme", hint=hint)
    key = (int(match["w"]), int(match["a"]))
    if key not in _DEFAULTS:
        raise UsageError(
            f"{text!r}: there is no scheme with {key[0]}-bit weights and {key[1]}-bit activations", hint=hint
        )
    group_size, symmetric = _DEFAULTS[key]
    if match["group"]:
        group_size = int(match["group"])
        if group_size not in GROUP_SIZES:
            raise UsageError(f"{text!r}: groups have {', '.join(map(str, GROUP_SIZES))} weights", hint=hint)
    if match["channel"]:
        group_size = CHANNEL
    if match["sym"]:
        symmetric = match["sym"] == "sym"
    if key == (8, 8) and (group_size is not CHANNEL or not symmetric):
        raise UsageError(f"{text!r}: w8a8 is per channel and symmetric, as its integer kernel needs", hint="use w8a8")
    return Scheme(bits=key[0], activation_bits=key[1], group_size=group_size, symmetric=symmetric)
