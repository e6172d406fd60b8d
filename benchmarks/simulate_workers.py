"""Predicts meta-training on 2 to 1,000 workers: a discrete-event model, fed with measured seconds.

A driver sends theta to workers; each computes the windows of its particles and sends an estimate
back. The driver does one thing at a time. It takes an outer step when estimates of as many
particles as there are have come. Synchronous (`stale=0`): all workers wait for that step. Stale:
a worker goes on at once with the theta of that time; an estimate more than `stale` steps old is
dropped. A worker that fails loses its windows, comes back, and computes others. A window is that of
one particle everywhere below. What is measured goes to `Constants`; a minute:

    python benchmarks/simulate_workers.py docs/images/workers.png   # tables, and the figure
    python benchmarks/simulate_workers.py validate 1=32.6 2=64.2    # measured windows/s by workers
"""

import dataclasses
import heapq
import itertools
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt.experiment.report import Report, finish
from lopt.experiment.report.plots import new_figure, png
from lopt.experiment.runs.files import write_bytes

WORKERS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)
HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Constants:
    """What things cost, in seconds unless said otherwise.

    Measured with Ray 2.60 on two cores of an AMD EPYC at 2.5 GHz, workers and driver on one machine,
    theta of 347 weights; windows are pairs of 50 inner steps of the recipe digits. Bandwidth and
    price are those of a common cloud, not measured.
    """

    window: float = 30e-3  # one particle's, on a core of speed 1
    spread: float = 0.05  # sigma of the log-normal factor by which a worker's windows differ
    overhead: float = 1e-3  # of a worker, each time
    latency: float = 0.6e-3  # one way
    send: float = 0.3e-3  # of the driver, for each call
    receive: float = 0.5e-3  # of the driver, for each estimate
    take: float = 1.5e-3  # an outer step, and theta put where workers find it
    size: int = 4 * 347  # bytes of theta, and of an estimate
    bandwidth: float = 1.25e9  # bytes per second of the driver's link, and of copies
    between_failures: float = math.inf  # mean of a worker
    restart: float = 5.0  # from a failure until the worker is back
    price: float = 0.04  # dollars per core hour


@dataclasses.dataclass(frozen=True)
class Result:
    """What happened; everything is counted in windows, each of one particle."""

    workers: int
    steps: int
    seconds: float
    sent: int
    used: tuple[int, ...]  # by worker
    dropped: int  # too old
    lost: int  # with a worker that failed
    in_flight: int  # at the end
    ages: int  # of those used, in outer steps, added up
    computing: float  # seconds of all workers
    driving: float  # seconds of the driver
    capacity: float  # windows per second if workers did nothing but compute
    price: float

    @property
    def windows_per_second(self) -> float:
        """Windows that went into an outer step, per second."""
        return sum(self.used) / self.seconds

    @property
    def steps_per_second(self) -> float:
        """Outer steps per second."""
        return self.steps / self.seconds

    @property
    def stale_share(self) -> float:
        """The share of windows that came too late."""
        return self.dropped / (self.dropped + sum(self.used))

    @property
    def staleness(self) -> float:
        """How many outer steps old what was used is, on average."""
        return self.ages / sum(self.used)

    @property
    def utilisation(self) -> float:
        """The share of workers' time in which they compute, for the bin as well."""
        return self.computing / (self.workers * self.seconds)

    @property
    def efficiency(self) -> float:
        """Windows per second as a share of what the workers could compute."""
        return self.windows_per_second / self.capacity

    @property
    def load(self) -> float:
        """The share of its time in which the driver is busy."""
        return self.driving / self.seconds

    @property
    def core_hours(self) -> float:
        """Core hours of workers and driver, a core each, per 1,000 outer steps."""
        return (self.workers + 1) * self.seconds / self.steps * 1000 / HOUR

    @property
    def cost(self) -> float:
        """Dollars per 1,000 outer steps."""
        return self.core_hours * self.price


def split(particles: int, speeds: Sequence[float]) -> list[int]:
    """Returns how many particles each worker gets, at least one, so that all end early."""
    if particles < len(speeds):
        raise ValueError(f"particles={particles} must be at least one for each of {len(speeds)}.")
    shares = [1] * len(speeds)
    ends = [(2 / speed, i) for i, speed in enumerate(speeds)]  # if it gets one more
    heapq.heapify(ends)
    for _ in range(particles - len(speeds)):
        i = ends[0][1]
        shares[i] += 1
        heapq.heapreplace(ends, ((shares[i] + 1) / speeds[i], i))
    return shares


