"""`generate` and `chat` with the real model, as a user runs them: processes, pipes, exit codes."""

from pathlib import Path

import pytest

from tests.cli.small_engine import run_with_small_engine

pytestmark = pytest.mark.model


@pytest.mark.slow  # the next one differs by the chat template only
def test_generate_completes_a_prompt(smollm2_gguf: Path):
    argv = ["-p", "The capital of France is", "--temperature", "0", "--max-tokens", "8"]
    result = run_with_small_engine("generate", str(smollm2_gguf), *argv)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_generate_takes_a_chat_message_from_stdin(smollm2_gguf: Path):
    argv = ["--chat", "--temperature", "0", "--max-tokens", "24"]
    question = "What is the capital of France?"
    result = run_with_small_engine("generate", str(smollm2_gguf), *argv, stdin=question)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "assistant" not in result.stdout


def test_chat_answers_each_line_and_survives_a_line_that_is_too_long(smollm2_gguf: Path):
    lines = [
        "What is the capital of France?",
        "long " * 400,  # above the context: refused, and the conversation goes on
        "/reset",
        "/nonsense",
        "What is the capital of Japan?",
        "/exit",
        "never read",
    ]
    argv = ["--temperature", "0", "--max-tokens", "24"]
    result = run_with_small_engine("chat", str(smollm2_gguf), *argv, stdin="\n".join(lines))
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "Tokyo" in result.stdout
    assert "maximum context length" in result.stderr
    assert "Unknown command /nonsense" in result.stderr
