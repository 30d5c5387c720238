"""The configuration: what is refused, and that it survives being written and read."""

import dataclasses
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simplenet_lib.config import PRESETS, Config, SimpleNetError, preset

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FIELDS = {field.name: str(field.type) for field in dataclasses.fields(Config)}
WRONG_TYPES = {
    "int": [1.0, "1", True, None, [1], math.nan],
    "float": ["0.5", False, None, [0.5], 1j],
    "bool": [0, 1, "true", None],
    "str": [1, None, b"fast", ["fast"]],
    "tuple[str, ...]": ["layer2", ["layer2"], None, 2, (), (2,), ("layer2", None)],
}
WRONG_VALUES = {
    "resize": [0, 31, -320, 4097],
    "crop": [0, 31, -1, 321],  # larger than the resized image of `fast`
    "neighbourhood": [0, 2, 4, -1, 17],
    "adaptor_channels": [0, 16385],
    "hidden_channels": [0, 16385],
    "sigma": [-0.1, 1e7],
    "margin": [-0.1, 1e7],
    "steps": [0, -1, 10**9 + 1],
    "batch_size": [1, 2**20 + 1],  # BatchNorm needs two
    "adaptor_lr": [-1e-4, 11],
    "discriminator_lr": [-1e-4, 11],
    "smoothing": [-1, 101],
    "holdout": [-0.1, 0.95, 1],
    "quantile": [-0.1, 1.1],
    "seed": [-1, 2**31],
}


def test_every_number_has_limits():
    assert set(WRONG_VALUES) == {name for name in FIELDS if FIELDS[name] in ("int", "float")}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_carry_their_name(name):
    assert PRESETS[name].preset == name
    assert preset(name) == PRESETS[name] == Config(**dataclasses.asdict(PRESETS[name]))
    assert preset(name, seed=7) == dataclasses.replace(PRESETS[name], seed=7)


def test_unknown_preset_lists_the_known():
    with pytest.raises(SimpleNetError, match="unknown preset 'fats'. Known: .*fast"):
        preset("fats")


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_are_refused_by_name(name):
    for value in WRONG_TYPES[FIELDS[name]]:
        with pytest.raises(SimpleNetError, match=f"configuration: {name}"):
            preset("fast", **{name: value})


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_values_out_of_range_are_refused_by_name(name):
    start = dataclasses.replace(PRESETS["fast"], resize=320, crop=320)
    wrong = WRONG_VALUES[name] + ([math.nan, math.inf, 10**400] if FIELDS[name] == "float" else [])
    for value in wrong:
        with pytest.raises(SimpleNetError, match=f"configuration: {name} is "):
            dataclasses.replace(start, **{name: value})


def test_an_integer_does_for_a_float_and_the_limits_themselves_are_allowed():
    assert preset("fast", margin=1, sigma=0, smoothing=0, quantile=0, holdout=0).margin == 1
    assert preset("fast", resize=32, crop=32, neighbourhood=1, batch_size=2, steps=1).crop == 32


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["fast"].steps = 1


configurations = st.builds(
    Config,
    preset=st.text(),
    backbone=st.text(),
    layers=st.lists(st.text(), min_size=1).map(tuple),
    resize=st.integers(1000, 4096),
    crop=st.integers(32, 1000),
    neighbourhood=st.integers(0, 7).map(lambda half: 2 * half + 1),
    standardise=st.booleans(),
    adaptor_channels=st.integers(1, 16384),
    hidden_channels=st.integers(1, 16384),
    batchnorm=st.booleans(),
    sigma=st.floats(0, 1e6) | st.integers(0, 10**6),
    margin=st.floats(0, 1e6),
    steps=st.integers(1, 10**9),
    batch_size=st.integers(2, 2**20),
    adaptor_lr=st.floats(0, 10),
    discriminator_lr=st.floats(0, 10),
    smoothing=st.floats(0, 100),
    holdout=st.floats(0, 0.9),
    quantile=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)


@relaxed
@given(configurations)
def test_json_gives_back_an_equal_configuration(config):
    text = config.to_json()
    assert "\n" not in text and text.isascii()
    assert Config.from_json(text) == config
    assert Config.from_json(text).to_json() == text


def changed(**values: object) -> str:
    """The preset ``fast`` as JSON, with some values changed or added."""
    return json.dumps({**json.loads(PRESETS["fast"].to_json()), **values})


def check_never_crashes(text: str) -> None:
    try:
        config = Config.from_json(text)
    except SimpleNetError as error:
        assert "configuration" in str(error)
    else:
        assert Config.from_json(config.to_json()) == config


numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), math.nan, math.inf])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@relaxed
@given(st.text())
def test_any_text_is_read_or_refused(text):
    check_never_crashes(text)


@relaxed
@given(values)
def test_any_json_is_read_or_refused(value):
    check_never_crashes(json.dumps(value))


@relaxed
@given(st.dictionaries(st.sampled_from([*FIELDS, "self", "cls", "", "Steps"]), values, min_size=1))
def test_any_changed_field_is_read_or_refused(changes):
    check_never_crashes(changed(**changes))


@relaxed
@given(st.sampled_from(sorted(FIELDS)))
def test_a_missing_field_never_crashes(name):
    start = json.loads(PRESETS["fast"].to_json())
    del start[name]
    check_never_crashes(json.dumps(start))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '"fast"',
        "[" * 100_000,
        '{"layers":' * 100_000,
        '{"layers": ["layer2"], "steps": ' + "9" * 5000 + "}",
        changed(layers="layer2"),
        changed(layers={"layer2": 1}),
        changed(layers=[["layer2"]]),
        changed(seed=math.nan),
        changed(seeds=0),
        PRESETS["fast"].to_json()[:-1],
    ],
    ids=range(14),
)
def test_what_is_no_configuration_is_refused(text):
    with pytest.raises(SimpleNetError, match="configuration"):
        Config.from_json(text)
