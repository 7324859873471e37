"""Makes the contenders of each row for the pytest-benchmark suites: ``pytest bench/``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.registry import rows_on
from bench.results import build_calls, failing_ops
from bench.row import Call, Row
from bench.timing import thread_count


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--quick``: small sizes, to see that everything runs."""
    parser.addoption("--quick", action="store_true", help="bench: small sizes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contender of each row of the file's suite."""
    if "contender" not in metafunc.fixturenames:
        return
    suite = metafunc.module.__name__.rpartition("test_")[2]
    pairs = [(row, name) for row in rows_on("cpu") if row.suite == suite for name in row.contenders]
    ids = [f"{row.name}-{name}" for row, name in pairs]
    metafunc.parametrize(("row", "contender"), pairs, ids=ids, scope="module", indirect=["row"])


# Many rows share their ops, and a check takes a second.
_failing_ops = cache(failing_ops)


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    """The row under measurement, refused where an op of it gives wrong values."""
    row: Row = request.param
    for op, sentence in _failing_ops(row.ops).items():
        pytest.fail(f"{op} is not timed: its values are wrong. {sentence}", pytrace=False)
    return row


@pytest.fixture(scope="module")
def calls(row: Row, request: pytest.FixtureRequest) -> Iterator[dict[str, Call]]:
    """The row's contenders on one set of inputs, with the row's thread count set."""
    size = row.quick_size if request.config.getoption("--quick") else row.size
    with thread_count(row.threads or torch.get_num_threads()):
        yield build_calls(row, size)


@pytest.fixture
def timed(
    calls: dict[str, Call], row: Row, contender: str, benchmark: BenchmarkFixture
) -> Callable[[], None]:
    """Times one contender, grouped by row, with the row's bytes and operations noted."""
    call = calls[contender]
    call()  # what compiles does so before the clock starts

    def run() -> None:
        benchmark.group = row.name
        benchmark.extra_info.update(contender=contender, roof=row.roof, streams=row.streams)
        benchmark(call)

    return run
