"""The only reader of the environment. Everything else gets these values through the config."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Root of what jaxinfer keeps between runs: $JAXINFER_CACHE, else $XDG_CACHE_HOME/jaxinfer."""
    own = os.environ.get("JAXINFER_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "jaxinfer"


def api_key() -> str | None:
    """$JAXINFER_API_KEY: a key for clients that must not stand on the command line."""
    return os.environ.get("JAXINFER_API_KEY") or None


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of this process with `changes`, for a process that it starts."""
    return {**os.environ, **changes}


def reserve_gpu_memory(fraction: float) -> None:
    """Has XLA take so much of each GPU's memory, instead of its usual 3/4; what is set stays set.

    JAX knows no other way to say it. Without effect once JAX has looked for devices.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = str(fraction)


def compiler_flags() -> str:
    """$XLA_FLAGS and $LIBTPU_INIT_ARGS: XLA reads them itself; compiled programs depend on them."""
    return " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
