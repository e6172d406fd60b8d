"""The published large task: a rule's constants tuned on ResNet-50, on images like CIFAR-10's."""

import jax
import numpy as np
import pytest

import lopt
from lopt.experiment.data.datasets import CIFAR_FILES
from lopt.experiment.runs.files import read_lines
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import train as meta_train
from lopt.symbolic import Variable, make_expression, symbolic_optimizer


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_two_steps_of_tuning_on_resnet50(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).integers(0, 256, (20, 3073)).astype(np.uint8)
    rows[:, 0] %= 10
    (tmp_path / "cifar10").mkdir()
    for name in CIFAR_FILES["cifar10"]:
        (tmp_path / "cifar10" / name).write_bytes(rows.tobytes())
    monkeypatch.setenv("LOPT_DATA_DIR", str(tmp_path))
    rule = make_expression(("multiply", -0.01, ("tanh", Variable("momentum_0.9"))))
    learned = symbolic_optimizer(rule, lopt.learned.MomentFeatures(("momentum_0.9",)))
    lopt.save(tmp_path / "rule.safetensors", learned, learned.init(jax.random.key(0)))
    settings = (f"start={tmp_path / 'rule.safetensors'}", "task=cifar10_resnet50")
    settings += ("tensor_types=True", "batch_size=2", "horizon=2", "truncation=1")
    settings += ("particles=1", "outer_steps=2", "seeds=0")
    theta = meta_train(Run.create(tmp_path / "run", "transfer", settings), show_progress=False)
    assert all(line["finite"] for line in read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert 0 < abs(float(theta["log_multipliers"]["kernel"])) < 0.1
