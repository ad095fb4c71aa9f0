"""An exception in a user's own part is answered with the place in it; one of moetrain's own is not."""

import sys
import threading
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.user_code import frame_of_user, of_user

PART = '''
import json

class Part:
    def route(self):
        return json.loads("{")

    def wrong_call(self):
        from moetrain.plan.splitting.split import no_such_name
'''


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """An object of somebody's own module."""
    (tmp_path / "noisy.py").write_text(PART)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noisy", raising=False)
    import noisy

    return noisy.Part()


@pytest.mark.parametrize("method, line", [("route", 6), ("wrong_call", 9)])
def test_the_command_names_file_and_line(
        part, method: str, line: int, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("moetrain.cli.version.run", lambda argv: getattr(part, method)())
    assert main(["version"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("E-CODE-001") and f"where   {tmp_path}/noisy.py:{line}, in {method}\n" in error
    assert "Traceback" not in error and "mistake in moetrain" not in error
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")
    assert main(["version"]) == 1 and "Traceback" in capsys.readouterr().err


def test_a_mistake_in_moetrain_stays_one(monkeypatch) -> None:
    from moetrain.config import suggest

    with pytest.raises(AttributeError) as caught:        # the caller, this file, is not to blame
        suggest.nearest(5, ["a"])
    assert frame_of_user(caught.value) is None and of_user(caught.value) is None
    monkeypatch.setattr("moetrain.cli.version.run", lambda argv: suggest.nearest(5, ["a"]))
    # So that only moetrain is left.
    monkeypatch.setattr("moetrain.user_code._LIBRARIES", (str(Path(__file__).parent),))
    with pytest.raises(AttributeError):
        main(["version"])


def test_training_as_a_library(part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread, where Python handles no signals, with a router of one's own; refused for several ranks."""
    from moetrain.config.compose import compose
    from moetrain.config.schema import Config
    from moetrain.errors import ConfigError
    from moetrain.routers.topk import TopKRouter
    from moetrain.train.loop import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    words = ["experiment=debug", "run.steps=1", "model.dim=16", "train.seq_len=8", "train.global_batch=2",
             "eval.windows=1", "run.device=cpu"]
    with pytest.raises(ConfigError, match="train_on_ranks") as caught:
        train(compose([*words, "parallel=ep", "run.nproc=2"]))
    assert caught.value.id == "E-CONFIG-125"
    with pytest.raises(ConfigError, match="compose"):
        train(Config())
    assert not list(tmp_path.glob("runs"))
    failed: list[BaseException] = []

    def in_thread() -> None:
        try:
            train(compose(words))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert failed == [] and (tmp_path / "runs" / "debug" / "loads.npz").exists()
    monkeypatch.setattr(TopKRouter, "route", lambda self, x_TD, context: part.route())
    with pytest.raises(ValueError) as raised:
        train(compose([*words, "run.name=mine"]))
    assert raised.value.__notes__ == [f"raised by your code: {tmp_path}/noisy.py:6, in route"]
