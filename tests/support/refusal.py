"""What every refusal of bad input looks like."""


def check_refusal(code, out, err):
    """Exit code 2, nothing on stdout, and one line on stderr."""
    assert code == 2, err
    assert out == ""
    assert err.startswith("minitp: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
