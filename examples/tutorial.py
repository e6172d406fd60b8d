"""From a task to a trained optimizer; on Fashion-MNIST if its files are there, else digits."""

import jax
import jax.numpy as jnp
import optax

import lopt
from lopt.experiment.data.datasets import available

DATA = "fashion_mnist" if available("fashion_mnist") else "digits"
HIDDEN, BATCH_SIZE = 32, 128
STEPS, LEARNING_RATE, DECAY = 1000, 0.1, 0.9
INNER_STEPS, OUTER_STEPS, OUTER_LEARNING_RATE = 4, 2000, 1e-2


class SmallImages(lopt.AbstractTask):
    """A task: a perceptron with one hidden layer classifies images of 8x8 pixels."""

    data: lopt.tasks.Data
    seen: lopt.tasks.Rows | None = None  # if given, the batch of every step

    def init(self, key):
        one, two = jax.random.split(key)
        first = jax.random.truncated_normal(one, -2, 2, (64, HIDDEN)) / 64**0.5
        second = jax.random.truncated_normal(two, -2, 2, (HIDDEN, 10)) / HIDDEN**0.5
        return {"w1": first, "b1": jnp.zeros(HIDDEN), "w2": second, "b2": jnp.zeros(10)}

    def batch(self, key, split="train"):  # everything that is random about one step
        return self.seen or self.data.split(split).draw(key, BATCH_SIZE)

    def loss(self, params, batch):  # deterministic
        images, labels = batch.arrays
        hidden = jax.nn.relu(images.reshape(-1, 64) @ params["w1"] + params["b1"])
        logits = hidden @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def momentum(learning_rate, decay):
    """An optimizer of one's own is an Optax optimizer: two functions."""

    def update(grads, velocity, params=None):
        velocity = jax.tree.map(lambda v, g: decay * v + g, velocity, grads)
        return jax.tree.map(lambda v: -learning_rate * v, velocity), velocity

    return optax.GradientTransformation(optax.tree.zeros_like, update)


class LossAfterSteps(lopt.AbstractTask):
    """A task whose parameters are theta: the loss that a few steps on one batch arrive at."""

    task: SmallImages
    learned: lopt.AbstractLearnedOptimizer

    def init(self, key):
        return self.learned.init(key)

    def batch(self, key, split="train"):  # a new network, and the images that it sees
        init_key, batch_key = jax.random.split(key)
        return self.task.init(init_key), self.task.batch(batch_key, split)

    def loss(self, theta, batch):
        (params, images), optimizer = batch, self.learned.optimizer(theta)
        task = SmallImages(self.task.data, images)
        state = lopt.start(task, optimizer, params, jax.random.key(0))
        state, _ = lopt.unroll(task, optimizer, state, INNER_STEPS)
        return task.loss(state.params, images)


def main(data=DATA):
    key, task = jax.random.key(0), SmallImages(lopt.load_images(data))

    def train(task, optimizer, steps, record=lopt.loss_of):
        state = lopt.start(task, optimizer, task.init(key), key)
        return lopt.unroll(task, optimizer, state, steps, record=record)[1]

    # 1. Train a network: a task, an Optax optimizer, the loop.
    sgd = train(task, optax.sgd(LEARNING_RATE), STEPS)
    print(f"{data}, SGD: loss {sgd[0]:.3f} -> {sgd[-100:].mean():.3f} (mean of 100 steps)")
    # 2. With an optimizer of one's own.
    own = train(task, momentum(LEARNING_RATE, DECAY), STEPS)
    print(f"momentum: loss {own[0]:.3f} -> {own[-100:].mean():.3f}")
    # 3. Differentiate through training: where should the learning rate of Adam go?
    learned = lopt.LearnableAdam(learning_rate=1e-3)
    meta_task, theta = LossAfterSteps(task, learned), learned.init(key)
    slope = jax.jit(jax.grad(meta_task.loss))(theta, meta_task.batch(key))["learning_rate"]
    print(f"d loss / d log learning rate = {slope:.4f}")

    # 4. Train the optimizer: the same loop, with theta for the parameters.
    def loss_and_rate(step):
        return step.loss, learned.hyperparameters(step.params)["learning_rate"]

    meta, rates = train(meta_task, optax.adam(OUTER_LEARNING_RATE), OUTER_STEPS, loss_and_rate)
    print(f"meta-training: loss {meta[:20].mean():.3f} -> {meta[-500:].mean():.3f} (mean of 500)")
    print(f"learned rate: {rates[0]:.4f} -> {rates[-1]:.4f}")
    return {"sgd": sgd, "own": own, "slope": slope, "meta": meta, "rates": rates}


if __name__ == "__main__":
    main()
