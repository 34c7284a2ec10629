"""A byte tokenizer (token id = byte), small configurations, engines over the fake device."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfer.config.schema import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.engine.client import ProcessClient
from jaxinfer.engine.inproc import InProcessClient
from jaxinfer.engine.offline import LLM
from jaxinfer.tokenizer.tokenizer import Tokenizer, load_tokenizer

FAKE = "tests.engine.fake_runner:"


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


async def until(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    """Returns when the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    for _ in itertools.count():
        if condition():
            return
        assert time.monotonic() < deadline_s, "it never came true"
        await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(f"<{name}>", special=True) for name in ("eos", "b", "c")]
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": '
        '"{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"}'
    )
    return load_tokenizer(directory)


@pytest.fixture
def config() -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model="fake", max_model_len=64),
        cache=CacheConfig(block_size=8),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    )


EngineMaker = Callable[..., AbstractAsyncContextManager[AsyncEngine]]


@pytest.fixture
def running_engine(tokenizer: Tokenizer, config: EngineConfig) -> EngineMaker:
    """`async with running_engine(factory="build_slow") as engine`: a core in a real process."""

    @asynccontextmanager
    async def make(factory: str = "build_runner", **scheduler: int) -> AsyncIterator[AsyncEngine]:
        own = replace(config, scheduler=replace(config.scheduler, **scheduler))
        client = ProcessClient(own, runner_factory=FAKE + factory)
        engine = AsyncEngine(client, tokenizer, "fake")
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()

    return make


@pytest.fixture
def llm(tokenizer: Tokenizer, config: EngineConfig) -> Iterator[LLM]:
    with LLM.from_parts(
        InProcessClient(config, runner_factory=FAKE + "build_runner"), tokenizer
    ) as llm:
        yield llm
