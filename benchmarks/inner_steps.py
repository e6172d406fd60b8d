"""Cost of an inner training step: Adam against the learned rules. Run by hand: no arguments.

Each row is a process of its own; ratios are against Adam on the same network.
"""

import json
import sys

import jax
import numpy as np
import optax
from common import in_own_process, measure, show

import lopt

NETWORKS = {
    "8x8 MLP (2,410 weights)": (8, (32,), 200),
    "MLP of 992,960 weights": (28, (800, 450), 5),
}
OPTIMIZERS = ("Adam", "small_mlp", "adafactor_mlp")


def row(network: str, name: str) -> dict:
    size, widths, num_steps = NETWORKS[network]
    images = np.random.default_rng(0).integers(0, 256, (1500, size, size, 1), np.uint8)
    data = lopt.tasks.image_data(images, np.arange(1500) % 10, None, None, 10, size)
    task = lopt.tasks.mlp_classification(data, widths, batch_size=128)
    key = jax.random.key(0)
    if name == "Adam":
        optimizer = optax.adam(1e-3)
    else:
        learned = getattr(lopt, name)()
        optimizer = learned.optimizer(learned.init(key))
    state = lopt.start(task, optimizer, task.init(key), key)
    result = measure(
        lopt.unroll,
        (task, optimizer, state, num_steps),
        lambda arguments, outputs: (*arguments[:2], outputs[0], arguments[3]),
    )
    return result | {"microseconds": 1e6 * result["seconds"] / num_steps}


def main() -> None:
    rows = []
    for network in NETWORKS:
        results = {name: in_own_process(__file__, network, name) for name in OPTIMIZERS}
        for name, result in results.items():
            ratio = result["microseconds"] / results["Adam"]["microseconds"]
            rows.append(
                [
                    f"{network}, {name}",
                    f"{result['microseconds']:,.0f}",
                    f"{ratio:.2f}",
                    f"{result['trace']:.1f} + {result['compile']:.1f}",
                    f"{result['temporary_mb']:.0f}",
                    f"{result['mb_beyond_process']:.0f}",
                ]
            )
    headings = ["network, optimizer", "µs a step", "x Adam", "trace + compile s"]
    show("Inner steps", [*headings, "temporary MB", "MB beyond process"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(row(*sys.argv[2:])))
    else:
        main()
