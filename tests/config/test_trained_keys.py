"""What may differ from the run in a command that looks at it: what is refused, what is said, what is free."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moetrain.config import checks
from moetrain.config.checks import OF_TRAINING, RULES
from moetrain.config.compose import compose, for_run, run_dir, to_yaml
from moetrain.config.schema import Config
from moetrain.config.trained_keys import changes, is_changing, is_fixed, with_trained_widths
from moetrain.config.values import schema_keys, schema_sections
from moetrain.errors import ConfigErrors

MUON = ["optim=muon"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Records a run of these words as runs/demo."""
    monkeypatch.chdir(tmp_path)

    def record(*words: str) -> Config:
        trained = compose(["run.name=demo", *words])
        run_dir(trained).mkdir(parents=True, exist_ok=True)
        (run_dir(trained) / "config.yaml").write_text(to_yaml(trained))
        return trained

    return record


def refused(words: list[str]) -> dict[str, str]:
    """Numbers of the errors, and why."""
    try:
        for_run(["demo", *words])
    except ConfigErrors as caught:
        return {error.id.removeprefix("E-CONFIG-"): error.why for error in caught.errors}
    return {}


# A rule, the words of a run, those of an evaluation of it, and the number of the error.
LEGAL = {  # refused in training, and legal here
    "stop": ([], ["run.stop_at=900"], "022"),
    "router_gradient": ([], ["model.top_k=1"], "030"),
    "chunks": (["schedule=fixed", "schedule.chunks=2"], ["schedule.chunks=100000"], "083"),
    "sliced": ([], ["parallel=fssdp", "parallel.max_sliced_experts=2", "parallel.rehome_interval=0"], "080"),
    "copies": ([], ["parallel=fssdp", "parallel.max_copies=9"], "070"),
    "engine": ([], ["engine=deepspeed"], "067"),
    "batch": ([], ["parallel=ddp", "run.nproc=3"], "035"),
    "growing_k": (["router=fixed_random", "router.k_min=2"], ["model.top_k=1"], "260"),
    "domain_weights": (["data=text"], ["data.weights={code: -1}"], "170"),
    "load_of_noise": (["router.noise=vmoe", "loss=[load]"], ["router.noise=none"], "250"),
    "denoising": (["denoising=openmoe"], ["data.mask_documents=true"], "286"),
    "targets_ahead": (["model.mtp_layers=1"], ["train.seq_len=1"], "308"),
}
ILLEGAL = {  # refused in both
    "ranges": ([], ["eval.windows=0"], "020"),
    "empty_paths": (["data=text"], ["data.cache="], "101"),
    "unknown_homes": (["data=text"], ["data.cache=~nobody-here/x"], "102"),
    "layers": ([], ["model.top_k=[1]"], "027"),
    "experts": ([], ["model.top_k=9"], "029"),
    "groups": ([], ["router.num_groups=3"], "063"),
    "choice_capacity": (["router=expert_choice", "eval.allow_noncausal=true"], ["router.capacity=9"], "259"),
    "constants_of_the_width": (["router=null_expert", "model.block=latent"], ["router.num_constant=1"],
                               "301"),
    "domain_lists": (["router=domain"], ["router.experts=[[0,9]]"], "261"),
    "experts_of_a_token": (["router=top_p"], ["router.k_max=9"], "254"),
    "fixed_top_k": (["router=sparsemixer"], ["model.top_k=3"], "252"),
    "second_by_gates": ([], ["router.second_expert=random", "router.noise=gumbel"], "251"),
    "quantiles_of_groups": ([], ["router.balance=quantile", "router.num_groups=2"], "267"),
    "mode": ([], ["parallel=single", "run.nproc=2"], "031"),
    "sharded": ([], ["parallel=fsdp", "run.nproc=4", "parallel.shard=3"], "061"),
    "expert_parallel": ([], ["parallel=ep", "parallel.ep=4", "run.nproc=2"], "033"),
    "schedule": ([], ["schedule=fixed", "schedule.chunks=1"], "085"),
    "data_path": ([], ["data=tokens"], "036"),
    "reading": (["data=text"], ["data.encoding=base64"], "130"),
}
# Rules of which every key is fixed (the run would not have been trained), or is given by other words.
BY_THE_RUN = {"run_name", "heads", "layer_pattern", "dense_width", "divisions", "betas", "loss_names",
              "pools", "sliced_quantized", "vocabulary", "attention_experts", "mapped_logits",
              "equal_groups", "needed_sums", "rotary_channels", "sliding_layers", "rope_scaling",
              "residual_stream", "latent_attention", "scored_ahead", "experts_by_tokens"}


