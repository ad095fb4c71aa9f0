"""Words behind verbs with keys of their own: every one that cannot be read is named."""

import pytest

from moetrain.cli.key_words import byte_count, one_of, read_words
from moetrain.errors import ConfigError, ConfigErrors

KEYS = {"out": "DIR", "dtype": "bfloat16"}


def test_words_are_sorted() -> None:
    found = read_words("export", ["mine", "out=a=b", "--json", "model.dim=4"], KEYS, sections=("model",))
    assert found == (["mine"], {"out": "a=b"}, ["model.dim=4"], True)


def test_all_mistakes_are_named_together() -> None:
    with pytest.raises(ConfigErrors) as found:
        read_words("export", ["dtypo=x", "out=", "dtype=a", "dtype=b", "--quick"], KEYS)
    said = [(error.id, error.what.rpartition(" ")[2], error.next) for error in found.value.errors]
    assert said == [("E-CONFIG-317", "dtypo=x", "dtype=bfloat16"), ("E-CONFIG-317", "out=", "out=DIR"),
                    ("E-CONFIG-317", "dtype=b", "dtype=bfloat16"),
                    ("E-CONFIG-317", "--quick", "out=DIR or dtype=bfloat16")]


@pytest.mark.parametrize("text, number", [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("10", 10),
                                          ("2kb", 2000)])
def test_a_size_is_read(text: str, number: int) -> None:
    assert byte_count("shard_size", text) == number


@pytest.mark.parametrize("text", ["", "big", "0", "-1GB", "5XB", "nanGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        byte_count("shard_size", text)


def test_a_value_is_one_of_several() -> None:
    assert one_of("verify", "true", ("true", "false")) == "true"
    with pytest.raises(ConfigError) as found:
        one_of("dtype", "bfloat", ("float32", "bfloat16"))
    assert found.value.next == "dtype=bfloat16"
