"""Linears of one input, which a graph computes as one product where they are of one kind."""

from llmopt.model.spec import Attention, Block, Linear, Mlp


def queries_keys_values(attention: Attention) -> str:
    """The name of the product that has queries, keys and values."""
    return f"{attention.output.name.rpartition('.')[0]}.qkv_proj"


def gate_and_up(mlp: Mlp) -> str:
    """The name of the product that has an MLP's gate and up."""
    return f"{mlp.down.name.rpartition('.')[0]}.gate_up_proj"


def together(block: Block) -> dict[str, tuple[Linear, ...]]:
    """The linears that may be one product, in the order of its outputs, by its name."""
    return {
        queries_keys_values(block.attention): block.attention.inputs,
        gate_and_up(block.mlp): block.mlp.inputs,
    }