def simulate(
    constants: Constants,
    workers: int,
    particles: int,
    *,
    stale: int = 0,
    speeds: Sequence[float] = (1.0,),
    by_speed: bool = False,
    steps: int | None = None,
    seed: int = 0,
) -> Result:
    """Simulates so many outer steps of a meta-batch of `particles`, split among workers.

    Args:
        constants: what things cost.
        workers: how many.
        particles: of all workers together.
        stale: how many outer steps old an estimate may be; 0 is synchronous.
        speeds: of workers, over and over again. A family whose tasks cost c times as much, if a
            worker has no others, is a speed of 1/c.
        by_speed: fast workers get more particles; otherwise all get as many.
        steps: outer steps; by default 200, or more for few workers.
        seed: of spread and failures.
    """
    generator = random.Random(seed)
    steps = steps or max(200, 40_000 // workers)
    speeds = list(itertools.islice(itertools.cycle(speeds), workers))
    shares = split(particles, speeds if by_speed else [1.0] * workers)
    transfer = constants.size / constants.bandwidth
    send, receive = constants.send + transfer, constants.receive + transfer

    def lifetime() -> float:
        return constants.between_failures * generator.expovariate(1.0)

    fails = [lifetime() for _ in range(workers)]
    events: list[tuple[float, int, int, bool]] = []  # when who comes, of which step, with a result?
    starting, waiting = list(range(workers)), []
    free = driving = computing = 0.0  # until when the driver is busy; seconds of driver, workers
    taken = gathered = sent = dropped = lost = ages = 0
    used = [0] * workers
    while taken < steps:
        for worker in starting:
            free += send
            driving += send
            sent += shares[worker]
            begin = free + constants.latency
            while fails[worker] < begin:  # while it was idle
                back = fails[worker] + constants.restart
                begin, fails[worker] = max(begin, back), back + lifetime()
            factor = math.exp(constants.spread * (generator.gauss(0, 1) - constants.spread / 2))
            seconds = shares[worker] * constants.window / speeds[worker] * factor
            end = back = begin + constants.overhead + seconds
            if not (whole := end <= fails[worker]):
                lost += shares[worker]
                end, back = fails[worker], fails[worker] + constants.restart
                fails[worker] = back + lifetime()
            computing += end - begin
            heapq.heappush(events, (back + constants.latency, worker, taken, whole))
        now, worker, step, whole = heapq.heappop(events)
        free = max(free, now)
        starting = [worker]
        if not whole:
            continue
        free += receive
        driving += receive
        if taken - step > stale:
            dropped += shares[worker]
        else:
            used[worker] += shares[worker]
            ages += (taken - step) * shares[worker]
            gathered += shares[worker]
        if gathered >= particles:
            taken, gathered = taken + 1, 0
            free += constants.take
            driving += constants.take
        if not stale:
            waiting.append(worker)
            starting, waiting = ([], waiting) if gathered else (waiting, [])
    in_flight = sum(shares[worker] for _, worker, _, whole in events if whole)
    counts = sent, tuple(used), dropped, lost, in_flight, ages
    seconds = computing, driving
    capacity = sum(speeds) / constants.window
    return Result(workers, taken, free, *counts, *seconds, capacity, constants.price)


def validate(
    measured: Mapping[int, float],
    constants: Constants | None = None,
    particles: int = 16,
    stale: int = 0,
) -> dict[int, float]:
    """Prints predicted beside measured windows per second, by workers; returns errors in percent.

    Args:
        measured: windows of one particle per second, which are outer steps per second times
            particles.
        constants: what things cost; by default those of this file.
        particles: of all workers together.
        stale: as of `simulate`.
    """
    rows, errors = [], {}
    for workers, found in measured.items():
        result = simulate(constants or Constants(), workers, particles, stale=stale)
        errors[workers] = 100 * (result.windows_per_second / found - 1)
        rows.append(
            {
                "workers": workers,
                "predicted windows/s": result.windows_per_second,
                "measured": found,
                "error, %": errors[workers],
            }
        )
    report = Report("Prediction and measurement")
    report.table(f"{particles} particles", rows)
    report.show()
    return errors


# Fleets that are not alike: constants, and arguments of `simulate`.
SLOW: dict[str, Any] = {"speeds": (1.0, 0.5)}  # every other worker
SLOWER: dict[str, Any] = {"speeds": (1.0, 0.25)}
FLEETS: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "alike": ({}, {}),
    "spread 0.3": ({"spread": 0.3}, {}),
    "each fails every 10 h": ({"between_failures": 10 * HOUR}, {}),
    "each fails every hour": ({"between_failures": HOUR}, {}),
    "half at 1/2 speed": ({}, SLOW),
    "half at 1/2, split by speed": ({}, SLOW | {"by_speed": True}),
    "half at 1/4 speed": ({}, SLOWER),
    "half at 1/4, split by speed": ({}, SLOWER | {"by_speed": True}),
}


def fleet(name: str, workers: int, stale: int = 0, each: int = 16) -> Result:
    """Simulates a fleet by its name, with so many particles for each worker."""
    changes, arguments = FLEETS[name]
    constants = dataclasses.replace(Constants(), **changes)
    return simulate(constants, workers, each * workers, stale=stale, **arguments)


def row(result: Result) -> dict[str, Any]:
    """Returns cells of a table."""
    return {
        "windows/s": result.windows_per_second,
        "efficiency": result.efficiency,
        "outer steps/s": result.steps_per_second,
        "utilisation": result.utilisation,
        "driver": result.load,
        "staleness": result.staleness,
        "dropped": result.stale_share,
        "core hours": result.core_hours,
        "$": result.cost,
    }


def report() -> Report:
    """Returns the tables; core hours and dollars are those of 1,000 outer steps."""
    found = Report("Workers by simulation")
    for each in (1, 4, 16, 64):
        for stale in (0, 2):
            results = {n: simulate(Constants(), n, each * n, stale=stale) for n in WORKERS}
            title = f"{each} particles for each worker, {f'stale {stale}' if stale else 'synchronous'}"
            found.table(title, [{"workers": n} | row(result) for n, result in results.items()])
    for stale in (0, 2):
        results = {n: simulate(Constants(), n, 1000, stale=stale) for n in WORKERS}
        title = f"1,000 particles in all, {f'stale {stale}' if stale else 'synchronous'}"
        found.table(title, [{"workers": n} | row(result) for n, result in results.items()])
    for workers in (100, 1000):
        for stale in (0, 1, 2, 3):
            rows = [{"fleet": name} | row(fleet(name, workers, stale)) for name in FLEETS]
            title = f"{workers:,} workers of 16 particles, {f'stale {stale}' if stale else 'synchronous'}"
            found.table(title, rows)
    return found
