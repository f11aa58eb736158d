"""A check of how commands reject bad input."""

MOST = 300  # characters of the line


def check_refusal(code, out, err):
    """Check for exit code 2, an empty stdout, and one line of at most MOST characters on stderr."""
    assert code == 2, err
    assert out == ""
    assert err.startswith("minitp: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert len(err) <= MOST, err
