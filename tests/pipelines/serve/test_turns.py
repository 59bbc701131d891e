"""Who may use a shared engine, and when it changes.

Oracle: a pretended engine that notes which weights it has while each request runs.
"""

import asyncio
import random
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.serve.names import Version
from pipelines.serve.turns import Turns

A, B, C = (Version(name * 32, f"/models/{name}") for name in "abc")


class Engine:
    """Changes its weights slowly; refuses those that are bad."""

    def __init__(self, swap_s: float = 0.01, bad: Version | None = None) -> None:
        self.version, self.swaps, self._swap_s, self._bad = A, 0, swap_s, bad
        self.running = 0

    async def swap(self, version: Version) -> None:
        assert self.running == 0, "weights changed under a request"
        if version == self._bad:
            raise InputError("bad weights")
        await asyncio.sleep(self._swap_s)
        self.version = version
        self.swaps += 1


async def ask(turns: Turns, engine: Engine, version: Version, seconds: float) -> float:
    """One request; returns how long it waited."""
    came = time.monotonic()
    async with turns.of(version):
        waited = time.monotonic() - came
        engine.running += 1
        try:
            assert engine.version == version
            await asyncio.sleep(seconds)
            assert engine.version == version
        finally:
            engine.running -= 1
    return waited


def test_requests_for_the_weights_in_the_engine_do_not_wait() -> None:
    async def run() -> None:
        engine = Engine()
        turns = Turns(engine.swap, A, turn_s=1)
        began = time.monotonic()
        await asyncio.gather(*(ask(turns, engine, A, 0.05) for _ in range(20)))
        assert time.monotonic() - began < 0.5
        assert engine.swaps == 0

    asyncio.run(run())


def test_an_idle_engine_changes_at_once() -> None:
    async def run() -> None:
        engine = Engine()
        turns = Turns(engine.swap, A, turn_s=10)
        assert await ask(turns, engine, B, 0) < 1
        assert (turns.version, engine.swaps) == (B, 1)

    asyncio.run(run())


def test_a_steady_stream_for_one_model_does_not_keep_another_out() -> None:
    """Without turns the engine would never be free of requests for A."""

    async def run() -> None:
        engine = Engine()
        turns = Turns(engine.swap, A, turn_s=0.1)
        stop = time.monotonic() + 1.5

        async def stream() -> None:
            while time.monotonic() < stop:
                await ask(turns, engine, A, 0.03)

        streams = [asyncio.create_task(stream()) for _ in range(8)]
        await asyncio.sleep(0.2)
        assert await ask(turns, engine, B, 0.01) < 0.5
        await asyncio.gather(*streams)

    asyncio.run(run())


def test_requests_of_one_model_share_a_turn() -> None:
    async def run() -> None:
        engine = Engine()
        turns = Turns(engine.swap, A, turn_s=0.2)
        versions = [A, B, C] * 10
        await asyncio.gather(*(ask(turns, engine, v, 0.02) for v in versions))
        assert engine.swaps == 2

    asyncio.run(run())


def test_four_models_wait_within_the_bound() -> None:
    async def run() -> None:
        engine, turn_s, longest, swap_s = Engine(0.01), 0.05, 0.02, 0.01
        turns = Turns(engine.swap, A, turn_s)
        models = [Version(str(number) * 32, str(number)) for number in range(4)]
        drawn = random.Random(0)
        stop = time.monotonic() + 2
        waits: list[float] = []

        async def client() -> None:
            while time.monotonic() < stop:
                waits.append(await ask(turns, engine, drawn.choice(models), longest))

        await asyncio.gather(*(client() for _ in range(12)))
        assert engine.swaps > 20
        assert max(waits) < len(models) * (turn_s + longest + swap_s) + 0.3

    asyncio.run(run())


def test_bad_weights_fail_for_those_who_want_them_alone() -> None:
    async def run() -> None:
        engine = Engine(bad=B)
        turns = Turns(engine.swap, A, turn_s=0.05)
        results = await asyncio.gather(
            *(ask(turns, engine, v, 0.01) for v in (A, B, A, B)), return_exceptions=True
        )
        assert [isinstance(each, InputError) for each in results] == [False, True, False, True]
        assert await ask(turns, engine, A, 0) < 0.5

    asyncio.run(run())


def test_an_order_goes_before_what_waits() -> None:
    async def run() -> None:
        engine = Engine()
        turns = Turns(engine.swap, A, turn_s=10)
        running = asyncio.create_task(ask(turns, engine, A, 0.1))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(ask(turns, engine, C, 0.01))
        await asyncio.sleep(0.01)
        await turns.become(B)
        assert turns.version == B and running.done()
        await waiting
        assert turns.version == C

    asyncio.run(run())


def test_who_gives_up_is_forgotten() -> None:
    async def run() -> None:
        engine = Engine()
        turns = Turns(engine.swap, A, turn_s=0.05)
        running = asyncio.create_task(ask(turns, engine, A, 0.1))
        await asyncio.sleep(0.01)
        given_up = asyncio.create_task(ask(turns, engine, B, 0))
        await asyncio.sleep(0.01)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await running
        assert (turns.running, turns.waiting, engine.swaps) == (0, 0, 0)

    asyncio.run(run())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([A, B, C]),
            st.floats(0, 0.02),  # when it comes
            st.floats(0, 0.01),  # how long it takes
            st.booleans(),  # whether it gives up after a while
        ),
        min_size=1,
        max_size=20,
    )
)
def test_whatever_comes_no_answer_is_made_by_two_and_none_is_left(asked: list) -> None:
    async def one(turns: Turns, engine: Engine, version, delay, seconds, gives_up) -> None:
        await asyncio.sleep(delay)
        work = asyncio.create_task(ask(turns, engine, version, seconds))
        if gives_up:
            await asyncio.sleep(0.004)
            work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    async def run() -> None:
        engine = Engine(0.002)
        turns = Turns(engine.swap, A, turn_s=0.005)
        await asyncio.wait_for(asyncio.gather(*(one(turns, engine, *each) for each in asked)), 5)
        await asyncio.sleep(0.02)
        assert (turns.running, turns.waiting) == (0, 0)

    asyncio.run(run())
