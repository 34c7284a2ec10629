"""Compiles the C++ kernels for every level of this architecture, to be shipped.

    python -m pallas_kernels.native.prebuild [DIRECTORY] [HEAD_DIM ...]

For images whose last stage has no compiler. Without DIRECTORY the libraries go where
`load_native_kernels` looks for shipped ones. Knows which sizes of heads are common; not which
machine will run what it makes.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pallas_kernels.native.levels import levels_of
from pallas_kernels.native.library import (
    PAGE_BITS,
    SHIPPED,
    attention_macros,
    build_library,
)

HEAD_DIMS = (64, 96, 128, 256)


def prebuild(directory: Path = SHIPPED, head_dims: Sequence[int] = HEAD_DIMS) -> list[Path]:
    """The libraries, compiled side by side. Raises BuildError if one does not compile."""
    attention = [
        ("paged_attention", attention_macros(head_dim, page_dtype))
        for head_dim in head_dims
        for page_dtype in PAGE_BITS
    ]
    kernels: list[tuple[str, tuple[str, ...]]] = [("matmul", ()), *attention]
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="native") as pool:
        made = [
            pool.submit(build_library, directory, name, macros, level)
            for level in levels_of()
            for name, macros in kernels
        ]
        return [library.result() for library in made]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    target = Path(arguments[0]) if arguments else SHIPPED
    sizes = tuple(map(int, arguments[1:])) or HEAD_DIMS
    libraries = prebuild(target, sizes)
    sys.stdout.write(f"{target}: {len(libraries)} libraries\n")
