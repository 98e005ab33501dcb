"""The OpenAI-compatible server on loopback: the same tokens; a storm of requests that loses none and leaks nothing."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.vllm.conftest import Pair
from tests.vllm.engine import ENVIRONMENT, GIB
from tests.vllm.reference import greedy
from tests.vllm.test_real import BATCH, prompts

CONTEXT, NEW = 2048, 8
REQUESTS, AT_ONCE = 200, 16
CANCELLED, TOO_LONG = 3, 7
"""Of ten requests, which one is cancelled and which is refused."""


class Server:
    """A running server."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.model, self.log = f"http://127.0.0.1:{port}", str(model), log
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--host", "127.0.0.1",
            "--port", port, "--dtype", "float32", "--enforce-eager", "--max-model-len", CONTEXT,
            "--max-num-batched-tokens", BATCH, "--max-num-seqs", AT_ONCE // 2, "--kv-cache-memory-bytes", GIB,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=log.open("w"), stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT
        )

    async def wait(self) -> None:
        """Until it answers."""
        async with aiohttp.ClientSession() as http:
            for _ in range(600):
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                try:
                    async with http.get(f"{self.url}/health") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def body(self, prompt: list[int], **more) -> dict:
        return {"model": self.model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True} | more  # fmt: skip


@pytest.fixture(scope="module")
def server(smollm2: Pair, tmp_path_factory) -> Iterator[Server]:
    running = Server(smollm2.converted, tmp_path_factory.mktemp("server") / "log")
    try:
        asyncio.run(running.wait())
        yield running
    finally:
        running.process.terminate()
        running.process.wait(60)


async def gauges(server: Server, http) -> dict[str, float]:
    async with http.get(f"{server.url}/metrics") as answer:
        text = await answer.text()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: float(re.search(rf"^vllm:{name}\{{.*?\}} (\S+)$", text, re.MULTILINE)[1]) for name in names}


def test_the_server_shares_without_being_told(server: Server):
    log = server.log.read_text()
    assert "cla-convert: 16 of 30 layers keep keys and values" in log
    assert "trust_remote_code=False" in log
    assert int(re.search(r"KV cache size: ([\d,]+) tokens", log)[1].replace(",", "")) == 341 * 128


def test_completions_and_chat(server: Server, smollm2: Pair):
    asked = prompts(smollm2.converted)
    expected = [answer["tokens"] for answer in greedy(smollm2.converted, asked, NEW)]

    async def ask() -> tuple[list, dict]:
        async with aiohttp.ClientSession() as http:

            async def one(prompt: list[int]) -> list[int]:
                async with http.post(f"{server.url}/v1/completions", json=server.body(prompt)) as answer:
                    return (await answer.json())["choices"][0]["token_ids"]

            found = await asyncio.gather(*map(one, asked))
            talk = {"model": server.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            async with http.post(f"{server.url}/v1/chat/completions", json=talk) as answer:
                assert answer.status == 200
                return found, await answer.json()

    found, said = asyncio.run(ask())
    assert found == expected
    assert said["usage"]["completion_tokens"] == 4


def test_a_storm_of_requests(server: Server, smollm2: Pair):
    asked = [[*range(100 + 20 * i, 140 + 25 * i)] for i in range(10)]
    expected = [answer["tokens"] for answer in greedy(smollm2.converted, asked, NEW)]

    async def one(i: int, http, room: asyncio.Semaphore) -> tuple[int, str, list[int]]:
        prompt, kind = asked[i % 10], i % 10
        async with room:
            if kind == TOO_LONG:
                async with http.post(f"{server.url}/v1/completions", json=server.body(prompt * 100)) as answer:
                    return i, "refused" if answer.status == 400 else f"status {answer.status}", []
            if kind == CANCELLED:
                body = server.body(prompt, stream=True, max_tokens=500)
                async with http.post(f"{server.url}/v1/completions", json=body) as answer:
                    async for line in answer.content:
                        if line.startswith(b"data: "):
                            answer.close()  # the client goes away in the middle
                            return i, "cancelled", json.loads(line[6:])["choices"][0]["token_ids"]
            async with http.post(f"{server.url}/v1/completions", json=server.body(prompt)) as answer:
                if answer.status != 200:
                    return i, f"status {answer.status}", []
                return i, "answered", (await answer.json())["choices"][0]["token_ids"]

    async def storm() -> tuple[list, dict]:
        room = asyncio.Semaphore(AT_ONCE)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(900)) as http:
            results = await asyncio.gather(*(one(i, http, room) for i in range(REQUESTS)))
            deadline = time.monotonic() + 120
            while any((state := await gauges(server, http)).values()) and time.monotonic() < deadline:
                await asyncio.sleep(1)
            return results, state

    results, state = asyncio.run(storm())
    for i, outcome, tokens in results:
        wanted = {CANCELLED: "cancelled", TOO_LONG: "refused"}.get(i % 10, "answered")
        assert outcome == wanted, i
        if wanted == "answered":
            assert tokens == expected[i % 10], i
    assert len(results) == REQUESTS
    assert state == {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
