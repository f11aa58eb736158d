"""The fixture of the tests of recordings in files."""

from functools import partial

import pytest
from bit_recordings import changed_copy


@pytest.fixture
def changed(tmp_path):
    """A function that writes a copy of the recording, changed by change(arrays, metadata), and returns it."""
    return partial(changed_copy, tmp_path)
