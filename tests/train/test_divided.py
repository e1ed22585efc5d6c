"""Processes among which a model is divided learn what one learns, and keep what one keeps."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from llmopt.artifact import Journal
from llmopt.errors import DivergedError
from llmopt.pipeline.ranks import joined
from llmopt.train.checkpoint import Checkpoints
from llmopt.train.divided import divide, gathered, is_divided
from llmopt.train.loop import Trainer
from llmopt.train.settings import LossScale, Precision, Settings

STEPS = 24
STOP = 12


class Stopped(Exception):  # noqa: N818
    pass


class Deep(nn.Module):
    """A few blocks; one has an odd number of rows, so that shares differ in size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)) for _ in range(3)])
        self.target = torch.randn(6)
        self.bad_from: int | None = None
        self.calls = 0

    def forward(self, ids_BT):
        self.calls += 1
        start = x = ids_BT.float() / 8
        for block in self.blocks:
            x = x + block(x)
        if self.bad_from is not None and self.calls >= self.bad_from:
            x = x * float("nan")
        return (x.float().sum(-1) - start @ self.target).square().mean()


def batches(first):
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(step)
        yield list(torch.randint(-8, 8, (8, 6), generator=generator).chunk(4))


def run(ranks, folder, *, shares, precision="fp32", stop_at=None, bad_from=None):
    """Losses, losses on held-out text, scales, and the weights as they are left."""
    model = Deep()
    if shares:
        for block in model.blocks:
            divide(block)
        divide(model)
        assert is_divided(model)
    model.bad_from = bad_from
    asked = []

    def evaluate():
        asked.append(0)
        if stop_at is not None and len(asked) == stop_at:
            raise Stopped
        return float(model(torch.arange(12).reshape(2, 6)))

    first = ranks is None or ranks.rank == 0
    adam = torch.optim.Adam(model.parameters(), lr=0.02, fused=True)
    trainer = Trainer(
        model,
        [adam],
        batches,
        Settings(
            steps=STEPS,
            checkpoint_steps=5,
            evaluations=4,
            clip=0.5,
            precision=Precision(precision),
            scale=LossScale(start=2.0**8, growth_steps=10),
        ),
        evaluate=evaluate,
        checkpoints=Checkpoints(Journal(Path(folder))) if first and folder else None,
        replicas=ranks,
    )
    outcome = trainer.run()
    with gathered(model):
        weights = [parameter.detach().flatten().tolist() for parameter in model.parameters()]
    return {
        "losses": outcome.losses,
        "held_out": [one.loss for one in outcome.evaluations],
        "scales": outcome.scales,
        "weights": weights,
        "own": [parameter.detach().numel() for parameter in model.parameters()],
    }


def main(folder, more):
    torch.set_num_threads(1)
    with joined(lambda error: error) as ranks:
        try:
            found = run(ranks, folder or None, shares=True, **more)
        except Stopped:
            found = "stopped"
        except DivergedError as error:
            found = [error.what, error.where]
    sys.stdout.write(json.dumps(found))


def together(folder="", **more):
    """The same in two processes over gloo, each of which has a share; what each of them found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = f"from tests.train.test_divided import main; main({str(folder)!r}, {more!r})"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | places | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [json.loads(process.communicate(timeout=120)[0]) for process in started]


def journal(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_shares_have_the_losses_of_one_process_and_its_checkpoints(tmp_path, precision):
    alone_at, shares_at = journal(tmp_path / "alone"), journal(tmp_path / "shares")
    alone = run(None, alone_at, shares=False, precision=precision)
    first, second = together(shares_at, precision=precision)
    assert first == second
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for word in ("losses", "held_out", "scales"):
        assert first[word] == pytest.approx(list(alone[word]), abs=tolerance), word
    assert first["losses"][-1] < 0.5 * first["losses"][0]
    kept, shared = (Checkpoints(Journal(folder)).read() for folder in (alone_at, shares_at))
    assert kept[0] == shared[0] == STEPS
    assert kept[1].told.keys() == shared[1].told.keys()
    assert kept[1].tensors.keys() == shared[1].tensors.keys()
    for name, tensor in kept[1].tensors.items():
        assert shared[1].tensors[name].shape == tensor.shape, name
        if not name.startswith("random"):
            assert torch.allclose(shared[1].tensors[name], tensor, atol=10 * tolerance), name


def test_shares_go_on_from_a_checkpoint_of_shares_or_of_one_process(tmp_path):
    undisturbed, _ = together()
    assert together(journal(tmp_path / "shares"), stop_at=4) == ["stopped"] * 2
    with pytest.raises(Stopped):
        run(None, journal(tmp_path / "alone"), shares=False, stop_at=4)
    for folder in ("shares", "alone"):
        assert Checkpoints(Journal(tmp_path / folder)).steps() == [15]
        kept = Checkpoints(Journal(tmp_path / folder)).read()[1].tensors
        assert {name.partition(":")[0].rstrip("0") for name in kept} == {"model", "best", "optimizer", "random"}
        resumed, _ = together(tmp_path / folder)
        assert resumed["losses"] == pytest.approx(undisturbed["losses"], abs=1e-4)
        if folder == "shares":
            assert resumed == undisturbed


def test_a_loss_that_is_no_number_ends_all_of_them_and_names_the_place():
    first, second = together(bad_from=8)
    assert first == second
    assert first[0].endswith("the loss is not a number; there is no checkpoint")
