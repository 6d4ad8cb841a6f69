"""Configurations: every bad value is named, nothing is lost on the way through TOML, and what cannot be read says which file and why."""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from periplus import AdversarialConfig, AutoencoderConfig
from periplus.config import DataRecord, check_types, config_for, nearest, read_config, write_config
from periplus.errors import RunError, UsageError

DATA = DataRecord("digits", "train", 1500, 1, 8, 8, "ab" * 32)
FIELDS = [f.name for f in dataclasses.fields(AdversarialConfig)]


# ---- values ---------------------------------------------------------------------------------------------------------------------------------

AT_LEAST_ONE = ("epochs", "latent_dim", "critic_steps", "log_every", "sample_every", "checkpoint_every", "keep_last", "max_steps")
BAD_VALUES: list[tuple[str, Any, str]] = [
    *((name, value, "at least 1") for name in AT_LEAST_ONE for value in (0, -3)),
    *((name, value, "an integer") for name in (*AT_LEAST_ONE, "batch_size", "held_out", "seed") for value in (1.5, 2.0, "2", True, math.nan, [1])),
    *((name, None, "an integer") for name in ("epochs", "batch_size", "seed", "log_every")),
    ("batch_size", 1, "at least 2"),
    ("held_out", -1, "zero or more"),
    ("seed", -1, r"in \[0, 2\^63\)"),
    ("seed", 2**63, r"in \[0, 2\^63\)"),
    ("learning_rate", 0.0, "positive"),
    ("learning_rate", -1e-4, "positive"),
    *((name, -0.1, "zero or more") for name in ("penalty_weight", "path_weight")),
    *((name, value, r"in \[0, 1\)") for name in ("beta1", "beta2", "critic_dropout", "ema") for value in (1.0, -0.1, 2, 1)),
    *(
        (name, value, "a finite number")
        for name in ("learning_rate", "penalty_weight", "path_weight", "beta1", "beta2", "critic_dropout", "ema")
        for value in (math.nan, math.inf, -math.inf, 10**400, True, "0.5", (0.5,))
    ),
    *((name, None, "a finite number") for name in ("learning_rate", "ema")),
    *((name, value, "true or false") for name in ("generator_batch_norm", "snapshots") for value in (1, 0, "yes", "true")),
    *(("device", value, "text") for value in (None, 0, b"cpu")),
    *(("model", value, "one of gan, wgan-gp") for value in ("wgan", "", "GAN", None, 1, [], {})),
    *(("architecture", value, "one of mlp, conv, custom") for value in ("cnn", None)),
    *(("path_objective", value, "one of least, straight") for value in ("geodesic", None)),
    *(("generator_loss", value, "one of non-saturating, saturating") for value in ("hinge", True)),
    *(("precision", value, "one of auto, float32, bfloat16") for value in ("float16", 32)),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD_VALUES, ids=lambda v: str(v)[:20])
def test_a_bad_value_is_named_with_its_rule(name: str, value: Any, rule: str):
    with pytest.raises(UsageError, match=rule) as caught:
        AdversarialConfig(**{name: value})
    said = str(caught.value)
    assert name in said and f"--{name.replace('_', '-')}" in said and repr(value) in said and "\n" not in said


def test_every_field_has_a_bad_value_above():
    assert {name for name, _, _ in BAD_VALUES} == set(FIELDS)


@pytest.mark.parametrize(
    "good",
    [
        {"learning_rate": 1, "penalty_weight": 0, "ema": 0, "beta1": 0, "beta2": 0},
        {"held_out": 0, "max_steps": 1, "batch_size": 2, "seed": 2**63 - 1},
        {"generator_batch_norm": False, "critic_dropout": 0.0},
        {"device": "cuda:3", "precision": "bfloat16", "architecture": "custom"},
    ],
)
def test_values_at_the_edge_are_accepted(good: dict[str, Any]):
    config = AdversarialConfig(**good)
    assert all(getattr(config, k) == v for k, v in good.items())


def test_configurations_are_frozen_values():
    config = AdversarialConfig("gan")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3  # type: ignore[misc]
    assert config == AdversarialConfig("gan") != AdversarialConfig("wgan-gp") and hash(config) == hash(AdversarialConfig("gan"))
    with pytest.raises(UsageError, match="epochs"):
        dataclasses.replace(config, epochs=0)


