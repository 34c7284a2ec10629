"""Flags of an engine that starts fast; the same for all tests here, so that it compiles once."""

SMALL_ENGINE = (
    "--max-model-len=256",
    "--max-num-seqs=2",
    "--max-num-batched-tokens=64",
    "--num-gpu-blocks-override=64",
)
