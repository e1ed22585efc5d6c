"""Two processes learn what one learns from a batch twice as large."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from llmopt.pipeline.ranks import joined
from llmopt.train.loop import Trainer
from llmopt.train.settings import Settings

STEPS = 25


def losses_and_weights(ranks):
    """Of a run whose steps have four batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    target = torch.randn(6)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids_BT):
            x = ids_BT.float() / 8
            return (self.model(x)[:, 0].float() - x @ target).square().mean()

    def batches(first):
        for step in range(first, STEPS):
            generator = torch.Generator().manual_seed(step)
            yield list(torch.randint(-8, 8, (8, 6), generator=generator).chunk(4))

    adam = torch.optim.AdamW(model.parameters(), lr=0.02)
    outcome = Trainer(Loss(), [adam], batches, Settings(steps=STEPS), replicas=ranks).run()
    return outcome.losses, [parameter.detach().flatten().tolist() for parameter in model.parameters()]


def together():
    """The same in two processes over gloo; what each of them found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", "from tests.train.test_replicas import main; main()"]
    started = [
        subprocess.Popen(command, env=os.environ | places | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    return [json.loads(process.communicate(timeout=120)[0]) for process in started]


def main():
    torch.set_num_threads(1)
    with joined(lambda error: error) as ranks:
        found = losses_and_weights(ranks)
    sys.stdout.write(json.dumps(found))


def test_two_processes_have_the_losses_of_one():
    alone, _ = losses_and_weights(None)
    (first, weights), (second, others) = together()
    assert first == second
    assert weights == others
    assert first == pytest.approx(list(alone), abs=1e-4)
    assert first[-1] < 0.5 * first[0]
