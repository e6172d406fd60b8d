"""What every test shares."""

import gc
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_end_with_their_module() -> Iterator[None]:
    """Thousands of compiled programs kept alive exhaust the process's memory mappings."""
    yield
    jax.clear_caches()
    gc.collect()
