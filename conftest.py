"""How tests run: 64-bit, strict about dtypes and ranks, with a compilation cache."""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Most of the time goes into compiling programs that run once: better fast than optimised.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
# Half the time of the generations that have it; the others refuse the flag.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
# Recipes that tests run are noted there, and not among those of the user.
os.environ.setdefault("LOPT_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "lopt"))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parent

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _shared(name: str) -> Path | None:
    folder = ROOT.parent / "shared" / name
    return folder if folder.is_dir() else None


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Strict dtype promotion, but where a test is marked as going through Optax's Adam.

    Optax raises a float decay to an integer count, which strict promotion refuses.
    """
    relaxed = request.node.get_closest_marker("standard_promotion") is not None
    relaxed = relaxed or isinstance(request.node, pytest.DoctestItem)
    with jax.numpy_dtype_promotion("standard" if relaxed else "strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Frees compiled programs between modules before they use up a process's 65,530 memory maps.

    Freeing takes most of a second, and what modules share is compiled anew: not after each.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers that independent implementations produced."""
    folder = _shared("golden")
    if folder is None:
        pytest.skip("there is no folder ../shared/golden beside the checkout")
    return folder


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of weights that authors published, and of what their own code does with them."""
    folder = _shared("weights")
    if folder is None:
        pytest.skip("there is no folder ../shared/weights beside the checkout")
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data in the official file formats."""
    configured = os.environ.get("LOPT_DATA_DIR")
    folder = Path(configured) if configured else _shared("data")
    if folder is None or not folder.is_dir():
        pytest.skip("LOPT_DATA_DIR is not set and there is no ../shared/data beside the checkout")
    return folder
