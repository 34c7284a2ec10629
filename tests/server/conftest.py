"""A real HTTP server, engine front end and tokenizer around a fake core."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxinfer.config.schema import ServerConfig
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.server.app import create_app, make_runner
from jaxinfer.server.state import STATE, ServerState
from jaxinfer.tokenizer.tokenizer import load_tokenizer
from tests.server.fake_core import FakeCore

MODEL = "tiny"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token id = byte value; 256.. are special."""
    symbols = pre_tokenizers.ByteLevel.alphabet()
    # ByteLevel's alphabet: printable bytes stand for themselves, the others for U+0100 on.
    printable = [byte for byte in range(256) if chr(byte) in symbols and byte < 256]
    names = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in names]
    names |= {byte: chr(256 + index) for index, byte in enumerate(rest)}
    vocab = {names[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@dataclass(kw_only=True)
class Served:
    """A running server, and both ends of it."""

    url: str
    core: FakeCore
    engine: AsyncEngine
    state: ServerState
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and JSON (or the frames of a stream)."""
        async with self.http.post(self.url + path, json=body, **options) as response:
            if response.content_type == "text/event-stream":
                return response.status, frames(await response.text())
            return response.status, await response.json()

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        async with self.http.get(self.url + path, **options) as response:
            return response.status, await response.text()

    async def still_works(self) -> None:
        """A request is served, and nothing is left over in the core."""
        body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
        status, answer = await self.post("/v1/completions", body)
        assert status == 200, answer
        assert len(answer["choices"][0]["text"]) == 2
        assert not self.core.open


def frames(text: str) -> list[Any]:
    """The data of each event, "[DONE]" as text."""
    events = text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events), text
    data = [event.removeprefix("data: ") for event in events]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(tokenizer_dir: Path) -> AsyncIterator[Serve]:
    """Starts servers; keywords are fields of ServerConfig, or options named below."""
    started: list[tuple[Served, web.AppRunner]] = []

    async def start(*, policy: str = "fcfs", defaults: Any = None, **config: Any) -> Served:
        core = FakeCore(scheduling_policy=policy)
        engine = AsyncEngine(core, load_tokenizer(tokenizer_dir), MODEL)
        await engine.start()
        settings = replace(ServerConfig(port=0), **config)
        app = create_app(engine, settings, sampling_defaults=defaults)
        runner = make_runner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = "http://127.0.0.1:{1}".format(*runner.addresses[0])
        key = settings.api_key[0] if settings.api_key else "none"
        served = Served(
            url=url,
            core=core,
            engine=engine,
            state=app[STATE],
            http=aiohttp.ClientSession(),
            openai=openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0),
        )
        started.append((served, runner))
        return served

    yield start
    for served, runner in started:
        await served.http.close()
        await served.openai.close()
        await served.engine.close()
        await runner.cleanup()


@pytest.fixture
async def served(serve: Serve) -> Served:
    return await serve()
