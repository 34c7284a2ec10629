"""The libraries of the extra `batch`, and what to say when they are not there."""

import importlib
from types import ModuleType

from jaxinfer.errors import ConfigError


def _import(module: str, *, package: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {package}, which is not installed ({error}). "
            "Install it: pip install 'jaxinfer[batch]'."
        ) from error


def pyarrow_parquet(path: str) -> ModuleType:
    """`pyarrow.parquet`; raises ConfigError that names the extra."""
    return _import("pyarrow.parquet", package="pyarrow", purpose=f"{path}: Parquet")


def pyarrow() -> ModuleType:
    """`pyarrow`; raises ConfigError that names the extra."""
    return _import("pyarrow", package="pyarrow", purpose="Parquet")


def fsspec_core(path: str) -> ModuleType:
    """`fsspec.core`; raises ConfigError that names the extra."""
    return _import("fsspec.core", package="fsspec", purpose=f"{path}: a URL")
