"""Specialization of experts: mutual information of known cases, and the picture."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from moetrain.errors import DataError
from moetrain.report.output import Lettering
from moetrain.report.specialization import draw_specialization, headline, lift, read_specialization
from moetrain.runs.specialization import mutual_information, write_specialization


def test_domains_that_use_experts_alike_tell_nothing_and_those_apart_tell_all():
    assert mutual_information(np.array([[10, 30], [1, 3], [100, 300]])) == pytest.approx(0)
    assert mutual_information(np.array([[5, 0, 0], [0, 700, 0], [0, 0, 1]])) == pytest.approx(np.log(3))
    assert mutual_information(np.zeros((2, 3), dtype=np.int64)) == 0


def test_it_is_the_mutual_information_of_domain_and_expert():
    choices = np.array([[4, 1, 3], [0, 6, 2]])
    joint = choices / choices.sum(1, keepdims=True) / 2
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    assert (mutual_information(choices)
            == pytest.approx((joint[seen] * np.log(joint[seen] / apart[seen])).sum()))


def test_an_expert_nobody_chose_has_no_lift():
    ratio = lift(np.array([[2, 2, 0], [4, 0, 0]]))
    assert ratio[:, :2].tolist() == [[0.5 / 0.75, 2.0], [1 / 0.75, 0.0]] and np.isnan(ratio[:, 2]).all()


@pytest.mark.parametrize("experts", [[4, 2], [128] * 12], ids=str)
def test_what_was_written_is_drawn(tmp_path: Path, experts: list[int]) -> None:
    draw = np.random.default_rng(0)
    choices = [draw.integers(0, 50, (3, size)) for size in experts]
    routers = {f"layers.{i}.moe": size for i, size in enumerate(experts)}
    write_specialization(tmp_path / "specialisation.npz", 7, choices, routers, ["code", "prose", "tables"])
    found = read_specialization(tmp_path / "specialisation.npz")
    assert found.step == 7 and found.domains == ["code", "prose", "tables"]
    assert all((part == choices[i]).all() for i, part in enumerate(found.choices.values()))
    assert "nats on average" in headline(found)
    picture = imread(draw_specialization(tmp_path))
    assert picture.shape[1] == 11 * 120 and picture[..., :3].std() > 0.05


@pytest.mark.parametrize("name", ["\u4e2d\u6587\u6570\u636e", "x" * 300, "a\x1b[31m\nb", "$\\frac$", "$x^2$",
                                  "\udce9", "\U0010ffff", "_{}^"])
def test_any_name_of_a_domain_is_drawn_without_a_word(tmp_path: Path, name: str,
                                                      recwarn: pytest.WarningsRecorder,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    shown = name.encode("utf-8", "replace").decode()             # what a file can hold
    write_specialization(tmp_path / "specialisation.npz", 7, [np.array([[4, 1], [0, 6]])],
                         {"layers.0.moe": 2}, [shown, "plain"])
    picture = imread(draw_specialization(tmp_path))
    assert picture.shape[1] == 11 * 120 and not recwarn.list and not caplog.records
    with Lettering([name]) as lettering:
        assert len(lettering(name)) <= 28 and lettering(name).isprintable()


@pytest.mark.parametrize("form", [
    {"choices": None}, {"choices": np.zeros((2, 1, 2))}, {"choices": np.full((2, 1, 2), -1)},
    {"choices": np.zeros((0, 1, 2), int)},
    {"choices": np.ones((2, 2), int)}, {"experts": np.array([3])}, {"experts": np.array([2, 2])},
    {"domains": np.array(["a"])},
    {"domains": np.array([1, 2])}, {"routers": np.array([None])}, {"step": np.array([1])},
    {"step": np.float64(1)},
], ids=lambda form: next(iter(form)))
def test_arrays_of_another_form_are_refused(tmp_path: Path, form: dict[str, object]) -> None:
    good = {"choices": np.ones((2, 1, 2), int), "experts": np.array([2]), "domains": np.array(["a", "b"]),
            "routers": np.array(["r"]), "step": np.int64(3)}
    np.savez(tmp_path / "specialisation.npz", **good)
    assert read_specialization(tmp_path / "specialisation.npz").step == 3
    np.savez(tmp_path / "specialisation.npz",
             **{name: array for name, array in (good | form).items() if array is not None})
    with pytest.raises(DataError, match="E-DATA-063") as refused:
        read_specialization(tmp_path / "specialisation.npz")
    assert refused.value.code == 12


def test_a_file_that_is_not_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "specialisation.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="E-DATA-063"):
        read_specialization(tmp_path / "specialisation.npz")


def test_a_character_that_another_font_has_is_drawn_by_it_and_one_that_none_has_is_escaped() -> None:
    import matplotlib

    # STIX, a font that comes with matplotlib, has the first character.
    with Lettering(["a\u1d8e", "\U0010fffe"]) as lettering:
        assert any("STIX" in family for family in matplotlib.rcParams["font.family"])
        assert lettering("a\u1d8e") == "a\u1d8e" and lettering("\U0010fffe") == "\\U0010fffe"
    assert not any("STIX" in family for family in matplotlib.rcParams["font.family"])
