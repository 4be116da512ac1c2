"""Configuration: what is read, what is refused, and that every fault is told at once."""

from pathlib import Path

import pytest

from deepfusion.config import TABLES, Config, ConfigError, changed_keys, load, resolve
from deepfusion.config_recipes import RECIPES


def faults_of(given: dict[str, object], *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        resolve(given, overrides)
    return caught.value.faults


def test_empty_file_is_the_defaults() -> None:
    assert resolve({}) == Config()
    assert list(changed_keys(Config())) == []


@pytest.mark.parametrize("template", [False, True])
def test_written_toml_reads_back(tmp_path: Path, template: bool) -> None:
    path = tmp_path / "run.toml"
    path.write_text(Config().to_toml(template=template))
    assert load(path) == Config()


def test_changed_values_survive_the_toml(tmp_path: Path) -> None:
    given = {"data": {"domains": ["a b", 'quo"te', "ü"]}, "distill": {"lr": 3e-05, "causal": True}}
    config = resolve(given)
    (tmp_path / "run.toml").write_text(config.to_toml())
    assert load(tmp_path / "run.toml") == config
    assert dict(changed_keys(config))["distill.lr"] == 3e-05


def test_template_names_every_key() -> None:
    text = Config().to_toml(template=True)
    for name, kind in TABLES.items():
        assert f"[{name}]" in text
        for key in kind.__dataclass_fields__:
            assert f"{key} = " in text


def test_template_leaves_the_recipe_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(Config().to_toml(template=True))
    config = load(path, ["run.recipe=paper"])
    assert config.merge.router_init == "normal"
    assert config.tune.teacher_weight == 0.0


def test_recipe_yields_to_what_the_user_set() -> None:
    config = resolve({"run": {"recipe": "paper"}, "distill": {"alpha": 0.5}})
    assert config.distill.alpha == 0.5
    assert config.distill.sampling == "uniform"


def test_every_preset_is_valid() -> None:
    for recipe, tables in RECIPES.items():
        config = resolve({"run": {"recipe": recipe}})
        for table, values in tables.items():
            assert {key: getattr(getattr(config, table), key) for key in values} == values


def test_override_beats_the_file() -> None:
    given = {"federation": {"num_devices": 9}}
    config = resolve(
        given, ["federation.num_devices=12", "run.output=runs/x y", "cluster.center=false"]
    )
    assert config.federation.num_devices == 12
    assert config.run.output == "runs/x y"
    assert config.cluster.center is False
    assert resolve({}, ['data.domains=["medical"]']).data.domains == ("medical",)


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"distill": {"temprature": 1.0}}, "did you mean distill.temperature?"),
        ({"tune": {"top_k": 1}}, "did you mean merge.top_k?"),
        ({"distil": {}}, "did you mean [distill]?"),
        ({"seed": 3}, "must stand in a table such as [run]; did you mean run.seed?"),
        ({"run": {"xyzzy": 3}}, "[run] has seed, output"),
        ({"run": {"seed": "7"}}, "run.seed must be a whole number, got '7'"),
        ({"run": {"seed": True}}, "run.seed must be a whole number, got true"),
        ({"run": {"seed": 7.0}}, "run.seed must be a whole number"),
        ({"run": {"seed": -1}}, "run.seed must be >= 0, got -1"),
        ({"run": {"output": ""}}, "run.output must be not empty"),
        ({"run": {"recipe": "best"}}, "run.recipe must be one of 'paper', 'recommended', 'direct'"),
        ({"data": {"domains": "medical"}}, "data.domains must be a list of texts"),
        ({"data": {"domains": []}}, "data.domains must be not empty"),
        ({"data": {"public_share": 1}}, "data.public_share must be < 1.0, got 1.0"),
        ({"distill": {"lr": 0}}, "distill.lr must be > 0.0"),
        ({"distill": {"alpha": float("nan")}}, "distill.alpha must be finite"),
        ({"upload": {"shard_mib": 300}}, "upload.shard_mib must be <= 256"),
        ({"federation": {"rounds": 2}}, "federation.rounds must be one of 1"),
    ],
)
def test_single_key_is_refused(given: dict[str, object], wanted: str) -> None:
    (fault,) = faults_of(given)
    assert wanted in fault


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (["cluster.num_clusters=9"], "cluster.num_clusters must be at most federation.num_devices"),
        (["cluster.num_clusters=2"], "at least the number of devices.architectures = 3, got 2"),
        (["federation.min_devices=9"], "federation.min_devices must be at most"),
        (
            ["federation.num_devices=2", "federation.min_devices=1", "cluster.num_clusters=2"],
            "federation.num_devices must be at least the number of devices.architectures",
        ),
        (
            ["distill.patch_size=129"],
            "distill.patch_size must be at most data.context_length = 128",
        ),
        (["merge.top_k=5"], "merge.top_k must be at most cluster.num_clusters = 4, got 5"),
        (["merge.top_k=1"], "tune.balance_loss_weight must be > 0"),
        (["distill.vaa_heads=3"], "distill.vaa_dim must be a multiple"),
        (["merge.target=deepseek_v3"], "base.model must have the attention"),
        (["data.source=files"], "data.path must be set"),
        (["data.source=files", "data.path=/nowhere"], "data.path must be a folder, got '/nowhere'"),
        (["data.tokenizer=/nowhere"], "data.tokenizer must be a path that exists"),
        (["data.public=general", "data.general_domain=law"], "data.general_domain must be one of"),
        (['data.domains=["a", "a"]'], "data.domains must be different names"),
    ],
)
def test_contradiction_is_refused(overrides: list[str], wanted: str) -> None:
    faults = faults_of({}, *overrides)
    assert any(wanted in fault for fault in faults), faults


@pytest.mark.parametrize(
    "overrides",
    [
        ["merge.top_k=1", "tune.balance_loss_weight=0.01"],
        ["merge.top_k=1", "merge.segments=2"],
        ["cluster.num_clusters=8"],
        ["federation.min_devices=8"],
        ["distill.patch_size=128"],
        ["data.public=general"],
    ],
)
def test_healthy_neighbour_passes(overrides: list[str]) -> None:
    resolve({}, overrides)


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[run]\nseed = -1\n[distill]\nalpa = 1\n[nowhere]\n")
    with pytest.raises(ConfigError, match="3 errors") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert len(caught.value.faults) == 3


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[run\nseed = 1")
    with pytest.raises(ConfigError, match=r"must be TOML.*line 1"):
        load(tmp_path / "bad.toml")


def test_hash_follows_values_and_not_the_output() -> None:
    base = resolve({})
    assert base.hash() == resolve({}, ["run.output=elsewhere"]).hash()
    other = resolve({}, ["tune.steps=101"])
    assert base.hash() != other.hash()
    assert base.hash("distill", "merge") == other.hash("distill", "merge")


@pytest.mark.parametrize(
    "more, wanted",
    [
        ("distill.feature_loss='vaa'", "distill.feature_loss must be 'none'"),
        ("distill.temperature=2.0", "distill.temperature must be 1.0"),
    ],
)
def test_log_probabilities_have_no_features(more: str, wanted: str) -> None:
    fine = ["upload.kind='logprobs'", "distill.feature_loss='none'"]
    resolve({}, fine)
    resolve({}, ["upload.kind='logprobs'", "distill.alpha=0.0"])
    with pytest.raises(ConfigError, match=wanted):
        resolve({}, [*fine, more])
