"""From a model, a cluster and a workload to the best plan: every setting, the most promising first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmopt.errors import BudgetError
from llmopt.partition.by_class import least_possible
from llmopt.partition.candidate import Candidate, metric_of, tolls_of, worth
from llmopt.partition.cluster import Cluster, Device
from llmopt.partition.finish import finished
from llmopt.partition.machine import Metric
from llmopt.partition.obstacles import broken, explain
from llmopt.partition.orders import PROVEN
from llmopt.partition.own_split import own_split
from llmopt.partition.plan import Plan, Workload
from llmopt.partition.promises import Promise
from llmopt.partition.purchases import answer_for_cost
from llmopt.partition.settings import Setting, Settings
from llmopt.partition.target import Answer, answer_for_metric
from llmopt.partition.wanted import Model, Wanted


@dataclass(kw_only=True, eq=False)
class Search:
    """The search for one model on one cluster under one workload."""

    model: Model
    cluster: Cluster
    workload: Workload
    wanted: Wanted

    def plan(self) -> Plan:
        """The best plan.

        Raises:
            UsageError: what was asked for contradicts the model or the cluster.
            BudgetError: no plan fits, or none keeps the promises; with the nearest change.
        """
        settings = Settings(model=self.model, cluster=self.cluster, workload=self.workload, wanted=self.wanted)
        devices = settings.devices()
        degrees = settings.degrees(devices)
        if self.wanted.split is not None:
            candidate = own_split(settings, devices, self.wanted.split)
            return finished(settings, candidate, devices, self._bound_beside(devices))
        answer = self._best(settings, devices, degrees)
        if answer.candidate is None:
            raise self._obstacle(settings, devices, degrees) if math.isinf(answer.bound) else _not_found()
        return finished(settings, answer.candidate, devices, answer.bound)

    def _best(self, settings: Settings, devices: Sequence[Device], degrees: Sequence[int]) -> Answer:
        best, bound = Answer(candidate=None, bound=math.inf), math.inf
        objective = self.wanted.objective
        for lowest, setting in self._ordered(settings, devices, degrees):
            value = worth(best.candidate, objective, self.cluster) if best.candidate is not None else math.inf
            if lowest >= value * (1 - PROVEN):
                break
            answer = self._answer(setting, value)
            bound = min(bound, max(answer.bound, lowest))
            if answer.candidate is not None and worth(answer.candidate, objective, self.cluster) < value:
                best = answer
        return Answer(candidate=best.candidate, bound=bound)

    def _ordered(
        self, settings: Settings, devices: Sequence[Device], degrees: Sequence[int]
    ) -> list[tuple[float, Setting]]:
        """Settings, and what nothing in them is below: once the best is below that, the rest need not be looked at."""
        metric = metric_of(self.wanted.objective)
        every = list(settings.each(devices, degrees))
        if metric is None:
            return [(0.0, setting) for setting in every]
        bounds = [least_possible(one.machine, one.devices, metric) * one.machine.unit(metric) for one in every]
        return sorted(zip(bounds, every, strict=True), key=lambda pair: pair[0])

    def _answer(self, setting: Setting, value: float) -> Answer:
        in_order, objective, promises = self.wanted.order is not None, self.wanted.objective, self.wanted.promises
        metric = metric_of(objective)
        if metric is not None:
            return answer_for_metric(setting, metric, promises, in_order=in_order, below=value)
        tolls = tolls_of(objective, self.cluster, setting.devices)
        return answer_for_cost(setting, tolls, promises, in_order=in_order, below=value)

    def _bound_beside(self, devices: Sequence[Device]) -> float | None:
        """What the best plan for the same devices takes, or can at best: for stages that somebody gives."""
        if metric_of(self.wanted.objective) is None:
            return None
        open_search = replace(self, wanted=replace(self.wanted, split=None, promises=()))
        settings = Settings(model=self.model, cluster=self.cluster, workload=self.workload, wanted=open_search.wanted)
        bound = open_search._best(settings, devices, settings.degrees(devices)).bound
        return bound if math.isfinite(bound) else None

    def _obstacle(self, settings: Settings, devices: Sequence[Device], degrees: Sequence[int]) -> BudgetError:
        """Why there is no plan: memory, one promise by itself, or all of them together."""
        objective = metric_of(self.wanted.objective) or "tpot"
        if self._reached(objective, ()) is None:
            return explain(settings, devices, degrees)
        for promise in self.wanted.promises:
            nearest = self._reached(promise.metric, ())
            if nearest is None or not promise.kept(nearest.predicted):
                return broken([promise], nearest)
        *others, last = self.wanted.promises
        return broken([*others, last], self._reached(last.metric, tuple(others)))

    def _reached(self, metric: Metric, promises: tuple[Promise, ...]) -> Candidate | None:
        """The best plan for a metric, with some of the promises."""
        search = replace(self, wanted=replace(self.wanted, objective=metric, promises=promises))
        settings = Settings(model=self.model, cluster=self.cluster, workload=self.workload, wanted=search.wanted)
        devices = settings.devices()
        return search._best(settings, devices, settings.degrees(devices)).candidate


def _not_found() -> BudgetError:
    what = "no plan was found, and there are too many ways to use the devices to be sure that there is none"
    return BudgetError(what, hint="give an order of the devices with --order, or a cluster file with fewer of them")