def test_types_of_records_are_strict_too():
    with pytest.raises(UsageError, match="images is True.*integer"):
        check_types(dataclasses.replace(DATA, images=True))
    check_types(DATA)


# ---- defaults ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gan", "wgan-gp", "rpgan"])
def test_resolving_fills_in_every_default(model: Any):
    resolved = AdversarialConfig(model).resolve(1500)
    assert [f for f in FIELDS if getattr(resolved, f) is None] == ["max_steps"]
    assert resolved.resolve(60_000) == resolved
    assert (
        resolved.held_out == 150 and AdversarialConfig(model).resolve(60_000).held_out == 1000 and AdversarialConfig(model).resolve(9).held_out == 0
    )


def test_resolving_keeps_what_was_given_even_where_it_is_falsy():
    given = {"beta1": 0.0, "beta2": 0.0, "generator_batch_norm": False, "critic_dropout": 0.0, "held_out": 0}
    resolved = AdversarialConfig("gan", **given).resolve(1500)
    assert all(getattr(resolved, k) == v for k, v in given.items())


def test_defaults_are_those_that_were_measured_to_train():
    gan, wgan = AdversarialConfig("gan").resolve(100), AdversarialConfig("wgan-gp").resolve(100)
    assert (gan.beta1, gan.beta2, gan.generator_batch_norm, gan.critic_dropout) == (0.5, 0.999, True, 0.3)
    assert (wgan.beta1, wgan.beta2, wgan.critic_dropout) == (0.5, 0.9, 0.0)
    assert gan.learning_rate == wgan.learning_rate == 2e-4 and wgan.penalty_weight == 10 and wgan.critic_steps == 1


def test_the_sheets_own_setting():
    sheet = AdversarialConfig.sheet("gan", seed=4)
    assert (sheet.model, sheet.learning_rate, sheet.epochs, sheet.critic_steps, sheet.seed) == ("gan", 1e-4, 100, 1, 4)
    assert AdversarialConfig.sheet("wgan-gp", epochs=2).epochs == 2
    assert sheet == AdversarialConfig("gan", learning_rate=1e-4, epochs=100, batch_size=512, seed=4)


# ---- TOML -----------------------------------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    " ",
    '"',
    "'",
    '"""',
    "\\",
    "\\u0041",
    "a\nb",
    "a\r\nb",
    "\t",
    "\x00",
    "\x1f",
    "\x7f",
    "\x80",
    "\x85",
    "\u2028",
    "\ufeff",
    "é🦉",
    "#",
    "[t]",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"])))
integers = st.integers(1, 2**62)
unit = st.floats(0, 1, exclude_max=True)
configs = st.builds(
    AdversarialConfig,
    model=st.sampled_from(["gan", "wgan-gp", "rpgan"]),
    epochs=integers,
    batch_size=st.integers(2, 2**40),
    learning_rate=st.one_of(st.floats(min_value=0, exclude_min=True, allow_infinity=False), integers),
    beta1=st.none() | unit,
    penalty_weight=st.none() | st.floats(min_value=0, allow_infinity=False),
    generator_batch_norm=st.none() | st.booleans(),
    ema=unit,
    held_out=st.none() | st.integers(0, 2**62),
    seed=st.integers(0, 2**63 - 1),
    device=texts,
    max_steps=st.none() | integers,
)
records = st.builds(DataRecord, texts, texts, integers, integers, integers, integers, texts)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs, data=records)
def test_what_is_written_is_read_back(tmp_path: Path, config: AdversarialConfig, data: DataRecord):
    path = tmp_path / "config.toml"
    write_config(path, config, data)
    assert read_config(path) == (config, data)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_read_back(tmp_path: Path, text: str):
    data = dataclasses.replace(DATA, source=text, split=f"{text}x{text}")
    write_config(tmp_path / "config.toml", AdversarialConfig(), data)
    assert read_config(tmp_path / "config.toml")[1] == data


