"""Builds the optional C++/CUDA extension in `csrc/`. All metadata is in pyproject.toml.

FASTALIGN_BUILD_EXT=0    skips the extension; everything then works in PyTorch alone.
TORCH_CUDA_ARCH_LIST     GPU architectures, 8.0;9.0;10.0+PTX by default, whatever GPU is visible.
CUDA_HOME                the CUDA toolkit, if nvcc is not on the PATH.
"""

import os
import shlex
import shutil
from pathlib import Path

from setuptools import setup

SWITCH = "FASTALIGN_BUILD_EXT"
HEADERS = ["csrc/masks.h", "csrc/philox.h"]
# No fused multiply-adds: they round once where PyTorch rounds twice, which would change masks in rare cases.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "--threads=2", "-Xcompiler=-fvisibility=hidden"]
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030A0000")]


def say(text: str) -> None:
    """Report what happens to the extension, in one line."""
    print(f"fastalign: {text}", flush=True)


def toolkit() -> str | None:
    """The directory of a CUDA toolkit with nvcc and headers; an nvcc on the PATH may be a wrapper."""
    nvcc = shutil.which("nvcc")
    named = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and Path(nvcc).resolve().parents[1],
    ]
    for folder in filter(None, [*named, "/usr/local/cuda"]):
        if Path(folder, "bin/nvcc").exists() and Path(folder, "include/cuda_runtime.h").exists():
            return str(folder)
    return None


def cuda_version(torch, home: str | None) -> int:
    """The toolkit's version, such as 13000 for 13.0; 0 unless it matches the major version torch was built with."""
    if not (torch.version.cuda and home):
        return 0
    header = Path(home, "include/cuda_runtime_api.h").read_text(errors="replace")
    version = int(header.partition("#define CUDART_VERSION")[2].split()[0])
    return version if version // 1000 == int(torch.version.cuda.split(".")[0]) else 0


def extension() -> dict:
    """Arguments of `setup` for the extension; empty if it is not built."""
    if os.environ.get(SWITCH, "1") == "0":
        say(f"no C++/CUDA extension, because {SWITCH}=0")
        return {}
    if not shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]):
        say("no C++/CUDA extension, because there is no C++ compiler (CXX or c++)")
        return {}
    if home := toolkit():
        os.environ["CUDA_HOME"] = home  # torch would use the wrapper's parent directory
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        say("no C++/CUDA extension, because torch is not importable: pip install --no-build-isolation")
        return {}
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        say(f"no C++/CUDA extension, because torch {torch.__version__} is older than 2.11")
        return {}

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"fastalign: csrc/ did not compile ({error}); {SWITCH}=0 installs without the extension"
                ) from error

    cuda = cuda_version(torch, home)
    sources = ["csrc/ops.cpp", "csrc/masks_cpu.cpp"]
    options = {"define_macros": list(MACROS), "extra_compile_args": {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}}
    if cuda:
        blackwell = cuda >= 12080  # the first nvcc that supports it
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if blackwell else "8.0;9.0+PTX")
        sources.append("csrc/masks_cuda.cu")
        options["define_macros"] += [("USE_CUDA", None), ("FASTALIGN_CUDA", None)]
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = kind("fastalign._C", sources, depends=HEADERS, py_limited_api=True, **options)
    say(f"building the extension in {'C++ and CUDA' if cuda else 'C++ only'}")
    return {
        "ext_modules": [module],
        # Without ninja, so that every machine builds the same way; there are only three files.
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
