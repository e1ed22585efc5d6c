"""The textbook's model to be cut in two: a language model of LSTM layers, all of one width.

Nobody ships one of that size any more, so its weights are drawn: each part from a seed of its own, which lets a process
have its layers without those of others. A name says all of it: `lstm:12x2048` is twelve layers of width 2048.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmopt.errors import UsageError

Carried = tuple[Tensor, Tensor]

_NAME = re.compile(r"lstm:(?P<layers>[1-9]\d*)x(?P<width>[1-9]\d*)(?:,vocab=(?P<vocab>[1-9]\d*))?")
_VOCABULARY = 10_000
_FLOAT_BYTES = 4
_GATES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentSpec:
    """Token table [V, H], `layers` LSTM layers H → H, head [V, H]."""

    layers: int
    width: int
    vocab_size: int = _VOCABULARY

    @property
    def layer_bytes(self) -> int:
        """Weights of a layer, float32: what reads the inputs, what reads the layer's own outputs, and a bias."""
        return _FLOAT_BYTES * (2 * _GATES * self.width**2 + _GATES * self.width)

    @property
    def layer_flops_per_token(self) -> int:
        """A multiply and an add a weight."""
        return 2 * 2 * _GATES * self.width**2

    def layer(self, number: int) -> "LstmLayer":
        """One layer, its weights drawn so that what goes through all of them neither dies nor grows."""
        generator = torch.Generator().manual_seed(number + 2)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).mul_(1.5 / self.width**0.5)

        rows = _GATES * self.width
        return LstmLayer(drawn(rows, self.width), drawn(rows, self.width), drawn(rows))

    def table(self) -> Tensor:
        """What embeds tokens, [V, H]."""
        return torch.randn(self.vocab_size, self.width, generator=torch.Generator().manual_seed(0))

    def head(self) -> Tensor:
        """What gives logits, [V, H]."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.vocab_size, self.width, generator=generator).mul_(self.width**-0.5)


class LstmLayer:
    """What `torch.nn.LSTM` computes (Hochreiter and Schmidhuber 1997), with gates i, f, g, o in rows of one matrix.

    torch's own packs its weights at every call, which costs more than a few tokens do: micro-batches have few.
    """

    def __init__(self, reads_inputs_GH: Tensor, reads_outputs_GH: Tensor, bias_G: Tensor) -> None:
        self._inputs_GH, self._outputs_GH, self._bias_G = reads_inputs_GH, reads_outputs_GH, bias_G

    @property
    def nbytes(self) -> int:
        """What its weights take."""
        return self._inputs_GH.nbytes + self._outputs_GH.nbytes + self._bias_G.nbytes

    def __call__(self, x_BTH: Tensor, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Outputs [B, T, H], and what to go on from: the last output and the cells, [B, H] each; None at first."""
        batch, tokens, width = x_BTH.shape
        output_BH, cell_BH = carried or (x_BTH.new_zeros(batch, width), x_BTH.new_zeros(batch, width))
        inputs_BTG = functional.linear(x_BTH, self._inputs_GH, self._bias_G)
        outputs_BTH = torch.empty_like(x_BTH)
        for token in range(tokens):
            # The wide matrix first: BLAS is faster at it than at few rows times a wide one.
            gates_BG = (self._outputs_GH @ output_BH.T).T + inputs_BTG[:, token]
            write_BH, keep_BH, new_BH, show_BH = gates_BG.chunk(_GATES, -1)
            cell_BH = keep_BH.sigmoid() * cell_BH + write_BH.sigmoid() * new_BH.tanh()
            output_BH = show_BH.sigmoid() * cell_BH.tanh()
            outputs_BTH[:, token] = output_BH
        return outputs_BTH, (output_BH, cell_BH)


def is_recurrent(name: str) -> bool:
    """Whether a model's name is one of these."""
    return name.startswith("lstm:")


def recurrent_spec(name: str) -> RecurrentSpec:
    """The model that a name describes.

    Raises:
        UsageError: it describes none.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"{name!r} is no recurrent model", hint="lstm:12x2048, or lstm:12x2048,vocab=10000")
    vocabulary = int(match["vocab"] or _VOCABULARY)
    return RecurrentSpec(layers=int(match["layers"]), width=int(match["width"]), vocab_size=vocabulary)
