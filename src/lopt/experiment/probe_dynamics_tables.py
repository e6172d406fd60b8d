"""The tables of `lopt probe dynamics`, as texts: the terminal and the page have the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Grid = tuple[str, Sequence[str], list[list[str]]]


def tables_of(numbers: dict[str, Any]) -> dict[str, Grid]:
    """Returns title, headings and rows of each table, from what goes into the JSON."""
    return {
        "courses": _courses(numbers),
        "alignment": _alignment(numbers),
        "noise": _noise(numbers),
        "valley": _valley(numbers),
        "features": _features(numbers),
    }


def _courses(numbers: dict[str, Any]) -> Grid:
    """Returns title, headings and rows."""
    first, *_, last = numbers["shown_steps"]
    headings = (
        "optimizer",
        "rate",
        "final loss",
        f"largest |u|, step {first}",
        f"step {last}",
        "relative step",
        "effective rate",
    )
    rows = []
    for one in numbers["optimizers"]:
        edge = "*" if one["learning_rate_at_edge_of_grid"] else ""
        largest = one["largest_update"]
        rows.append(
            [
                one["optimizer"],
                "-" if one["learning_rate"] is None else f"{one['learning_rate']:.2g}{edge}",
                _text(one["final_loss"], ".4f"),
                _number(largest[0], ".2g"),
                _number(largest[-1], ".2g"),
                _number(one["median_relative_step"], ".2g"),
                _number(one["median_effective_rate"], ".2g"),
            ]
        )
    title = f"Training ({numbers['steps']} steps, {numbers['seeds']} seeds; * at the grid's edge)"
    return title, headings, rows


def _alignment(numbers: dict[str, Any]) -> Grid:
    rows = [
        [
            name,
            *(_text(one["cosine"][when], ".3f") for when in ("first", "mean", "last")),
            *(_text(one["relative"][when], ".3g") for when in ("first", "mean", "last")),
        ]
        for name, one in numbers["alignment"].items()
    ]
    headings = ("reference", "cosine, first", "mean", "last", "|u| / |ref|, first", "mean", "last")
    return "The learned optimizer against references, on its own path", headings, rows


def _noise(numbers: dict[str, Any]) -> Grid:
    rows = []
    for one in numbers["optimizers"]:
        for moment in one["noise"]:
            gradients, updates = moment["gradients"], moment["updates"]
            rows.append(
                [
                    one["optimizer"],
                    str(moment["step"]),
                    *(_text(noise["tail_index"], ".2f") for noise in (gradients, updates)),
                    *(
                        _number(noise[name]["mean"], ".2g")
                        for name in ("trace", "top_eigenvalue")
                        for noise in (gradients, updates)
                    ),
                ]
            )
    headings = ("optimizer", "step", "tail g", "tail u", "trace g", "trace u", "top g", "top u")
    return "Noise of gradients (g) and updates (u)", headings, rows


def _valley(numbers: dict[str, Any]) -> Grid:
    rows = []
    for one in numbers["optimizers"]:
        valley, signals = one["valley"], one["signals"]
        if valley is None or signals is None:
            continue
        rate = valley["learning_rate"]
        rows.append(
            [
                one["optimizer"],
                "-" if rate is None else f"{rate:.2g}",
                _number(valley["median_drift"], ".2g"),
                _number(valley["largest_change_of_sum"], ".1e"),
                _number(valley["median_oddness_defect"], ".1e"),
                _number(valley["median_reflection_defect"], ".1e"),
                _number(valley["largest_final_loss"], ".1e"),
                _number(signals["steps_to_half_of_impulse"], "d"),
            ]
        )
    headings = (
        "optimizer",
        "rate",
        "|drift|",
        "|change of x+y|",
        "oddness",
        "reflection",
        "final loss",
        "impulse half after",
    )
    return "In the valley (x - y)^2 / 2, and after an impulse (steps)", headings, rows


def _features(numbers: dict[str, Any]) -> Grid:
    rows = [
        [
            one["feature"],
            *(_number(one[name], ".2g") for name in ("swing", "slope", "spread")),
            "-" if one["mean"] is None else f"{np.ptp(one['mean']):.2g}",
        ]
        for one in numbers["features"][:12]
    ]
    headings = ("feature", "swing", "mean slope", "spread", "range of the mean response")
    return "What moves the learned rule's updates most", headings, rows


def _text(value: dict[str, float | None], form: str) -> str:
    error = value["standard_error"]
    return _number(value["mean"], form) + ("" if error is None else f" ± {error:.1g}")


def _number(value: Any, form: str) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:{form}}"
