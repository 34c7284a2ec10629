"""XLA flags with which tests compile; processes that tests start inherit them. Imports nothing.

Compiling costs these tests more than running. The flags switch off what makes CPU programs fast,
not what makes them right. Without the fusion emitters small programs compile two to three times as
fast, but a step of thirty layers takes half as long again: tests of the real model use no flags.
"""

QUICK_XLA_FLAGS = (
    "--xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
