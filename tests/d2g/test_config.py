"""d2g.core.config: overrides, JSON round trips, and errors that suggest the nearest setting."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2g.core.config import (
    completed,
    differing,
    digest,
    from_json,
    nearest,
    override,
    pick,
    to_json,
    with_values,
)
from d2g.core.errors import SettingError


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["adam", "sgd"] = "adam"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    seed: int = 0
    name: str = "run"
    sparse: bool = False
    widths: tuple[int, ...] = (8, 16)
    weights: str | None = None
    minutes: float | None = None
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SettingError(f"seed is {self.seed}, expected 0 or more")


@pytest.mark.parametrize(
    "setting, name, value",
    [
        ("seed=3", "seed", 3),
        ("name=other", "name", "other"),
        ("name=3", "name", "3"),
        ("name=true", "name", "true"),
        ('name="a b"', "name", "a b"),
        ("name=", "name", ""),
        (" seed = 4 ", "seed", 4),
        ("name=a=b", "name", "a=b"),
        ("sparse=true", "sparse", True),
        ("widths=[4]", "widths", (4,)),
        ("widths=[]", "widths", ()),
        ("weights=here", "weights", "here"),
        ("weights=null", "weights", None),
        ("minutes=2", "minutes", 2.0),
    ],
)
def test_override_parses_json_or_plain_text(setting: str, name: str, value: object) -> None:
    result = getattr(override(Job(weights="old"), [setting]), name)
    assert result == value and type(result) is type(value)


def test_override_of_nested_groups_keeps_other_settings() -> None:
    result = override(Job(seed=5), ["optim.lr=1", "optim.betas=[0, 0.5]", "optim.kind=sgd"])
    assert result == Job(seed=5, optim=Optim(lr=1.0, betas=(0.0, 0.5), kind="sgd"))
    assert type(result.optim.lr) is float, "an integer becomes the field's float, so digests are unique"


def test_settings_of_a_group_change_the_group_that_is_given_with_them() -> None:
    """`--protocol NAME --set protocol.size=64` is the named protocol with another size."""
    whole = Optim(betas=(0.0, 0.5), kind="sgd")
    result = with_values(Job(), {"optim": whole, "optim.lr": 2.0})
    assert result == Job(optim=Optim(lr=2.0, betas=(0.0, 0.5), kind="sgd"))


def test_later_overrides_win() -> None:
    assert override(Job(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    "setting, words",
    [
        ("sede=1", ["unknown setting 'sede'", "Job", "did you mean 'seed'?"]),
        ("optim.lrr=1", ["unknown setting 'optim.lrr'", "Optim", "did you mean 'optim.lr'?"]),
        ("zzzzzzz=1", ["known: minutes, name, optim, seed, sparse, weights, widths"]),
        ("seed", ["name=value", "'seed'"]),
        ("seed=one", ["'seed' takes int", "'one'"]),
        ("seed=1.5", ["'seed' takes int", "'1.5'"]),
        ("seed=true", ["'seed' takes int"]),
        ("minutes=true", ["'minutes' takes float"]),
        ("optim.lr=NaN", ["'optim.lr' is 'NaN'; expected a finite number"]),
        ("optim.lr=nan", ["'optim.lr' takes float, got 'nan'"]),
        ("minutes=-Infinity", ["'minutes' is '-Infinity'; expected a finite number"]),
        ("minutes=1e999", ["'minutes' is '1e999'; expected a finite number"]),
        (f"minutes=1{'0' * 400}", ["'minutes' is '1000", "expected a finite number"]),
        (f"seed=1{'0' * 5000}", ["'seed' takes int"]),
        ("optim.betas=[0, NaN]", ["'optim.betas' is '[0, NaN]'; expected a finite number"]),
        ("sparse=1", ["'sparse' takes bool"]),
        ("optim.kind=adm", ["'optim.kind' is 'adm'", "did you mean 'adam'?"]),
        ("optim.betas=[1]", ["takes 2 values", "[1]"]),
        ("widths=8", ["JSON list", "'8'"]),
        ("widths=[8.5]", ["takes int"]),
        ("optim=3", ["'optim' is a group", "lr, betas, kind"]),
        ("seed.x=3", ["single value", "'x'"]),
        ("seed=-1", ["seed is -1, expected 0 or more"]),
    ],
)
def test_invalid_overrides_have_helpful_errors(setting: str, words: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        override(Job(), [setting])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


JOBS = st.builds(
    Job,
    seed=st.integers(0, 2**63),
    name=st.text(),
    sparse=st.booleans(),
    widths=st.lists(st.integers()).map(tuple),
    weights=st.none() | st.text(),
    minutes=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    optim=st.builds(
        Optim,
        lr=st.floats(0, 1),
        betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        kind=st.sampled_from(["adam", "sgd"]),
    ),
)


@given(JOBS)
def test_json_round_trip(job: Job) -> None:
    assert from_json(Job, json.loads(json.dumps(to_json(job)))) == job


@given(JOBS, JOBS)
def test_every_leaf_can_be_overridden_with_its_own_json(start: Job, goal: Job) -> None:
    leaves = {k: v for k, v in to_json(goal).items() if k != "optim"}
    leaves |= {f"optim.{k}": v for k, v in to_json(goal)["optim"].items()}
    assert override(start, [f"{name}={json.dumps(value)}" for name, value in leaves.items()]) == goal


def test_from_json_uses_defaults_and_refuses_unknown_settings() -> None:
    assert from_json(Job, {"seed": 2, "optim": {"lr": 0.5}}) == Job(seed=2, optim=Optim(lr=0.5))
    with pytest.raises(SettingError, match="unknown setting 'optm' in Job; did you mean 'optim'"):
        from_json(Job, {"optm": {}})
    with pytest.raises(SettingError, match=r"unknown setting 'optim\.rl' in Optim; did you mean 'optim\.lr'"):
        from_json(Job, {"optim": {"rl": 1}})


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_from_json_refuses_non_finite_numbers(number: str) -> None:
    with pytest.raises(SettingError, match=r"'optim.lr' is .*; expected a finite number"):
        from_json(Job, json.loads(f'{{"optim": {{"lr": {number}}}}}'))


def test_a_value_in_place_of_a_group_is_a_setting_error() -> None:
    with pytest.raises(SettingError, match="'optim'"):
        from_json(Job, {"optim": 3})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_digest_ignores_the_order_of_keys_only(data: dict[str, Any]) -> None:
    assert digest(data) == digest(dict(reversed(data.items())))
    assert digest(data) != digest({**data, "one more": 1})


def test_digest_does_not_change_between_versions() -> None:
    expected = "1d5aa48ef9cd2b6be14efd77e6aa32fc7767713b66a7abf3c772a7863e7c199a"
    assert digest({"b": [1, 2.5], "a": "é"}) == expected, "stored folders carry these digests"


def test_differing_lists_changed_settings_with_both_values() -> None:
    old = {"seed": 1, "optim": {"lr": 1, "kind": "adam"}, "gone": 2}
    new = {"seed": 1, "optim": {"lr": 2, "kind": "adam"}, "added": None}
    assert differing(old, new) == ["gone (2 -> None)", "optim.lr (1 -> 2)"]


def test_completed_adds_missing_defaults_at_every_level() -> None:
    old, defaults = {"seed": 1, "optim": {"lr": 2}}, {"optim": {"lr": 1, "kind": "adam"}, "gan": {"a": 3}}
    assert completed(old, defaults) == {"seed": 1, "optim": {"lr": 2, "kind": "adam"}, "gan": {"a": 3}}
    assert old == {"seed": 1, "optim": {"lr": 2}}


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_config_does_not_differ_from_itself(data: dict[str, Any]) -> None:
    assert differing(data, json.loads(json.dumps(data))) == []


def test_pick_and_nearest() -> None:
    assert pick({"a": 1}, "a", "preset") == 1
    with pytest.raises(SettingError, match="unknown preset 'minature'; did you mean 'miniature'"):
        pick({"miniature": 1, "sd15": 2}, "minature", "preset")
    assert nearest("qqq", ["b", "a"]) == "; known: a, b"
