"""Builds the native CPU kernels. All else about the package is in pyproject.toml.

The extension is a plain shared library with a C interface, not a Python module: no headers of
Python or torch are needed, and where no compiler is, the install goes on without it.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("kernels", "manylora_kernels", "native", "src")

setup(
    ext_modules=[
        Extension(
            "manylora_kernels.native._cpu",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                # Fused multiply-adds only where the source says so: results must not depend on
                # what a compiler fuses.
                "-ffp-contract=off",
                "-fno-math-errno",
                # GCC 12 takes the undefined inputs of its own AVX-512 headers for mistakes.
                "-Wno-maybe-uninitialized",
                "-Wno-uninitialized",
            ],
            optional=True,
            py_limited_api=True,
        )
    ]
)
