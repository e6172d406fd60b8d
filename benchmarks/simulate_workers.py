"""Predicts meta-training on 2 to 1,000 workers: a discrete-event model, fed with measured seconds.

A driver sends theta to workers; each computes the windows of its particles and sends an estimate
back. The driver does one thing at a time. It takes an outer step when estimates of as many
particles as there are have come. Synchronous (`stale=0`): all workers wait for that step. Stale:
a worker goes on at once with the theta of that time; an estimate more than `stale` steps old is
dropped. A worker that fails loses its windows, comes back, and computes others. A window is that of
one particle everywhere below. What is measured goes to `Constants`; a minute:

    python benchmarks/simulate_workers.py docs/images/workers.png   # tables, and the figure
    python benchmarks/simulate_workers.py validate 1=32.6 2=64.2    # measured windows/s by workers
    python benchmarks/simulate_workers.py validate 1=68.6 2=125 window=0.0133 overhead=0.004
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
from lopt.experiment.report.plots import color_of, new_figure, panels, png
from lopt.experiment.runs.files import write_bytes

HOUR = 3600.0
WORKERS, EACH = (2, 5, 10, 20, 50, 100, 200, 500, 1000), (1, 4, 16, 64)
# Fleets: what differs from `Constants`, and arguments of `simulate`.
SLOW: dict[str, Any] = {"speeds": (1.0, 0.5)}  # every other worker
SLOWER: dict[str, Any] = {"speeds": (1.0, 0.25)}
FLEETS: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "alike": ({}, {}),
    "spread 0.3": ({"spread": 0.3}, {}),
    "theta of 1 MB": ({"size": 10**6}, {}),
    "each fails every 10 h": ({"between_failures": 10 * HOUR}, {}),
    "each fails every hour": ({"between_failures": HOUR}, {}),
    "half at 1/2 speed": ({}, SLOW),
    "half at 1/2, split by speed": ({}, SLOW | {"by_speed": True}),
    "half at 1/4 speed": ({}, SLOWER),
    "half at 1/4, split by speed": ({}, SLOWER | {"by_speed": True}),
}
SHOWN = ("alike", "each fails every hour", "half at 1/4 speed", "half at 1/4, split by speed")
COLUMNS = ("windows_per_second", "efficiency", "steps_per_second", "utilisation", "driver")
COLUMNS += ("staleness", "dropped_share", "core_hours", "cost")


@dataclasses.dataclass(frozen=True)
class Constants:
    """What things cost, in seconds unless said otherwise.

    Measured with Ray 2.60 on two cores of an AMD EPYC at 2.5 GHz, workers and driver on one
    machine, theta of 347 weights; a window is a pair of 50 inner steps of the recipe digits. The
    link and the price are those of a common cloud, failures assumed.
    """

    window: float = 30e-3  # one particle's, on a core of speed 1
    spread: float = 0.05  # sigma of the log-normal factor by which a worker's windows differ
    overhead: float = 1e-3  # of a worker, each time
    latency: float = 0.5e-3  # one way
    send: float = 0.3e-3  # of the driver, for each call
    receive: float = 0.8e-3  # of the driver, for each estimate
    take: float = 1.5e-3  # an outer step, and theta put where workers find it
    size: int = 4 * 347  # bytes of theta, and of an estimate
    bandwidth: float = 1.25e9  # bytes per second of the driver's link, and of copies
    between_failures: float = math.inf  # mean of a worker
    restart: float = 5.0  # from a failure until the worker is back
    price: float = 0.04  # dollars per core hour


@dataclasses.dataclass(frozen=True)
class Result:
    """What happened; counts are of windows, each of one particle."""

    windows_per_second: float  # of those that went into an outer step
    efficiency: float  # the same, as a share of what the workers could compute
    steps_per_second: float
    utilisation: float  # the share of workers' time in which they compute, for the bin as well
    driver: float  # the share of its time in which the driver is busy
    staleness: float  # mean age of what was used, in outer steps
    dropped_share: float  # of what came, too old
    core_hours: float  # per 1,000 outer steps, with a core for each worker and for the driver
    cost: float  # dollars per 1,000 outer steps
    sent: int
    used: list[int]  # by worker
    dropped: int
    lost: int  # with a worker that failed
    in_flight: int  # at the end


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
    steps = steps or max(200, 100_000 // workers)
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
    hours = (workers + 1) * free / HOUR / taken * 1000
    return Result(
        windows_per_second=sum(used) / free,
        efficiency=sum(used) / free / (sum(speeds) / constants.window),
        steps_per_second=taken / free,
        utilisation=computing / (workers * free),
        driver=driving / free,
        staleness=ages / sum(used),
        dropped_share=dropped / (dropped + sum(used)),
        core_hours=hours,
        cost=hours * constants.price,
        sent=sent,
        used=used,
        dropped=dropped,
        lost=lost,
        in_flight=sum(shares[worker] for _, worker, _, whole in events if whole),
    )


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
    for workers, rate in measured.items():
        found = simulate(constants or Constants(), workers, particles, stale=stale)
        errors[workers] = 100 * (found.windows_per_second / rate - 1)
        rows.append({"workers": workers, "predicted windows/s": found.windows_per_second})
        rows[-1] |= {"measured": rate, "error, %": errors[workers]}
    report = Report("Prediction and measurement")
    report.table(f"{particles} particles, {mode(stale)}", rows)
    report.show()
    return errors


def mode(stale: int) -> str:
    return f"stale {stale}" if stale else "synchronous"


def fleet(name: str, workers: int, stale: int = 0, each: int = 16) -> Result:
    """Simulates a fleet by its name, with so many particles for each worker."""
    changes, arguments = FLEETS[name]
    constants = dataclasses.replace(Constants(), **changes)
    return simulate(constants, workers, each * workers, stale=stale, **arguments)


def tables() -> Report:
    """Returns the tables of all cases; hours and dollars are those of 1,000 outer steps."""
    report = Report("Meta-training on workers, by simulation")
    for particles, what in ((16, "16 particles for each worker"), (0, "1,000 particles in all")):
        for stale in (0, 2):
            rows = []
            for n in WORKERS:
                found = simulate(Constants(), n, particles * n or 1000, stale=stale)
                cells = {name.replace("_", " "): getattr(found, name) for name in COLUMNS}
                rows.append({"workers": n} | cells)
            report.table(f"{what}, {mode(stale)}", rows)
    rows = []
    for n in WORKERS:
        found = {k: [fleet("alike", n, stale, k).efficiency for stale in (0, 2)] for k in EACH}
        cells = {f"{k} for each": " / ".join(f"{one:.2f}" for one in found[k]) for k in EACH}
        rows.append({"workers": n} | cells)
    report.table("efficiency, synchronous / stale 2", rows)
    for n in (100, 1000):
        rows = []
        for name in FLEETS:
            found = {mode(stale): fleet(name, n, stale) for stale in range(4)}
            cells = {
                one: f"{result.efficiency:.2f}, {sum(result.used[1::2]) / sum(result.used):.2f}"
                for one, result in found.items()
            }
            rows.append({"fleet": name} | cells)
        title = f"{n:,} workers of 16 particles: efficiency, every other worker's share of windows"
        report.table(title, rows)
    rows = []
    for cores in (1, 4, 16):
        machine = dataclasses.replace(Constants(), window=Constants.window / cores)
        found = [simulate(machine, 1000 // cores, 1000, stale=stale) for stale in (0, 2)]
        rates = {
            mode(stale): one.steps_per_second for stale, one in zip((0, 2), found, strict=True)
        }
        rows.append({"cores of a worker": cores, "workers": 1000 // cores} | rates)
    report.table("1,000 cores, 1,000 particles in all: outer steps per second", rows)
    return report


def draw(figure: Any) -> None:
    """Draws windows per second, efficiency of fleets, and what speed costs."""
    rates, fleets, costs = panels(figure, 3, size=(4.6, 3.6))
    for each, color in zip(EACH, ("#9ecae1", "#1f77b4", "#9467bd", "#d62728"), strict=True):
        for stale, style in ((0, "-"), (2, "--")):
            found = [fleet("alike", n, stale, each).windows_per_second for n in WORKERS]
            label = f"{each} for each worker" if not stale else None
            rates.plot(WORKERS, found, style, color=color, label=label)
    ideal = [n / Constants().window for n in WORKERS]
    rates.plot(WORKERS, ideal, ":", color="black", label="nothing but computing")
    labels = {"xlabel": "workers", "ylabel": "windows per second"}
    finish(rates, log="xy", title="By particles; dashed: stale 2", **labels)
    for i, name in enumerate(SHOWN):
        for stale, style in ((0, "-"), (2, "--")):
            found = [fleet(name, n, stale).efficiency for n in WORKERS]
            color = color_of("", i)
            fleets.plot(WORKERS, found, style, color=color, label=None if stale else name)
    finish(fleets, log="x", title="16 for each worker", xlabel="workers", ylabel="efficiency")
    for stale, style in ((0, "-"), (2, "--")):
        found = [simulate(Constants(), n, 1000, stale=stale) for n in WORKERS]
        x, y = [one.steps_per_second for one in found], [one.cost for one in found]
        costs.plot(x, y, style, marker=".", color="#1f77b4", label=mode(stale))
        for n, *place in zip(WORKERS, x, y, strict=True):
            if not stale:
                costs.annotate(str(n), place, (-4, 4), textcoords="offset points", fontsize=7)
    title = "1,000 particles in all, by workers"
    labels = {"xlabel": "outer steps per second", "ylabel": "dollars per 1,000 outer steps"}
    finish(costs, log="xy", title=title, **labels)


def main(*words: str) -> None:
    if words[:1] == ("validate",):
        given = {name: float(value) for name, value in (word.split("=") for word in words[1:])}
        rates = {int(name): rate for name, rate in given.items() if name.isdigit()}
        own = {name: value for name, value in given.items() if not name.isdigit()}
        validate(rates, dataclasses.replace(Constants(), **own))
        return
    tables().show()
    for path in words:
        figure = new_figure(9, 4)
        draw(figure)
        write_bytes(Path(path), png(figure))


if __name__ == "__main__":
    main(*sys.argv[1:])
