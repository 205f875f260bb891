"""One small world for all integration tests, with its index built."""

import os

import pytest

from tests.command_line import ok
from tests.small_world import World

# Before torch is imported: a test's results must not depend on the number of cores, nor on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Read-only for the tests: what they make goes into their own folders."""
    made = World.make(tmp_path_factory.mktemp("world"))
    ok("index", made.index, "--artifacts", made.artifacts)
    return made
