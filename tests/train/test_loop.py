"""The training loop, on models small enough to see through."""

import math

import pytest
import torch
from torch import Tensor, nn

from llmopt.artifact import Journal
from llmopt.errors import DivergedError, UsageError
from llmopt.train.checkpoint import Checkpoints
from llmopt.train.loop import Trainer
from llmopt.train.settings import LossScale, Precision, Settings

WIDTH = 6


class Regression(nn.Module):
    """Rows of ids are inputs; what they should give is what a fixed matrix gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, 16)
        self.second = nn.Linear(16, 1)
        self.target = torch.randn(WIDTH)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = ids_BT.float() / 8
        return (self.second(torch.tanh(self.first(x)))[:, 0].float() - x @ self.target).square().mean()


def batches_of(count=1, rows=4):
    def batches(first):
        step = first
        while True:
            generator = torch.Generator().manual_seed(step)
            yield list(torch.randint(-8, 8, (count * rows, WIDTH), generator=generator).chunk(count))
            step += 1

    return batches


def trainer(settings, model=None, batches=None, **others):
    model = model or Regression()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01)]
    return Trainer(model, optimizers, batches or batches_of(), settings, **others)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_learns_and_says_what_it_took():
    run = trainer(Settings(steps=200))
    outcome = run.run()
    assert outcome.steps == len(outcome.losses) == 200
    assert outcome.tokens == 200 * 4 * WIDTH
    assert sum(outcome.losses[-20:]) < 0.2 * sum(outcome.losses[:20])
    assert outcome.tokens_per_second == pytest.approx(outcome.tokens / outcome.seconds)
    assert outcome.peak_rss_bytes > 2**20


def test_gradients_of_several_batches_are_those_of_one_that_holds_them_all():
    whole, parts = trainer(Settings(steps=10)), trainer(Settings(steps=10), batches=batches_of(count=4, rows=1))
    assert whole.run().losses == pytest.approx(parts.run().losses, rel=1e-4)
    for name, value in weights(whole.model).items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=1e-5), name


def test_rates_rise_and_fall_on_a_cosine():
    settings = Settings(steps=100, warmup_steps=10)
    rates = [settings.rate(step, 0.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001


def test_within_minutes_rates_fall_with_the_clock_and_the_run_ends_with_it():
    time = iter(range(10_000))
    run = trainer(Settings(seconds=100.0), clock=lambda: float(next(time)))
    outcome = run.run()
    assert 20 < outcome.steps < 100
    assert Settings(seconds=100.0).rate(5, 50.0) == pytest.approx(0.5)
    assert Settings(seconds=100.0, final_share=0.1).rate(5, 200.0) == pytest.approx(0.1)


@pytest.mark.parametrize("settings", [{}, {"steps": 0}, {"seconds": 0.0}, {"seconds": math.nan}])
def test_a_run_without_a_length_is_refused(settings):
    with pytest.raises(UsageError):
        Settings(**settings)


def test_gradients_are_clipped_together():
    run = trainer(Settings(steps=1, clip=1e-3))
    run.optimizers = [torch.optim.SGD(run.model.parameters(), lr=1.0)]
    run.peaks = [[1.0]]
    before = weights(run.model)
    run.run()
    moved = sum((run.model.state_dict()[name] - value).square().sum() for name, value in before.items())
    assert float(moved) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


class Stopped(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("precision", list(Precision))
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, precision):
    settings = Settings(steps=12, precision=precision, checkpoint_steps=5, evaluations=3)

    def run(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        calls = []

        def evaluate():
            calls.append(0)
            if stop_at == len(calls):
                raise Stopped
            return float(model(torch.arange(WIDTH)[None]))

        model = Regression()
        made = trainer(settings, model, evaluate=evaluate, checkpoints=Checkpoints(Journal(folder)))
        return made, made.run()

    undisturbed, outcome = run(tmp_path / "a")
    with pytest.raises(Stopped):
        run(tmp_path / "b", stop_at=3)  # behind step 8; the last checkpoint is that of step 5
    assert Checkpoints(Journal(tmp_path / "b")).steps() == [5]
    resumed, again = run(tmp_path / "b")
    assert same(weights(undisturbed.model), weights(resumed.model))
    assert (outcome.losses, outcome.scales, outcome.evaluations) == (again.losses, again.scales, again.evaluations)
    assert Checkpoints(Journal(tmp_path / "b")).steps() == [12]
    assert run(tmp_path / "b", stop_at=1)[1].losses == outcome.losses  # there is nothing left to do


def test_what_was_best_on_held_out_text_is_what_is_left_and_patience_ends():
    losses = iter([3.0, 2.0, 1.0, 2.0, 2.0, 2.0])
    seen = []
    model = Regression()

    def evaluate():
        seen.append(weights(model))
        return next(losses)

    outcome = trainer(Settings(steps=100, evaluations=50, patience=2), model, evaluate=evaluate).run()
    assert (outcome.steps, outcome.best_step) == (8, 4)
    assert [one.step for one in outcome.evaluations] == [0, 2, 4, 6, 8]
    assert same(weights(model), seen[2])
    assert not same(seen[4], seen[2])


class Constant(nn.Module):
    """A weight of 1 whose gradient is always the same."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, dtype=dtype))

    def forward(self, ids_BT: Tensor) -> Tensor:
        return -(self.weight * torch.ones(8)).sum() / 8


