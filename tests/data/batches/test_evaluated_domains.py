"""What held-out loss is told of: at most 33 names."""

from moetrain.data.batches.evaluated_domains import MOST_NAMED, OTHERS, measured_parts


def test_few_domains_are_named_all() -> None:
    domains = [f"d{number}" for number in range(MOST_NAMED + 1)]
    assert ([tuple(part) for part in measured_parts(domains, [0] * len(domains))]
            == [(name, [i]) for i, name in enumerate(domains)])


def test_of_many_the_largest_are_named_and_the_rest_are_one() -> None:
    domains = [f"d{number}" for number in range(2000)]
    parts = measured_parts(domains, [1 + number % 100 for number in range(2000)])
    assert (len(parts) == MOST_NAMED + 1 and parts[-1].name == OTHERS
            and len(parts[-1].domains) == 2000 - MOST_NAMED)
    assert [part.domains[0] % 100 for part in parts[:-1]] == [98, 99] * 12 + [99] * 8
    assert sorted(domain for part in parts for domain in part.domains) == list(range(2000))


def test_the_rest_has_a_name_that_no_domain_has() -> None:
    domains = [OTHERS, f"{OTHERS} (pooled)", *(f"d{number}" for number in range(40))]
    assert measured_parts(domains, [9] * 42)[-1].name == f"{OTHERS} (pooled) (pooled)"
