"""Faults of the kernels: changed arguments of their launchers, and macros that are left out."""

import importlib
import threading

import numpy as np


def with_arguments(monkeypatch, kind, method, change, rank=None):
    """Make `kind.method` receive change(arguments) instead of its arguments, on one rank or on all."""
    original = getattr(kind, method)

    def call(self, *args, **options):
        applies = rank is None or threading.current_thread().name == f"rank {rank}"
        return original(self, *(change(list(args)) if applies else args), **options)

    monkeypatch.setattr(kind, method, call)


def swapped(first, second):
    def change(args):
        args[first], args[second] = args[second], args[first]
        return args

    return change


def replaced(number, function):
    def change(args):
        args[number] = function(args[number])
        return args

    return change


def moved(count, by):
    """Return the indices 0 .. count - 1, rotated by `by`."""
    return (np.arange(count) + by) % count


def without_a_key(sequences):
    """Return the `sequences` of attention_prefill with one key less before the new tokens of each."""
    sequences = sequences.copy()
    sequences[:, 2] -= 1
    return sequences


def arguments(file, kind, method, change):
    """Return a function of a monkeypatch that changes arguments of a class in minitp.cuda.kernels.{file}."""

    def patch(monkeypatch):
        module = importlib.import_module(f"minitp.cuda.kernels.{file}")
        with_arguments(monkeypatch, getattr(module, kind), method, change)

    return patch


def without_options(file, kind, method):
    """Return a function of a monkeypatch that drops the keyword arguments of a method."""

    def patch(monkeypatch):
        owner = getattr(importlib.import_module(f"minitp.cuda.kernels.{file}"), kind)
        original = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda self, *args, **options: original(self, *args))

    return patch


def without_macro(macro):
    """Return a function of a monkeypatch that compiles all kernels without a macro."""

    def patch(monkeypatch):
        from minitp.cuda.compiler import Compiler

        def kernel(self, file, name, **defines):
            defines.pop(macro, None)
            return original(self, file, name, **defines)

        original = Compiler.kernel
        monkeypatch.setattr(Compiler, "kernel", kernel)

    return patch
