"""The public surface: signatures, annotations, suggestions for wrong names, and what `repr` shows."""

import inspect
from dataclasses import MISSING, fields
from importlib.resources import files

import numpy as np
import pytest
from llm_reference import write_model

from minitp import LLM, Completion, SamplingParams
from minitp.comm.base import Comm
from minitp.engine.options import EngineOptions
from minitp.errors import InputError
from minitp.model import Model
from minitp.oracle import Oracle
from minitp.sampling import SamplingFields

OWN = ("self", "tp", "split", "model", "on_end", "unknown")  # parameters of LLM that are no plain field


def test_llm_has_every_field_of_the_options_with_its_default_and_type():
    parameters = inspect.signature(LLM.__init__).parameters
    assert list(parameters)[:3] == ["self", "model", "tp"]
    assert {*parameters} == {field.name for field in fields(EngineOptions)} | {"self", "on_end", "unknown"}
    for field in fields(EngineOptions):
        assert parameters[field.name].default == field.default
        if field.name not in OWN:
            type_name = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            assert parameters[field.name].annotation == type_name


def test_the_annotations_of_options_are_the_fields_of_sampling_params():
    named = {field.name: field.type for field in fields(SamplingParams)}
    assert SamplingFields.__annotations__ == named


@pytest.mark.parametrize("owner", [LLM, Completion, SamplingParams, Comm, Oracle])
def test_public_methods_are_annotated(owner):
    """Every public method written in the class annotates its parameters and what it returns."""
    bare = []
    for name, function in vars(owner).items():
        function = getattr(function, "__func__", function)
        written = inspect.isfunction(function) and function.__code__.co_filename != "<string>"
        if not written or (name.startswith("_") and name != "__init__"):
            continue
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1:]  # without self or cls
        if any(p.annotation is p.empty for p in parameters) or signature.return_annotation is signature.empty:
            bare.append(name)
    assert bare == []


def test_the_forward_pass_is_annotated():
    for function in (Model.forward, Model.forward_batch):
        signature = inspect.signature(function)
        assert all(p.annotation is not p.empty for p in list(signature.parameters.values())[1:])
        assert signature.return_annotation is not signature.empty


def test_type_checkers_are_told_to_read_the_annotations():
    assert (files("minitp") / "py.typed").is_file()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LLM(max_model_len=5), "LLM has no parameter max_model_len; did you mean max_context?"),
        (lambda: LLM(dtpye="float16"), "LLM has no parameter dtpye; did you mean dtype?"),
        (lambda: LLM(zzz=1), "LLM has no parameter zzz; its parameters are model, tp, split, "),
        (
            lambda: SamplingParams(max_tokens=5),
            "SamplingParams has no parameter max_tokens; did you mean max_new_tokens?",
        ),
        (lambda: SamplingParams(self=1), "SamplingParams has no parameter self; "),
        (lambda: SamplingParams(topp=1), "SamplingParams has no parameter topp; did you mean top_p?"),
    ],
)
def test_a_wrong_name_is_answered_with_the_likely_one(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_the_signature_of_sampling_params_shows_its_fields():
    parameters = inspect.signature(SamplingParams).parameters
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    assert {name: p.default for name, p in parameters.items()} == defaults


def test_a_subclass_of_sampling_params_may_have_its_own_parameters():
    class Named(SamplingParams):
        def __init__(self, label, **fields):
            super().__init__(**fields)
            object.__setattr__(self, "label", label)

    assert (Named("a", top_k=3).label, Named("a", top_k=3).top_k) == ("a", 3)
    with pytest.raises(InputError, match="did you mean top_k"):
        Named("a", topk=3)


def test_sampling_params_by_position():
    assert SamplingParams(7, 0.5) == SamplingParams(max_new_tokens=7, temperature=0.5)
    assert all(field.default is not MISSING for field in fields(SamplingParams))


def test_repr_says_what_runs(tmp_path):
    with LLM(write_model(tmp_path / "model"), tp=1, max_context=40) as llm:
        assert repr(llm) == f"<LLM {llm.source.name}: 1 rank, float32, context 40, ready>"
        assert np.isfinite(llm.load["running"])
    assert repr(llm).endswith("context 40, closed>")