@pytest.mark.parametrize("precision", list(Precision))
def test_many_small_updates_do_not_vanish(precision):
    """A hundred steps of 1e-4: in 16 bits 1 + 1e-4 is 1, and all of them would be lost."""
    model = Constant()
    sgd = torch.optim.SGD(model.parameters(), lr=8e-4)
    Trainer(model, [sgd], batches_of(), Settings(steps=100, final_share=1.0, precision=precision)).run()
    assert model.weight.dtype == torch.float32
    assert model.weight.detach().tolist() == pytest.approx([1.01] * 8, rel=1e-4)


def test_weights_that_are_no_float32_may_not_learn():
    with pytest.raises(UsageError, match="float32"):
        trainer(Settings(steps=1), Constant(torch.float16))


class Spiked(nn.Module):
    """A product that autocast computes in 16 bits; gradients of one step are a million times as large."""

    def __init__(self, spike_at=()):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, 1)
        self.spike_at = spike_at
        self.dtypes = []
        self.calls = 0

    def forward(self, ids_BT: Tensor) -> Tensor:
        size = 1e6 if self.calls in self.spike_at else 1.0
        self.calls += 1
        given = self.linear(ids_BT.float() / 8)
        self.dtypes.append(given.dtype)
        return (given.float().square() * size).mean()


def test_the_scale_backs_off_at_a_spike_and_recovers():
    model = Spiked(spike_at=(10,))
    scale = LossScale(start=2.0**10, growth_steps=8)
    settings = Settings(steps=40, precision=Precision.FP16, scale=scale)
    run = trainer(settings, model)
    outcome = run.run()
    assert set(model.dtypes) == {torch.float16}
    assert outcome.scales[8] == outcome.scales[9] == 2.0**11
    assert outcome.scales[10] == 2.0**10
    assert outcome.scales[18] == 2.0**11
    assert max(outcome.scales) > 2.0**11
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_step_of_a_spike_moves_nothing():
    model = Spiked(spike_at=(0,))
    before = weights(model)
    trainer(Settings(steps=1, precision=Precision.FP16), model).run()
    assert same(before, weights(model))


@pytest.mark.parametrize("precision", list(Precision))
def test_all_precisions_learn_the_same(precision):
    run = trainer(Settings(steps=200, precision=precision))
    assert sum(run.run().losses[-20:]) < 0.2 * 20
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


class Breaking(Regression):
    """From some call on, the second layer gives no numbers."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, ids_BT: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            with torch.no_grad():
                self.second.weight.fill_(math.nan)
        return super().forward(ids_BT)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_place(tmp_path):
    checkpoints = Checkpoints(Journal(tmp_path))
    run = trainer(Settings(steps=20, checkpoint_steps=3), Breaking(at=8), checkpoints=checkpoints)
    with pytest.raises(DivergedError) as error:
        run.run()
    assert error.value.what == "step 8: the loss is not a number; the last good checkpoint is that of step 6"
    assert error.value.where == "second"
    assert all(tensor.isfinite().all() for tensor in checkpoints.read()[1].tensors.values())


class BadGradient(nn.Module):
    """The loss is a number and its gradient is not."""

    def __init__(self):
        super().__init__()
        self.fine, self.bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.bad.square().sum().sqrt() + self.fine.sum()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_gradient_that_is_no_number_names_its_weight(precision):
    settings = Settings(steps=60, precision=precision)
    with pytest.raises(DivergedError, match="gradient is not a number; there is no checkpoint") as error:
        trainer(settings, BadGradient()).run()
    assert error.value.where == "bad"
