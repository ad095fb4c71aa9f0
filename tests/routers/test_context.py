"""What routers are told is built in one place: per-token fields of a micro-batch, row by row."""

import torch

from moetrain.data.batches.batch import make_batch
from moetrain.routers.context import token_context
from moetrain.train.micro_batches import step_context
from tests.support.package_source import ROOT

TOKENS_BS = torch.tensor([[5, 6, 7], [8, 9, 0]])


def test_every_token_has_the_fields_of_its_sequence_and_position() -> None:
    lengths = torch.tensor([3, 2])
    batch = make_batch(TOKENS_BS.numpy(), TOKENS_BS.numpy() + 1, lengths.numpy(), lengths.numpy() + 40,
                       lengths.numpy() - 2, None)
    context = step_context(11, 4, batch, per_sequence=True)
    assert context[:4] == (True, 4, 11, "") and context.draw == 0
    told = {"token_ids_T": [5, 6, 7, 8, 9, 0], "sample_ids_T": [43] * 3 + [42] * 3,
            "positions_T": [0, 1, 2] * 2, "domains_T": [1] * 3 + [0] * 3, "valid_T": [True] * 5 + [False],
            "seq_offsets": [0, 3, 6]}
    for field, truth in told.items():
        assert getattr(context, field).tolist() == truth, field
    assert step_context(11, 4, batch).seq_offsets is None


def test_positions_go_on_behind_a_cache_and_what_is_not_known_is_none() -> None:
    context = token_context(TOKENS_BS[:1, :2], seed=0, step=9, training=False, first=5, draw=1,
                            sample_ids_B=torch.tensor([1 << 57]))
    assert context.positions_T.tolist() == [5, 6] and context.sample_ids_T.tolist() == [1 << 57] * 2
    assert context.valid_T.all() and context.domains_T is None and context.draw == 1


def test_no_other_place_builds_a_context() -> None:
    """A second one would tell routers less in evaluation or generation than in training."""
    places = [path for path in (ROOT / "moetrain").rglob("*.py") if "RouterContext(" in path.read_text()]
    assert sorted(path.name for path in places) == ["base.py", "context.py"]
