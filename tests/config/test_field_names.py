"""What the field calls things leads to what they are called here."""

import pytest

from moetrain.__main__ import VERBS
from moetrain.config import field_names
from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from moetrain.config.suggest import nearest
from moetrain.config.values import schema_keys
from moetrain.errors import ConfigErrors


def advice(*overrides: str) -> str:
    with pytest.raises(ConfigErrors) as caught:
        compose(overrides)
    error, *rest = caught.value.errors
    assert not rest
    return error.next


@pytest.mark.parametrize("typed, meant", [
    ("batch_size=32", ["train.global_batch", "train.micro_batch"]),
    ("train.batch_size=32", ["train.global_batch"]), ("lr=3e-4", ["optim.lr"]),
    ("learning_rate=3e-4", ["optim.lr"]), ("epochs=3", ["run.steps"]), ("max_steps=3", ["run.steps"]),
    ("optim.warmup_steps=5", ["optim.warmup"]),
    ("lr_scheduler=cosine", ["optim.schedule"]),
    ("capacity_factor=1.5", ["capacity=position", "capacity.factor"]),
    ("capacity.factor=1.5", ["capacity=position capacity.factor=1.5", "capacity=prob capacity.factor=1.5"]),
    ("log.profile=true", ["log.timeline"]),
    ("schedule=wsd", ["optim.schedule=wsd"]), ("optim=adam", ["optim=adamw"]),
    ("run.dtype=bf16", ["run.dtype=bfloat16"]),
    ("hidden_size=64", ["model.dim"]), ("num_experts_per_tok=2", ["model.top_k"]),
    ("max_grad_norm=1", ["train.clip"]),
    ("output_dir=x", ["run.dir"]), ("gradient_checkpointing=true", ["train.activation_checkpointing"]),
    ("router_aux_loss_coef=0.1", ["balance.weight"]),
    ("dataset=x", ["data.path"]), ("seq_length=64", ["train.seq_len"])])
def test_a_usual_name_leads_to_ours(typed: str, meant: list[str]) -> None:
    told = advice(typed)
    assert all(name in told for name in meant), told


def test_every_answer_of_the_table_exists() -> None:
    keys, options = schema_keys(), {f"{group}={option}" for group,
                                    found in group_options().items() for option in found}
    parts = {"balance.weight", "loss=[z]", "loss.z.weight", "capacity.factor"}
    for name, answers in field_names._BY_NAME.items():
        assert set(answers) <= {*keys, *options, *parts}, name
        assert not {f"{section}.{name}"
                    for section in ("run", "train", "model", "optim")} & set(answers), name
    for answers in field_names._VALUES.values():
        for answer in answers:
            compose(answer.split())
    for answers in field_names._VERBS.values():
        assert {answer.split()[0] for answer in answers} <= set(VERBS)


def test_a_word_without_a_verb_is_not_answered_by_letters() -> None:
    assert nearest("trace", VERBS) == ["train"] and field_names.verbs_meant("trace") == []
    assert field_names.verbs_meant("trian") is None
