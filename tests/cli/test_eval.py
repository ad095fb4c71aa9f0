"""The table of `moetrain eval`."""

from moetrain.cli.eval import table


def test_the_table_has_a_row_per_domain_and_a_column_per_order() -> None:
    results = {"loss/python": 1.5, "nats_per_byte/python": 1.25, "loss/mean": 1.5, "nats_per_byte/mean": 1.25}
    plain = table(results, {}).splitlines()
    assert [line.split() for line in plain[1:]] == [["python", "1.5000", "1.8034", "1.2500"],
                                                    ["mean", "1.5000", "1.8034", "1.2500"]]
    wide = table(results, {"python": [3.0, 2.0], "mean": [3.0, 2.0]}).splitlines()
    assert wide[0].endswith("order 1")
    assert wide[1].split() == ["python", "1.5000", "1.8034", "1.2500", "3.0000", "2.0000"]
    assert len({len(line) for line in wide}) == 1
