"""Where the results of probes go."""

from pathlib import Path

from lopt.experiment.files import check_writable


def folder_of(name: str, out: Path | None, files: tuple[str, ...]) -> Path:
    """Returns where results go: a folder given, or one that holds none yet."""
    if out is not None:
        if out.is_file():
            raise FileExistsError(f"{out} is a file; give a folder with --out.")
        if (out / "run.json").exists():
            raise FileExistsError(
                f"{out} holds a run, whose figures a probe would replace; give another folder "
                "with --out."
            )
        if any((out / file).exists() for file in files):
            raise FileExistsError(f"{out} already holds a probe; give another folder with --out.")
        check_writable(out / files[0])
        return out
    base = Path("probes") / Path(name).stem
    folder, number = base, 2
    while any((folder / file).exists() for file in files):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    check_writable(folder / files[0])
    return folder