@pytest.mark.parametrize("name", [*LEGAL, *ILLEGAL])
def test_what_concerns_training_alone_is_not_asked_at_evaluation(run, name: str) -> None:
    trained, words, number = (LEGAL | ILLEGAL)[name]
    run(*trained)
    with pytest.raises(ConfigErrors) as caught:
        compose([*trained, *words])
    assert f"E-CONFIG-{number}" in {error.id for error in caught.value.errors}
    assert refused(words).keys() == ({number} if name in ILLEGAL else set())


def test_every_rule_is_on_one_side() -> None:
    names = {rule.__name__ for rule in RULES}
    assert len(names) == len(RULES) and {rule.__name__ for rule in OF_TRAINING} <= names
    listed = {*LEGAL, *ILLEGAL, *BY_THE_RUN}
    assert names == listed, "say in LEGAL (and checks.OF_TRAINING), ILLEGAL or BY_THE_RUN"
    assert {rule.__name__ for rule in OF_TRAINING} - BY_THE_RUN == set(LEGAL)


def test_ranges_are_asked_first_and_alone_on_both_sides(run) -> None:
    run()
    assert refused(["model.top_k=9", "eval.windows=0"]).keys() == {"020"}
    config = compose(["model.dim=64"])
    assert checks.check(config, 3)[0].id == "E-CONFIG-031"
    assert [error.id for error in checks.check(config, 3, trains=False)] == ["E-CONFIG-031"]


def test_what_another_value_of_has_no_effect_is_refused(run) -> None:
    run()
    for word in ("run.seed=3", "run.steps=9", "model.dim=32", "model.init_std=1", "optim.lr=1"):
        ((number, why),) = refused([word]).items()
        assert number == "016" and "this command does not train" in why
    assert refused(["run.seed=0", "run.steps=800"]) == {}                      # those of the run


def test_every_key_of_the_schema_is_fixed_changing_or_free() -> None:
    """New sections of what is trained have to be named."""
    free = {"run", "parallel", "schedule", "train", "data", "eval", "checkpoint", "log", "generate",
            "hardware", "engine", "planner"}
    keys = [*schema_keys(), *(f"{section}.x" for section, cls in schema_sections().items() if cls is dict)]
    sections = {key.partition(".")[0] for key in keys if not is_fixed(key) and not is_changing(key)}
    assert sections == free
    assert [key for key in schema_keys() if key.startswith("model.") and not is_fixed(key)] == ["model.top_k"]


def test_a_key_that_makes_another_model_is_named_with_both_values(run) -> None:
    trained = run("router.scale=2.5")
    for words, texts in {
        (): [],
        ("eval.windows=3", "run.nproc=2", "parallel=ep"): [],
        ("model.top_k=1", "router.scale=1"): ["model.top_k was 2 in training and is 1 now",
                                              "router.scale was 2.5 in training and is 1 now"],
        ("capacity=position",): ["capacity._target_ was",
                                 "capacity.factor was null in training and is 1.25 now"],
        ("train.seq_len=64",): ["train.seq_len was 128 in training and is 64 now"],
        ("data.mask_documents=true",): ["data.mask_documents was false in training and is true now"],
    }.items():
        found = [str(change) for change in changes(trained, for_run(["demo", *words]))]
        assert [text for text in texts if not any(line.startswith(text) for line in found)] == [], found
        assert bool(found) == bool(texts)


def test_an_argument_that_the_record_leaves_to_the_constructor_is_no_change(run) -> None:
    trained = run()
    bare = {"_target_": trained.router["_target_"]}
    path = Path("runs/demo/config.yaml")
    import yaml

    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"router": bare}))
    assert changes(for_run(["demo"]), for_run(["demo", "router=topk"])) == ()


@pytest.mark.parametrize("words, typed, top_k", [
    (["model.first_dense_layers=1"], "model.top_k=1", [2, 1]),
    (["model.first_dense_layers=1", "model.dense_dim=48"], "model.top_k=1", 1),
    (["model.first_dense_layers=1", "model.top_k=[3,2]", "model.num_experts=[0,8]"], "model.top_k=[1,4]",
     [3, 4]),
    ([], "model.top_k=1", 1)])
def test_dense_layers_stay_as_wide_as_they_were_trained(run, words: list[str], typed: str, top_k) -> None:
    """They are as wide as top_k experts, unless model.dense_dim says how wide."""
    trained = run("model.num_layers=2", *words)
    found = for_run(["demo", typed])
    assert found.model.top_k == top_k and with_trained_widths(trained, trained) is trained
