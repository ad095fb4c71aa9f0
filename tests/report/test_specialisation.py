"""Experts by domain: the number against known cases, and a picture that says what was found."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from moetrain.errors import DataError
from moetrain.report.specialisation import draw_specialisation, finding, lift, read_specialisation
from moetrain.train.specialisation import mutual_information, write_specialisation


def test_domains_that_use_experts_alike_tell_nothing_and_those_apart_tell_all():
    assert mutual_information(np.array([[10, 30], [1, 3], [100, 300]])) == pytest.approx(0)
    assert mutual_information(np.array([[5, 0, 0], [0, 700, 0], [0, 0, 1]])) == pytest.approx(np.log(3))
    assert mutual_information(np.zeros((2, 3), dtype=np.int64)) == 0


def test_it_is_the_mutual_information_of_domain_and_expert():
    choices = np.array([[4, 1, 3], [0, 6, 2]])
    joint = choices / choices.sum(1, keepdims=True) / 2
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    assert mutual_information(choices) == pytest.approx((joint[seen] * np.log(joint[seen] / apart[seen])).sum())


def test_an_expert_nobody_chose_has_no_lift():
    ratio = lift(np.array([[2, 2, 0], [4, 0, 0]]))
    assert ratio[:, :2].tolist() == [[0.5 / 0.75, 2.0], [1 / 0.75, 0.0]] and np.isnan(ratio[:, 2]).all()


@pytest.mark.parametrize("experts", [[4, 2], [128] * 12], ids=str)
def test_what_was_written_is_drawn(tmp_path: Path, experts: list[int]) -> None:
    draw = np.random.default_rng(0)
    choices = [draw.integers(0, 50, (3, size)) for size in experts]
    routers = {f"layers.{i}.moe": size for i, size in enumerate(experts)}
    write_specialisation(tmp_path / "specialisation.npz", 7, choices, routers, ["code", "prose", "tables"])
    found = read_specialisation(tmp_path / "specialisation.npz")
    assert found.step == 7 and found.domains == ["code", "prose", "tables"]
    assert all((part == choices[i]).all() for i, part in enumerate(found.choices.values()))
    assert "nats on average" in finding(found)
    picture = imread(draw_specialisation(tmp_path))
    assert picture.shape[1] == 11 * 120 and picture[..., :3].std() > 0.05


def test_a_file_that_is_not_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "specialisation.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="E-DATA-063"):
        read_specialisation(tmp_path / "specialisation.npz")
