"""What several test files share."""

import pytest
from tiny import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a tiny model with a tokenizer; nobody writes into it."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")
