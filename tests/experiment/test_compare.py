"""`lopt compare`: designs meta-trained alike."""

import numpy as np
import pytest

from lopt.experiment.runs.run import Run
from lopt.experiment.runs.settings import CompareSettings
from lopt.experiment.runs.sweep import compare_designs

# ES is traced and compiled in half the time of PES.
SMALL = ("outer_steps=4", "horizon=4", "estimator=es", "particles=1", "hidden=3", "batch_size=4")


@pytest.mark.slow
@pytest.mark.standard_promotion  # Optax's Adam, as the outer optimizer
def test_a_comparison_has_a_row_for_each_design_and_goes_on(tmp_path):
    settings = CompareSettings(("small_mlp", "dm"), settings=(*SMALL, "datasets=()"), seeds=2)
    report = compare_designs(tmp_path, settings)
    rows = {row["design"]: row for row in report.parts[0].rows}
    assert {name: row["weights"] for name, row in rows.items()} == {
        "small_mlp": 1762,
        "dm": 5141,
    }
    # Six momenta in 64 bits for each parameter, besides one count of steps.
    assert rows["small_mlp"]["state bytes per parameter"] == pytest.approx(48, abs=0.1)
    logs = [Run(tmp_path / f"small_mlp-{seed}").log["meta_loss"] for seed in range(2)]
    assert not np.array_equal(*logs)
    end = np.mean([log[-1] for log in logs])
    assert rows["small_mlp"]["outer loss at the end"].mean == pytest.approx(end)
    # What is trained is not trained again: it took as long.
    assert compare_designs(tmp_path, settings).parts[0].rows == report.parts[0].rows
    with pytest.raises(ValueError, match="other settings; give another with --out"):
        compare_designs(tmp_path, CompareSettings(("small_mlp",), settings=SMALL[1:]))


def test_designs_that_there_are_not_are_named_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="optimizer=velo2 must be one of adafactor_mlp, "):
        compare_designs(tmp_path, CompareSettings(("velo2", "small_mlp"), settings=SMALL))
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="needs the name of a design"):
        CompareSettings(())
