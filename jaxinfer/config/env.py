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


def compiler_flags() -> str:
    """$XLA_FLAGS and $LIBTPU_INIT_ARGS: XLA reads them itself; compiled programs depend on them."""
    return " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
