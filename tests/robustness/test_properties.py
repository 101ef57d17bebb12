"""Saved adapters and tasks in which anything was forged: they work, or a clear error says what is wrong.

Every example is tried in a process of limited time and memory, see `Prisoner`. The cases that once failed are kept in
`forgeries.json`, and more of them are drawn from a fixed seed.
"""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.helpers.forgeries import (
    JSON_OPERATIONS,
    TENSOR_OPERATIONS,
    Forgery,
    Outcome,
    Prisoner,
    Saved,
    list_places,
    read_json_part,
)

CORPUS = Path(__file__).with_name("forgeries.json")

FORGERIES = int(os.environ.get("FORGERIES", "500"))

#: Values that have broken readers of JSON before.
SPECIAL = (
    [None, True, False, 0, 1, -1, 2, 3, 7, 1000, 10**9, -(10**9), 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 0.5, 1e-300]
    + [1e30, 1e300, float("nan"), float("inf"), -float("inf"), "", " ", "x", "0", "-1", "1e9", "nan", "None", "true"]
    + [
        "../../etc/passwd",
        "/etc/passwd",
        "a\x00b",
        "\x1b[2J",
        "\n",
        "\ud800",
        "é" * 300,
        "x" * 100_000,
        "{0.x}",
    ]
    + [[], [[]], [None], [0], [-1], ["x"], ["x", "x"], [1] * 5000, {}, {"x": None}, {"x": {"x": {"x": 1}}}]
    + [
        "BOFT",
        "VERA",
        "LORA",
        "pissa_niter_999999999",
        "all-linear",
        ".*",
        "(a+)+$",
        "rk4",
        "dopri8",
        "mean",
        "float16",
    ]
)


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))

#: Special values and others. Made once: hypothesis examines each new strategy, which takes longer than to draw from it.
JSON_VALUES = st.one_of(st.sampled_from(SPECIAL), st.sampled_from(SPECIAL), TREES)


@st.composite
def forgeries(draw: st.DrawFn, saved: Saved) -> Forgery:
    """One change of one file."""
    kind = draw(st.sampled_from(sorted(saved.files)))
    file = draw(st.sampled_from(sorted(saved.files[kind])))
    content = saved.files[kind][file]
    is_noted = draw(st.sampled_from([True, True, True, False]))
    is_tensor_file = file.endswith(".safetensors")
    styles = ["json", "json", "json", "bytes"] + (["tensor", "tensor"] if is_tensor_file else [])
    style = draw(st.sampled_from(styles))
    if style == "json":
        places = list(list_places(read_json_part(file, content)))
        place = draw(st.sampled_from(places))
        operation = draw(st.sampled_from([*JSON_OPERATIONS, "set", "set", "set", "add"]))
        if operation == "add":
            operation, place = "set", (*place[:-1], draw(st.sampled_from(EXTRA_KEYS)))
            if place[:-1] and not isinstance(_at(read_json_part(file, content), place[:-1]), dict):
                place = (place[-1],)
        value = draw(st.sampled_from([3, 100, 100_000])) if operation == "nest" else draw(JSON_VALUES)
        return Forgery(kind, file, operation, list(place), value, is_noted)
    if style == "tensor":
        names = [name for name in read_json_part(file, content) if name != "__metadata__"]
        operation = draw(st.sampled_from(TENSOR_OPERATIONS))
        value = "x" if operation == "renamed" else draw(st.integers(0, 10_000))
        return Forgery(kind, file, operation, draw(st.sampled_from(names)), value, is_noted)
    operation = draw(st.sampled_from(["flip", "flip", "cut", "fill", "insert", "text"]))
    position = draw(st.integers(0, 200) | st.integers(0, len(content)))
    value = draw(st.integers(0, 64))
    if operation == "insert":
        value = list(draw(st.binary(min_size=1, max_size=8)))
    if operation == "text":
        value = draw(st.sampled_from(["", "[]", "null", "3", '"x"', "{}", "\ufeff{}"]) | st.text(max_size=20))
    return Forgery(kind, file, operation, position, value, is_noted)


def _at(value, place):
    for key in place:
        value = value[key]
    return value


EXTRA_KEYS = (
    ["x", "", "_name_or_path", "auto_map", "quantization_config", "transformers_weights", "_attn_implementation"]
    + ["base_model_name_or_path", "runtime_config", "trainable_token_indices", "r", "bias", "layers_to_transform"]
    + ["exclude_modules", "use_dora", "init_lora_weights", "torch_dtype", "dtype", "id2label", "return_dict", "size"]
    + ["pad_size", "processor_class", "encoder.layer.0.norm1.weight", "__metadata__"]
)


@pytest.fixture(scope="module")
def prisoner(tmp_path_factory):
    prisoner = Prisoner(Saved(tmp_path_factory.mktemp("saved")))
    yield prisoner
    prisoner.close()


def attempt_many(prisoner: Prisoner, n: int) -> dict[str, list[tuple[Forgery, Outcome]]]:
    """The outcomes of forgeries that are the same in every run, by their verdict."""
    outcomes = collections.defaultdict(list)

    @settings(
        max_examples=n,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(forgeries(prisoner.saved))
    def attempt(forgery: Forgery) -> None:
        outcome = prisoner.attempt(forgery)
        outcomes[outcome.verdict].append((forgery, outcome))

    attempt()
    return outcomes


def report(outcomes: dict[str, list[tuple[Forgery, Outcome]]]) -> None:
    """Print how many outcomes there are of each kind, and fail with a list of the bad ones."""
    print({verdict: len(cases) for verdict, cases in sorted(outcomes.items())})
    lines = []
    for cases in outcomes.values():
        for forgery, outcome in cases:
            if not outcome.is_good:
                lines.append(f"{json.dumps(list(vars(forgery).values()))}  {outcome}"[:1000])
    assert not lines, "\n".join(lines)


@pytest.mark.slow
def test_what_once_failed(prisoner):
    """Each of these hung, took all memory, raised whatever it stumbled over or changed the backbone."""
    outcomes = collections.defaultdict(list)
    for case in json.loads(CORPUS.read_text()):
        forgery = Forgery(*case)
        outcome = prisoner.attempt(forgery)
        outcomes[outcome.verdict].append((forgery, outcome))
    report(outcomes)


def test_some_forgeries(prisoner):
    report(attempt_many(prisoner, 60))


@pytest.mark.slow
def test_many_forgeries(prisoner):
    report(attempt_many(prisoner, FORGERIES))
