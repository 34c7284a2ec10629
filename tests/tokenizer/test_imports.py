"""The HTTP process imports this package: it must stay light."""

import subprocess
import sys
from pathlib import Path

from tests.tokenizer.makers import byte_level, save

HEAVY = ("jax", "torch", "transformers", "gguf", "numpy")
SCRIPT = """
import sys
from jaxinfer.tokenizer.bad_words import bad_words_to_token_ids
from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.stop import StopStrings
from jaxinfer.tokenizer.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
ids = tokenizer.encode("Hello")
assert IncrementalDetokenizer(tokenizer, []).append(ids) == "Hello"
assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "x"
print(sorted(set(sys.argv[2:]) & set(sys.modules)))
"""


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    directory = save(byte_level(), tmp_path, chat_template="{{ messages[0].content }}")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory), *HEAVY],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