def test_a_resolved_configuration_states_every_value(tmp_path: Path):
    path = tmp_path / "config.toml"
    write_config(path, AdversarialConfig(max_steps=9).resolve(1500), DATA)
    tables = tomllib.loads(path.read_text())
    assert list(tables) == ["kind", "data", "training"] and list(tables["training"]) == FIELDS and tables["kind"] == "adversarial"
    assert tables["training"]["learning_rate"] == 2e-4 and tables["data"] == dataclasses.asdict(DATA)


GOOD_LINES = {
    "kind": 'kind = "adversarial"',
    "data": '[data]\nsource = "digits"\nsplit = "train"\nimages = 1500\nchannels = 1\nheight = 8\nwidth = 8\nsha256 = "ab"',
    "training": '[training]\nmodel = "gan"\nepochs = 3',
}


def damaged(**changes: str) -> str:
    return "\n\n".join((GOOD_LINES | changes).values()) + "\n"


DAMAGE = {
    "unknown key, nearest": (damaged(training="[training]\nepoch = 3"), r"\[training\] unknown key 'epoch'.*did you mean 'epochs'"),
    "unknown key, nearest of data": (GOOD_LINES["kind"] + '\n[data]\nsorce = "x"\n' + GOOD_LINES["training"], r"'sorce'.*did you mean 'source'"),
    "unknown key, none near": (damaged(training="[training]\nxyzzy = 3"), r"unknown key 'xyzzy'$"),
    "unknown table": (damaged(training="[trainings]\nepochs = 3"), r"unknown key 'trainings'.*did you mean 'training'"),
    "missing table": (damaged(training=""), r"table \[training\] is missing"),
    "missing data table": (damaged(data=""), r"table \[data\] is missing"),
    "table that is a value": (damaged(kind='kind = "adversarial"\ntraining = 3', training=""), r"table \[training\] is missing"),
    "array of tables": (damaged(training="[[training]]\nepochs = 3"), r"table \[training\] is missing"),
    "missing keys": (damaged(data='[data]\nsource = "x"\nimages = 3'), r"\[data\] lacks split, channels, height, width, sha256"),
    "missing kind": (damaged(kind=""), r"kind is None; known kinds: adversarial, autoencoder"),
    "unknown kind": (damaged(kind='kind = "flow"'), r"kind is 'flow'; known kinds: adversarial, autoencoder"),
    "another kind": (damaged(kind='kind = "autoencoder"'), r"--model is 'gan': one of vae, echo is needed"),
    "kind that is a list": (damaged(kind='kind = ["adversarial"]'), r"kind is \['adversarial'\]"),
    "kind that is a table": (damaged(kind="kind = {a = 1}"), r"kind is \{'a': 1\}"),
    "wrong type": (damaged(training='[training]\nepochs = "3"'), r"epochs is '3': an integer"),
    "wrong type of data": (damaged(data=GOOD_LINES["data"].replace("1500", "1500.0")), r"images is 1500.0: an integer"),
    "a date": (damaged(training="[training]\nepochs = 2026-11-22"), "epochs"),
    "boolean for a number": (damaged(training="[training]\nlearning_rate = true"), "learning_rate.*a finite number"),
    "not a number": (damaged(training="[training]\nlearning_rate = nan"), "learning_rate.*a finite number"),
    "a number of 400 digits": (damaged(training=f"[training]\nlearning_rate = {'9' * 400}"), "learning_rate.*a finite number"),
    "a number of 5000 digits": (damaged(training=f"[training]\nepochs = {'9' * 5000}"), "not valid TOML"),
    "out of range": (damaged(training="[training]\nepochs = 0"), r"epochs is 0: it must be at least 1"),
    "unknown choice": (damaged(training='[training]\nmodel = "wgan"'), "one of gan, wgan-gp"),
    "invalid TOML": (damaged(training="[training]\nepochs = "), "not valid TOML.*line"),
    "twice the same key": (damaged(training="[training]\nepochs = 1\nepochs = 2"), "not valid TOML"),
    "torn": (damaged()[:-40], "."),
    "a tower of brackets": ("kind = " + "[" * 100_000, "not valid TOML"),
    "empty": ("", "kind is None"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_read_is_an_error_that_names_the_file(tmp_path: Path, name: str):
    text, said = DAMAGE[name]
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(RunError, match=said) as caught:
        read_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_text_that_was_damaged_above_is_good(tmp_path: Path):
    (tmp_path / "config.toml").write_text(damaged())
    config, data = read_config(tmp_path / "config.toml")
    assert config == AdversarialConfig("gan", epochs=3) and data.images == 1500


@pytest.mark.parametrize(
    "content", [bytes(range(256)), b"\xff\xfe\x00", b"\x80\x04\x95", b"\x00" * 4096, b"PK\x03\x04", "kind = 'adversarial'".encode("utf-16")]
)
def test_binary_garbage_is_an_error_that_names_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(RunError, match="not valid TOML") as caught:
        read_config(tmp_path / "config.toml")
    assert str(tmp_path / "config.toml") in str(caught.value)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, len(damaged()) - 1), byte=st.integers(0, 255))
