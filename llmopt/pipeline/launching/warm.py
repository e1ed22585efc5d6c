"""What a process takes once it has computed something: libraries load the code of their kernels when it is wanted.

It is no part of what a model needs, and so is there before anything is counted.
"""

import torch
from torch.nn import functional

from llmopt.quantize.int8 import quantize_rows
from llmopt.quantize.int8_torch import Int8Product, available
from llmopt.quantize.scheme import parse_scheme

_SIZE, _HEADS = 256, 4


@torch.inference_mode()
def warm_up(device: torch.device) -> None:
    """A product of one token and of several, in each kind that a CPU may have; attention."""
    weight_OI = torch.ones(_SIZE, _SIZE, device=device)
    for tokens in (1, _SIZE):
        functional.linear(torch.ones(tokens, _SIZE, device=device), weight_OI)
    if device.type != "cuda" and available():
        Int8Product(quantize_rows(weight_OI, parse_scheme("w8a8")))(torch.ones(1, _SIZE))
    heads_BNTD = torch.ones(1, _HEADS, _SIZE, _SIZE // _HEADS, device=device)
    mask_TT = torch.ones(_SIZE, _SIZE, dtype=torch.bool, device=device)
    functional.scaled_dot_product_attention(heads_BNTD, heads_BNTD, heads_BNTD, attn_mask=mask_TT)
