"""What a training configuration refuses, field by field, and in what words."""

import re
from dataclasses import fields
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

import jaxtyping
import pytest

from lorsa_lens import ConfigError
from lorsa_lens.training import TrainingConfig
from lorsa_lens.training.run_config import RunConfig

RUN = {"model": "m", "tokens": "t.npy"}


@pytest.fixture(autouse=True)
def _types_are_for_the_configuration_to_check(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def kind_of(field):
    """Its type without None, and whether None is allowed."""
    union = get_origin(field.type) in (Union, UnionType)
    kinds = get_args(field.type) if union else (field.type,)
    return next(kind for kind in kinds if kind is not NoneType), NoneType in kinds


def mistakes():
    """For every field: values it must refuse, and the words for it."""
    for field in fields(RunConfig):
        kind, optional = kind_of(field)
        or_none = " or None" if optional else ""
        zero = field.name in RunConfig.MAY_BE_ZERO
        if get_origin(kind) is Literal:
            cases = [("best", "one of"), (3, "one of")]
        elif get_origin(kind) is tuple:
            cases = [(3, "a tuple of integers"), ((1.5,), "a tuple of integers")]
        elif kind is bool:
            cases = [("yes", "True or False"), (1, "True or False")]
        elif kind is int:
            wanted = "an integer from 0" if zero else "a positive integer"
            cases = [(-1, wanted), (1.5, wanted), (True, wanted), *([] if zero else [(0, wanted)])]
        elif kind is float:
            wanted = "a number from 0" if zero else "a positive number"
            cases = [(-0.5, wanted), (float("nan"), wanted), ("x", wanted)]
            cases += [] if zero else [(0.0, wanted)]
        else:
            assert kind is str
            cases = [(3, "a string")]
        if not optional:
            cases.append((None, cases[0][1]))
        for value, words in cases:
            yield pytest.param(field.name, value, words, or_none, id=f"{field.name}-{value}")


@pytest.mark.parametrize(("name", "value", "words", "or_none"), list(mistakes()))
def test_every_field_says_what_it_wants(name, value, words, or_none):
    with pytest.raises(ConfigError) as caught:
        RunConfig(**{**RUN, name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} = {value!r} must be {words}")
    assert message.endswith(or_none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adam_beta1": 1.0}, "adam_beta1 = 1.0 must be below 1"),
        ({"adam_beta2": 1.5}, "adam_beta2 = 1.5 must be below 1"),
        ({"train_batch_size_tokens": 100},
         "train_batch_size_tokens = 100 must be a multiple of context_size = 128: for example 128"),
        ({"train_batch_size_tokens": 300, "context_size": 128},
         "train_batch_size_tokens = 300 must be a multiple of context_size = 128: for example 256"),
        ({"gradient_accumulation_steps": 5},
         "gradient_accumulation_steps = 5 must divide the 32 contexts of a batch"),
        ({"lr_warm_up_fraction": 0.7},
         "lr_warm_up_fraction = 0.7 and lr_decay_fraction = 0.4 must not exceed 1 together"),
        ({"k_start": 64}, "k_start and k_anneal_fraction go together: give both or neither"),
        ({"k_anneal_fraction": 0.5}, "k_start and k_anneal_fraction go together"),
        ({"parallel": "heads", "objective": "kl"},
         "objective = 'kl' trains all Lorsas at once in the whole model: give parallel = 'data'"),
        ({"parallel": "sharded", "compile": True}, "compile = True needs whole Lorsas"),
        ({"parallel": "heads", "resample_every": 5}, "resample_every = 5 needs whole Lorsas"),
        ({"tokens": None},
         "tokens = None and cached_activations_path = None: give one of them"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunConfig(**{**RUN, **changes})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "incomplete RunConfig: it lacks model"),
        ({**RUN, "learning_rate": 1}, "unknown key 'learning_rate' in a RunConfig"),
        ({**RUN, "n_ov_head": 1}, "unknown key 'n_ov_head' in a RunConfig: did you mean n_ov"),
    ],
)  # fmt: skip
def test_keys(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunConfig.from_dict(values)


def test_a_run_is_a_training_and_what_it_is_applied_to():
    run = RunConfig(**RUN, layers=[0, 3], lr=0.01, cached_activations_path="c")
    assert run.layers == (0, 3)
    assert run.training() == TrainingConfig(
        lr=0.01, output_path="runs/lorsa", cached_activations_path="c"
    )
    assert RunConfig.from_dict(run.to_dict()) == run
    assert RunConfig(model="m", cached_activations_path="c").tokens is None