def test_one_wrong_byte_is_read_or_refused_and_nothing_else(tmp_path: Path, where: int, byte: int):
    content = bytearray(damaged().encode())
    content[where] = byte
    (tmp_path / "config.toml").write_bytes(content)
    try:
        config, data = read_config(tmp_path / "config.toml")
    except RunError as error:
        assert str(tmp_path) in str(error)
    else:
        check_types(config)
        check_types(data)


def test_a_folder_without_a_configuration_is_not_a_run(tmp_path: Path):
    with pytest.raises(RunError, match="absent does not exist: the folder of a run is needed"):
        read_config(tmp_path / "absent" / "config.toml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty is not a run: it has no config.toml"):
        read_config(tmp_path / "empty" / "config.toml")


def test_a_file_in_the_place_of_a_folder_and_a_folder_in_the_place_of_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not a run"):
        read_config(tmp_path / "file" / "config.toml")
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(RunError, match=r"config.toml cannot be read"):
        read_config(tmp_path / "config.toml")


def test_the_nearest_word():
    assert nearest("epoch", ["epochs", "ema"]) == " (did you mean 'epochs'?)" and nearest("xyzzy", ["epochs"]) == ""


# ---- autoencoders ---------------------------------------------------------------------------------------------------------------------------------

BAD_AUTOENCODERS: list[tuple[str, dict[str, Any], str]] = [
    *(
        (n, {n: 0}, "at least 1")
        for n in ["epochs", "latent_dim", "hidden", "depth", "log_every", "sample_every", "checkpoint_every", "keep_last", "max_steps"]
    ),
    *((n, {n: 1.5}, "an integer") for n in ("epochs", "latent_dim", "hidden", "depth", "batch_size", "held_out", "seed")),
    ("batch_size", {"batch_size": 1}, "at least 2"),
    *(("beta", {"beta": value}, "zero or more") for value in (-1.0, -1e-9)),
    *((n, {n: value}, "a finite number") for n in ("beta", "sigma", "clip", "learning_rate") for value in (math.nan, math.inf, "1", True)),
    ("learning_rate", {"learning_rate": 0.0}, "positive"),
    *(("sigma", {"sigma": value, "likelihood": "gaussian"}, "positive") for value in (0.0, -1.0)),
    ("sigma", {"sigma": 0.5}, "left out, unless the likelihood is gaussian"),
    *(("clip", {"model": "echo", "clip": value}, r"in \[0.985, 1\)") for value in (0.98, 0.9849, 1.0, 0.0)),
    ("clip", {"clip": 0.99}, "left out for 'vae': only an echo channel has one"),
    *((n, {n: value}, r"in \[0, 1\)") for n in ("beta1", "beta2") for value in (1.0, -0.1)),
    ("held_out", {"held_out": -1}, "zero or more"),
    ("seed", {"seed": 2**63}, r"in \[0, 2\^63\)"),
    *(("rate", {"model": "echo", "rate": value}, "left out for 'echo', or one of its own") for value in ("prior", "marginal")),
    ("rate", {"rate": "echo"}, "left out for 'vae', or one of its own"),
    ("rate", {"rate": "KL"}, "one of prior, marginal, echo"),
    *(
        ("estimator", {"estimator": "mixture", **other}, "left out, unless the rate is marginal")
        for other in ({}, {"rate": "prior"}, {"model": "echo"})
    ),
    ("estimator", {"rate": "marginal", "estimator": "exact"}, "one of stratified, leave-one-out, mixture"),
    ("likelihood", {"likelihood": "mse"}, "one of bernoulli, gaussian"),
    ("architecture", {"architecture": "resnet"}, "one of mlp, conv, echo-paper, linear, custom"),
    ("schedule", {"schedule": "linear"}, "one of constant, cosine"),
    *(("path_weight", {"path_weight": value}, rule) for value, rule in ((-1.0, "zero or more"), (math.nan, "a finite number"))),
    ("path_objective", {"path_objective": "geodesic"}, "one of least, straight"),
    ("precision", {"precision": "float16"}, "one of auto, float32, bfloat16"),
    ("model", {"model": "gan"}, "one of vae, echo"),
    ("device", {"device": 0}, "text"),
]


