"""Programs are compiled in parallel before the engine is ready, and every later one is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.runner.compiler import CompileCounter, Program, compile_all, compiler_options


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def add(size: int) -> Program:
    return Program(function=lambda x, y: x + y, args=(abstract(size), abstract(size)), donate=())


def test_all_are_compiled_with_progress():
    calls = []
    compiled = compile_all(
        {str(size): add(size) for size in (2, 3, 5)},
        compiler_options("cpu", num_workers=2),
        num_workers=2,
        on_done=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for size in (2, 3, 5):
        x = jnp.arange(size, dtype=jnp.float32)
        np.testing.assert_array_equal(compiled[str(size)](x, x), 2 * x)
    with pytest.raises(TypeError):
        compiled["2"](jnp.zeros(3, jnp.float32), jnp.zeros(3, jnp.float32))


def test_donated_arguments_are_used_up():
    program = Program(function=lambda x: x + 1, args=(abstract(64),), donate=(0,))
    compiled = program.compile(compiler_options("cpu", num_workers=2))
    x = jnp.zeros(64, jnp.float32)
    compiled(x)
    assert x.is_deleted()


def test_an_option_that_the_compiler_does_not_know_is_left_out(caplog: pytest.LogCaptureFixture):
    options = {"xla_backend_optimization_level": 1, "xla_no_such_option": True}
    compiled = add(4).compile(options)
    np.testing.assert_array_equal(compiled(np.ones(4, np.float32), np.ones(4, np.float32)), 2.0)
    assert "does not know xla_no_such_option: compiled without" in caplog.text
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_backend_optimization_level"):
        add(4).compile({"xla_backend_optimization_level": "many"})


def test_the_first_error_is_raised():
    def broken(x: jax.Array) -> jax.Array:
        raise RuntimeError("no such layer")

    programs = {"good": add(7), "bad": Program(function=broken, args=(abstract(2),), donate=())}
    with pytest.raises(RuntimeError, match="no such layer"):
        compile_all(
            programs,
            compiler_options("cpu", num_workers=2),
            num_workers=2,
            on_done=lambda done, total: None,
        )


def test_compilations_after_ready_are_counted():
    counter = CompileCounter()
    jax.jit(lambda x: x * 3)(np.arange(11.0, dtype=np.float32))
    counter.mark_ready()
    assert counter.num_after_ready == 0
    triple = jax.jit(lambda x: x * 3)
    triple(np.arange(13.0, dtype=np.float32))
    first = counter.num_after_ready
    assert first > 0
    triple(np.arange(13.0, dtype=np.float32))
    assert counter.num_after_ready == first, "the second call compiles nothing"
    triple(np.arange(17.0, dtype=np.float32))
    assert counter.num_after_ready > first, "another shape does"
