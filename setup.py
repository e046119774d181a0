"""Builds csrc/ into cascadeops/_C (CPU kernels and operator schemas) and cascadeops/_C_cuda (CUDA kernels)."""

from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

cpu = CppExtension(
    "cascadeops._C",
    ["csrc/library.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
    include_dirs=["csrc"],
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000")],
    extra_compile_args=["-O3", "-std=c++17", "-Wall", "-Wextra", "-ffp-contract=off", "-fvisibility=hidden"],
    py_limited_api=True,
)
setup(ext_modules=[cpu], cmdclass={"build_ext": BuildExtension})
