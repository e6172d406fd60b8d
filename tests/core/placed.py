"""Run in a process of its own, with four CPU devices: prints what was found as JSON."""

import json
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt
from lopt.learned import FallBack, MomentFeatures, PerTensorType
from lopt.symbolic import Variable, make_expression, symbolic_optimizer

KEY = jax.random.key(0)
M, G = Variable("m_normalised"), Variable("g_normalised")
SYMBOLIC = make_expression(("multiply", -0.01, ("tanh", ("add", M, G))))
RULES = {
    "small_mlp": lopt.small_mlp((4,)),
    "adafactor_mlp": lopt.adafactor_mlp(),
    "dm": lopt.dm((3,)),
    "rnnprop": lopt.rnnprop("mt+gt+mom5", (3,), 3),
    "symbolic": symbolic_optimizer(SYMBOLIC, MomentFeatures()),
    "per tensor type": PerTensorType(lopt.adafactor_mlp()),
    "Adam": lopt.LearnableAdam(),
    "muon_mlp": lopt.learned.muon_mlp(2),
    "guarded": FallBack(lopt.learned.muon_mlp(2), limit=1e9),
    "velo_small": lopt.velo_small(),
    "hierarchical": lopt.learned.hierarchical(),
}
SPECS = {
    "w": P("x", None),
    "v": P(None, "x"),
    "layers": {"w": P(None, "x", None)},
    "b": P("x"),
    "both": P("x", None),
    "s": P(),
}
SHAPES = {"w": (256, 160), "v": (16, 24), "layers": {"w": (3, 8, 12)}, "b": (16,), "both": (12, 6)}
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def values(index):
    shapes = SHAPES | {"s": ()}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.fold_in(KEY, index), len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True)]
    )


def run(optimizer, params, grads):
    state = optimizer.init(params)
    value = jnp.ones(())
    step = jax.jit(optimizer.update).lower(grads, state, params, value=value).compile()
    for i in range(2):
        bent = jax.tree.map(lambda g, i=i: jnp.sin((i + 1) * g), grads)
        updates, state = step(bent, state, params, value=value)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state, step.as_text()


def place(tree, mesh):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
        tree,
        SPECS,
    )


def distance(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / (1e-6 + np.abs(np.asarray(b)).max()))
        for a, b in pairs
    )


def largest_collective(program):
    """Returns how many numbers the largest collective of a compiled program moves."""
    sizes = [0]
    for line in program.splitlines():
        if found := re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line):
            for shape in re.findall(r"\w+\[([0-9,]*)\]", found[1]):
                sizes.append(int(np.prod([int(n) for n in shape.split(",") if n] or [1])))
    return max(sizes)


def sharded(kind, names):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType[kind],))
    found = {}
    for name in names:
        learned = RULES[name]
        theta = jax.tree.map(lambda w: w * 1.01, learned.init(KEY))
        optimizer = learned.optimizer(theta, 10)
        params, grads = values(0), values(1)
        expected, state, _ = run(optimizer, params, grads)
        ours, placed, program = run(optimizer, place(params, mesh), place(grads, mesh))
        kept = [leaf.sharding.spec for leaf in jax.tree.leaves(placed) if leaf.ndim > 1]
        found[name] = {
            "params": distance(ours, expected),
            "state": distance(placed, state),
            "largest": largest_collective(program),
            "spread": sum("x" in spec for spec in kept) / max(1, len(kept)),
        }
    return found


def nnx():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 5, rngs=rngs)
            self.last = nnx.Linear(5, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.hidden(x)))

    x = jax.random.normal(KEY, (32, 3))
    y = jnp.sin(x.sum(1, keepdims=True))
    learned = lopt.LearnableAdam(0.05)
    found = {}
    for name, rule in (("LearnableAdam", learned), ("adafactor_mlp", lopt.adafactor_mlp())):
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, rule.optimizer(rule.init(KEY)), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        losses = [float(step(model, optimizer)) for _ in range(20)]
        plain = Net(nnx.Rngs(0))
        graph, params = nnx.split(plain)
        tx = rule.optimizer(rule.init(KEY))
        state = tx.init(params)

        def loss(params, graph=graph):
            return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

        @jax.jit
        def plain_step(params, state, tx=tx, loss=loss):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(20):
            params, state = plain_step(params, state)
        ours = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        found[name] = {
            "losses": [losses[0], losses[-1]],
            "params": distance(ours, nnx.to_pure_dict(params)),
        }
    return found


def orbax():
    import orbax.checkpoint as ocp

    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    learned = RULES["dm"]
    optimizer = learned.optimizer(learned.init(KEY))
    _, state, _ = run(optimizer, place(values(0), mesh), place(values(1), mesh))
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
        saver.save(f"{folder}/state", state)
        saver.wait_until_finished()
        back = saver.restore(f"{folder}/state", state)
    same = jax.tree.map(
        lambda a, b: bool(jnp.array_equal(a, b)) and a.sharding == b.sharding, back, state
    )
    return {"same": all(jax.tree.leaves(same))}


def specs():
    """Places a fresh state by the specs of params, with `optax.tree_map_params`."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    learned = lopt.rnnprop(hidden=(3,), dense=3)
    optimizer = learned.optimizer(learned.init(KEY))
    params = values(0)
    state = optax.tree_map_params(
        optimizer,
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, P(None, *spec))),
        optimizer.init(params),
        SPECS,
    )
    like = optimizer.init(place(params, mesh))
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, like)
    return {"same": all(jax.tree.leaves(same)), "leaves": len(jax.tree.leaves(state))}


KINDS = {
    "auto": lambda: sharded("Auto", ["dm", "Adam"]),
    "explicit": lambda: sharded("Explicit", ["adafactor_mlp"]),
    "auto, every rule": lambda: sharded("Auto", RULES),
    "explicit, every rule": lambda: sharded("Explicit", RULES),
    "nnx": nnx,
    "orbax": orbax,
    "specs": specs,
}

if __name__ == "__main__":
    print(json.dumps({what: KINDS[what]() for what in sys.argv[1:]}))
