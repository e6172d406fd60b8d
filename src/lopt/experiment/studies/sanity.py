"""`lopt sanity`: known optimizers, distilled from raw gradients."""

from lopt import symbolic
from lopt.experiment.report import Cell, Report, progress
from lopt.experiment.settings import SanitySettings
from lopt.symbolic.sanity import SUITE, run_sanity


def sanity(settings: SanitySettings) -> Report:
    """Distils known optimizers, and says how well they were found."""
    with progress("distilling", len(SUITE)) as at:
        found = run_sanity(seed=settings.seed, progress=lambda done, _, what: at(done, what))
    weighted = symbolic.Complexity(weighted=True)
    rows: list[dict[str, Cell]] = [
        {
            "optimizer": row.name,
            "held-out R2": f"{row.r_squared:.5f}",
            "asked": row.required,
            "nodes": row.nodes,
            "weight x variable as one": int(weighted(row.expression)),
            "CPU s": row.seconds,
            "equation": symbolic.to_text(row.expression, 3)[:60],
        }
        for row in found
    ]
    report = Report("Known optimizers, distilled from raw gradients")
    report.table(report.title, rows)
    return report