@pytest.mark.parametrize(("name", "values", "rule"), BAD_AUTOENCODERS, ids=lambda v: str(v)[:30])
def test_a_bad_value_of_an_autoencoder_is_named_with_its_rule(name: str, values: dict[str, Any], rule: str):
    with pytest.raises(UsageError, match=rule) as caught:
        AutoencoderConfig(**values)
    said = str(caught.value)
    assert said.startswith(f"--{name.replace('_', '-')}") and name in said and repr(values[name]) in said and "\n" not in said


def test_every_field_of_an_autoencoder_has_a_bad_value_above():
    assert {name for name, _, _ in BAD_AUTOENCODERS} == {f.name for f in dataclasses.fields(AutoencoderConfig)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"rate": "prior", "estimator": None, "sigma": None, "clip": None}),
        ({"rate": "marginal"}, {"rate": "marginal", "estimator": "stratified", "sigma": None, "clip": None}),
        ({"rate": "marginal", "estimator": "mixture"}, {"estimator": "mixture"}),
        ({"likelihood": "gaussian"}, {"sigma": math.sqrt(0.5), "estimator": None}),
        ({"likelihood": "gaussian", "sigma": 2.0}, {"sigma": 2.0}),
        ({"model": "echo"}, {"rate": "echo", "clip": 0.99, "estimator": None}),
        ({"model": "echo", "clip": 0.985, "rate": "echo"}, {"rate": "echo", "clip": 0.985}),
    ],
)
def test_resolving_an_autoencoder(values: dict[str, Any], expected: dict[str, Any], tmp_path: Path):
    resolved = AutoencoderConfig(**values).resolve(1500)
    assert {name: getattr(resolved, name) for name in expected} == expected and resolved.held_out == 150
    assert resolved.resolve(60_000) == resolved
    write_config(tmp_path / "config.toml", resolved, DATA)
    assert read_config(tmp_path / "config.toml") == (resolved, DATA)
    assert tomllib.loads((tmp_path / "config.toml").read_text())["kind"] == "autoencoder"


def test_the_echo_papers_protocol():
    paper = AutoencoderConfig.paper(seed=4)
    assert (paper.model, paper.architecture, paper.latent_dim, paper.batch_size, paper.epochs) == ("echo", "echo-paper", 32, 100, 200)
    assert paper.learning_rate == 3e-4 and paper.seed == 4 and AutoencoderConfig.paper(model="vae", epochs=2).epochs == 2


def test_configurations_by_the_name_of_their_model():
    assert config_for("echo", beta=2.0) == AutoencoderConfig("echo", beta=2.0) and config_for("gan") == AdversarialConfig("gan")
    with pytest.raises(UsageError, match=r"unknown model 'vea' \(did you mean 'vae'\?\): known are gan, wgan-gp, rpgan, vae, echo"):
        config_for("vea")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.builds(
        AutoencoderConfig,
        model=st.just("echo"),
        clip=st.none() | st.floats(0.985, 1, exclude_max=True),
        beta=st.floats(min_value=0, allow_infinity=False),
        likelihood=st.just("gaussian"),
        sigma=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        schedule=st.sampled_from(["constant", "cosine"]),
        device=texts,
    )
)
def test_an_autoencoder_is_read_back(tmp_path: Path, config: AutoencoderConfig):
    write_config(tmp_path / "config.toml", config, DATA)
    assert read_config(tmp_path / "config.toml") == (config, DATA)
