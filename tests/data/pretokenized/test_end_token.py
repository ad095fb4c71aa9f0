"""The id that closes a document: from documents, tokenizer or config; contradictions are refused."""

import pytest

from moetrain.data.pretokenized.end_token import Endings, closing_id, open_tokenizer
from moetrain.data.tokenizers.tokenizer import ByteTokenizer
from moetrain.errors import DataError

CLOSED = Endings("web", documents=1000, id=7, share=0.99, inside=3)
OPEN = Endings("open", documents=1000, id=13, share=0.4, inside=9000)
LINES = Endings("lines", documents=1000, id=10, share=1.0, inside=40_000)  # every document ends its last line


def test_documents_that_almost_all_end_in_one_id_are_closed_by_it() -> None:
    assert closing_id([CLOSED], typed=None, encoder=None) == 7
    assert CLOSED._replace(share=0.94).closing is None and CLOSED._replace(documents=7).closing is None
    assert LINES.closing is None  # an id that occurs inside closes nothing
    assert closing_id([CLOSED, OPEN], typed=None, encoder=None) == 7


def test_a_tokenizer_that_ends_texts_otherwise_is_refused_with_both_ids() -> None:
    encoder = ByteTokenizer()
    with pytest.raises(DataError) as caught:
        closing_id([OPEN, CLOSED], typed=None, encoder=encoder)
    error = caught.value
    assert (error.id == "E-DATA-163" and error.where == "web" and "99.0%" in error.why and "id 7" in error.why
            and "256" in error.why)
    assert error.next.startswith("data.end_token=7")
    assert closing_id([CLOSED._replace(id=256)], typed=None, encoder=encoder) == 256
    with pytest.raises(DataError, match="E-DATA-163"):                         # of two trainers
        closing_id([CLOSED, CLOSED._replace(where="b", id=8)], typed=None, encoder=None)


def test_what_is_typed_decides_and_the_tokenizer_follows(caplog: pytest.LogCaptureFixture) -> None:
    encoder, typed = open_tokenizer("bytes", "7")
    assert closing_id([CLOSED], typed=typed, encoder=encoder) == 7 == encoder.end_id and not caplog.text
    assert ByteTokenizer().end_id == 256
    assert closing_id([CLOSED], typed=9, encoder=None) == 9 and "id 7, data.end_token says 9" in caplog.text
    caplog.clear()
    assert closing_id([OPEN], typed=None, encoder=ByteTokenizer()) == 256 and "--append-eod" in caplog.text
