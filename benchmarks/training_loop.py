"""What the training loop costs beside the same steps written out in plain torch.

python -m benchmarks.training_loop [ROUNDS]
"""

import statistics
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.train.demo import NextToken
from llmopt.train.loop import Trainer
from llmopt.train.settings import Settings

STEPS = 20
WINDOWS, TOKENS = 4, 128
RATE = 1e-3


def new_model() -> NextToken:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1536, hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    return NextToken(LlamaForCausalLM(config))


def batches(first: int) -> Iterator[list[Tensor]]:
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(step)
        yield [torch.randint(0, 1536, (WINDOWS, TOKENS), generator=generator)]


def bare() -> float:
    """Seconds a step."""
    model = new_model()
    adam = torch.optim.AdamW(model.parameters(), lr=RATE)
    began = time.perf_counter()
    for (ids_BT,) in batches(0):
        loss = model(ids_BT)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        loss.item()
    return (time.perf_counter() - began) / STEPS


def in_the_loop() -> float:
    """Seconds a step."""
    model = new_model()
    trainer = Trainer(model, [torch.optim.AdamW(model.parameters(), lr=RATE)], batches, Settings(steps=STEPS))
    began = time.perf_counter()
    trainer.run()
    return (time.perf_counter() - began) / STEPS


def main() -> None:
    torch.set_num_threads(2)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    bare(), in_the_loop()  # warm
    pairs = [(bare(), in_the_loop()) for _ in range(rounds)]
    one, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    overhead = statistics.median(loop / plain for plain, loop in pairs) - 1
    times = f"bare {1000 * one:.2f} ms a step, in the loop {1000 * other:.2f} ms"
    print(f"{times}: {100 * overhead:+.1f} % in {rounds} rounds")


if __name__ == "__main__":
    main()
