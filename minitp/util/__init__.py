"""Helpers: environment (machine and MPI), format (text), stdout, suggest (typos), this_run (facts)."""
