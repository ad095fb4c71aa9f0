"""init.from takes the model over from the run that the weights come from; what is typed lies on top."""

from pathlib import Path

import pytest

from moetrain.config.compose import compose, to_yaml
from moetrain.config.schema import Config
from moetrain.errors import ConfigErrors

MINE = ["data=text", "data.tokenizer=bytes", "model.dim=48", "model.num_heads=4", "model.num_experts=6",
        "router=sigmoid", "router.update_rate=0.01"]


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of runs/mine, which reads a tokenizer.json."""
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text("{}")
    config = compose([*MINE[:1], "data.tokenizer=tokenizer.json", "data.end_token=</s>", *MINE[2:]])
    _write(config, Path("runs/mine"))
    return config


def _write(config: Config, run: Path) -> None:
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))


@pytest.mark.parametrize("named", ["mine", "runs/mine", "runs/mine/checkpoints/step-00000003"])
def test_the_model_and_the_tokenizer_are_taken_over(mine: Config, named: str) -> None:
    config = compose([f"init.from={named}", "data.path=elsewhere", "data=text"])
    assert (config.model, config.router, config.expert) == (mine.model, mine.router, mine.expert)
    assert (config.data.tokenizer, config.data.end_token) == ("tokenizer.json", "</s>")
    assert config.balance == compose([]).balance                 # how it trains is not


def test_what_is_typed_lies_on_top(mine: Config) -> None:
    config = compose(["init.from=mine", "model.norm_eps=0.5", "router.update_rate=0.5",
                      "data.tokenizer=bytes"])
    assert (config.model.dim, config.model.norm_eps) == (48, 0.5)
    assert config.router == {**mine.router, "update_rate": 0.5}
    assert (config.data.tokenizer, config.data.end_token) == ("bytes", None)


def test_an_option_of_a_group_replaces_its_section(mine: Config) -> None:
    config = compose(["init.from=mine", "router=topk"])
    assert config.model == mine.model and config.router == compose(["router=topk"]).router
    assert compose(["init.from=mine", "experiment=debug"]).model == compose(["experiment=debug"]).model
    assert compose(["init.from=mine", "experiment=debug"]).router == mine.router


def test_a_run_with_a_checkpoint_is_read_in_place_of_its_source(mine: Config) -> None:
    _write(compose(["run.name=next", "model.dim=64"]), Path("runs/next"))
    assert compose(["init.from=mine", "run.name=next"]).model.dim == 64
    assert compose(["init.from=gone", "run.name=next"]).model.dim == 64


def test_errors_name_the_run_that_a_value_comes_from(mine: Config) -> None:
    path = Path("runs/mine/config.yaml")
    path.write_text(path.read_text().replace("num_heads: 4", "num_heads: 5"))
    with pytest.raises(ConfigErrors) as found:
        compose(["init.from=mine"])
    assert "model.num_heads in runs/mine/config.yaml" in str(found.value)
