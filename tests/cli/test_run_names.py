"""A run is named alike by every verb: by its bare name, by its folder, or by a key."""

from pathlib import Path

import pytest

from moetrain.__main__ import VERBS, main
from moetrain.config.compose import compose, for_run, run_dir, to_yaml
from moetrain.errors import ConfigErrors

# What each verb does with a run that has a config and nothing else; {run} is its directory.
ASKED = {
    "train": (["--cfg", "job"], 0, "steps: 7"), "slurm": (["--dry-run"], 0, "{run}/log"),
    "data prepare": ([], 2, "E-CONFIG-044"),
    "eval": ([], 13, "{run}/checkpoints"), "generate": (["data=text"], 13, "{run}/checkpoints"),
    "report": ([], 12, "{run}"),
    "export": (["out=mine-hf"], 13, "{run}/checkpoints"),
    "inspect": ([], 13, "{run}/checkpoints"), "checkpoint verify": ([], 13, "{run}/checkpoints")}
FORMS = {"runs/mine": ["mine", "run.name=mine"],
         "far/it's mine": ["far/it's mine", "run.dir=far/it's mine"]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for place in FORMS:
        (tmp_path / place / "checkpoints").mkdir(parents=True)
        config = compose(["experiment=debug", "run.steps=7", "run.name=former"])
        (tmp_path / place / "config.yaml").write_text(to_yaml(config))
    return tmp_path


@pytest.mark.parametrize("place, form", [(place, form) for place, forms in FORMS.items() for form in forms])
def test_every_verb_takes_every_form(place: str, form: str, here: Path,
                                     capsys: pytest.CaptureFixture) -> None:
    assert {verb.split()[0] for verb in ASKED} == set(VERBS) - {"check", "import", "version"}
    for verb, (more, code, said) in ASKED.items():
        # As a key, train and its like begin a run of that name: the options are typed again.
        again = ["experiment=debug",
                 "run.steps=7"] if "=" in form and verb in ("train", "slurm", "data prepare") else []
        assert main([*verb.split(), *again, form, *more]) == code, (verb, capsys.readouterr())
        out, err = capsys.readouterr()
        assert said.format(run=place) in (out + err).replace("'\"'\"'", "'"), (verb, out, err)


@pytest.mark.parametrize("place", FORMS)
def test_the_config_is_the_runs_own_and_in_its_place(place: str, here: Path) -> None:
    for form in FORMS[place]:
        config = for_run([form, "eval.windows=3"])
        assert Path(run_dir(config)) == Path(place), form
        assert config.run.steps == 7 and config.eval.windows == 3, form
    bare = FORMS[place][0]
    config = compose([bare, "run.steps=9", "parallel=ddp", "run.nproc=2"])
    assert Path(run_dir(config)) == Path(place) and config.run.steps == 9
    assert config.parallel.mode == "ddp" and config.model.dim == 64


def test_a_word_that_names_no_run_begins_none(here: Path, capsys: pytest.CaptureFixture) -> None:
    for verb in ("train", "slurm"):
        assert main([verb, "ddp"]) == 2 and "parallel=ddp" in capsys.readouterr().err
    for verb in ("eval", "generate", "report", "inspect", "checkpoint verify"):
        assert main([*verb.split(), "mime"]) == 2
        error = capsys.readouterr().err
        assert error.count("E-CONFIG") == 1 and "there is no run mime" in error and "try     mine" in error


@pytest.mark.parametrize("words", [["mine", "run.name=other"], ["run.dir=x", "mine"], ["mine", "runs/mine"]])
def test_one_command_is_about_one_run(words: list[str], here: Path) -> None:
    for read in (compose, for_run):
        with pytest.raises(ConfigErrors, match="2 runs are named"):
            read(words)


@pytest.mark.parametrize("words", [
    ["run.steps=1,2", "run.dir=x", "run.name=a,b"], ["run.name=a,a"], ["run.dir=x,./x/"],
    ["run.name=a,b", "run.dir=runs/a,runs/b"]])
def test_two_runs_of_a_sweep_with_one_directory_are_refused_before_the_first(
        words: list[str], here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "-m", "experiment=debug", *words]) == 2
    assert "E-CONFIG-124" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["far", "runs"]
