"""Builds csrc/ into cascadeops/_C.abi3.so (CPU kernels, schemas) and cascadeops/_C_cuda.abi3.so (CUDA kernels).

Environment:
    CASCADEOPS_CUDA                 auto (default): CUDA kernels when nvcc is found; 0: never; 1: fail without nvcc
    CASCADEOPS_CUDA_ARCHITECTURES   default: those of this machine's GPUs, or "80;90+PTX" where there is none;
                                    +PTX also serves newer GPUs
    CUDA_HOME, CXX, MAX_JOBS        toolkit folder, C++ compiler, number of parallel compilations

The sources use the LibTorch stable ABI only. So the build reads torch's headers, whichever torch >= 2.10 they come from
and whether or not that torch knows CUDA, and its result loads under every torch >= 2.10 and every CPython >= 3.10.
That is why torch.utils.cpp_extension is not used here: it refuses CUDA sources beside a CPU-only torch.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 10)
OLDEST_GCC, OLDEST_CLANG, OLDEST_NVCC = 9, 9, (12, 0)
CPU_ONLY = "To build the CPU kernels alone, on purpose: CASCADEOPS_CUDA=0 pip install ."
OTHER_COMPILER = "Name another compiler: CXX=g++-12 pip install ."

# No contraction of a * b + c on either side, so that CPU and CUDA kernels round alike. Errno and floating-point traps
# are nothing that a kernel reads, and without them floor and comparisons vectorise: results are the same.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)]

OBJECTS = Path("build/objects")  # one place for every kind of build: setuptools deletes its own after editable ones
BUILD_INFO = "csrc/build_info.cpp"
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
CPU = Extension(
    "cascadeops._C",
    [BUILD_INFO, "csrc/library.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
    depends=HEADERS,
    py_limited_api=True,
)
CUDA = Extension(
    "cascadeops._C_cuda", [BUILD_INFO, *sorted(glob("csrc/cuda/*.cu"))], depends=HEADERS, py_limited_api=True
)


def fail(*sentences):
    """Ends the build with one message and no traceback (pip shows it as the last line of the build's output)."""
    raise SystemExit("\ncascadeops cannot be built: " + " ".join(sentences))


def output_of(command):
    """The text a program prints, or None where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def run(command):
    """Shows a command and runs it; True when it succeeded."""
    print(shlex.join(command) + "\n", end="", flush=True)
    return subprocess.run(command).returncode == 0


def find_torch():
    """(folder, version) of the torch whose headers are used; torch itself is not imported, which saves a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        fail("this Python has no torch. Leave out --no-build-isolation, or first: pip install 'torch>=2.10'.")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        fail(f"torch {version} is older than 2.10, the first with this stable ABI: pip install 'torch>=2.10'.")
    return Path(spec.submodule_search_locations[0]), version


def find_compiler():
    """(command, "GCC 12.2.0") of a C++17 compiler."""
    asked = os.environ.get("CXX")
    command = next(filter(shutil.which, [asked] if asked else ["g++", "c++", "clang++"]), None)
    if command is None:
        found = f"CXX={asked} is not a program" if asked else "no C++ compiler was found (g++, c++, clang++)"
        fail(f"{found}. Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++.")
    macros = output_of([command, "-std=c++17", "-dM", "-E", "-x", "c++", os.devnull])
    if macros is None:
        fail(
            f"{command} does not take -std=c++17; GCC >= {OLDEST_GCC} or clang >= {OLDEST_CLANG} does. {OTHER_COMPILER}"
        )
    value = dict(line.split(" ", 2)[1:] for line in macros.splitlines() if line.count(" ") >= 2)
    name, key, oldest = "GCC", "__GNUC__", OLDEST_GCC
    if "__clang__" in value:
        name, key, oldest = "clang", "__clang_major__", OLDEST_CLANG
    if int(value[key]) < oldest:
        fail(f"{command} is {name} {value[key]}, older than {oldest}. {OTHER_COMPILER}")
    return command, f"{name} {value['__VERSION__'].strip(chr(34))}"


def find_nvcc():
    """Path of nvcc, or None. It may be a link or a wrapper script: `find_toolkit` asks it where the toolkit is."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [f"{home}/bin" for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def find_toolkit(nvcc):
    """(nvcc, folder of libcudart_static.a, version) of the CUDA toolkit that `nvcc` belongs to."""
    dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
    version = re.search(r"release (\d+)\.(\d+)", output_of([nvcc, "--version"]) or "")
    if top is None or version is None:
        fail(f"{nvcc} does not answer as NVIDIA's compiler does. Set CUDA_HOME to the toolkit's own folder.", CPU_ONLY)
    version = int(version[1]), int(version[2])
    if version < OLDEST_NVCC:
        fail("{} is CUDA {}.{}, older than {}.{}.".format(nvcc, *version, *OLDEST_NVCC), CPU_ONLY)
    top = Path(top[1]).resolve()
    libraries = [top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib"))]
    libraries = next((folder for folder in libraries if (folder / "libcudart_static.a").exists()), None)
    headers = [top / "include", *top.glob("targets/*/include")]
    if libraries is None or not any((folder / "cuda_runtime.h").exists() for folder in headers):
        missing = "libcudart_static.a" if libraries is None else "cuda_runtime.h"
        fail(
            f"{nvcc} belongs to the CUDA toolkit in {top}, which has no {missing}.",
            "Install the toolkit's cudart development package, or set CUDA_HOME to a complete toolkit.",
            CPU_ONLY,
        )
    return str(top / "bin" / "nvcc"), libraries, "{}.{}".format(*version)


def architectures():
    """["80", "90+PTX"], say: CASCADEOPS_CUDA_ARCHITECTURES, else this machine's GPUs, else A100, H100 and newer."""
    asked = os.environ.get("CASCADEOPS_CUDA_ARCHITECTURES", "").strip()
    here = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    names = re.split(r"[;,\s]+", asked) if asked else sorted(set(re.findall(r"\d+\.\d+", here))) or ["80", "90+PTX"]
    names = [name.replace(".", "") for name in names]
    if wrong := [name for name in names if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", name)]:
        fail(f"CASCADEOPS_CUDA_ARCHITECTURES: {wrong[0]!r} is not an architecture such as 80, 8.0, 90a or 90+PTX.")
    return names


def gencode(names):
    """nvcc's options for a list of architectures."""
    options = []
    for name in names:
        number = name.removesuffix("+PTX")
        codes = [f"sm_{number}", f"compute_{number}"] if name.endswith("+PTX") else [f"sm_{number}"]
        options += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return options


def compile_object(command, source):
    """Compiles one source, unless its object is newer than all it is made of; returns the object's path."""
    target = OBJECTS / f"{source}.o"  # the whole path: csrc/cpu/x.cpp and csrc/cuda/x.cu must not meet
    record = target.with_suffix(".json")
    command = [*command, "-c", source, "-o", str(target)]
    made_of = max(os.stat(path).st_mtime for path in [source, *HEADERS])
    if target.exists() and target.stat().st_mtime > made_of and json.loads(record.read_text()) == command:
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(command))
    target.unlink(missing_ok=True)
    if not run(command):
        fail(f"{source} did not compile, see above.", CPU_ONLY if source.endswith(".cu") else OTHER_COMPILER)
    return str(target)


class BuildKernels(build_ext):
    """Compiles all sources of both libraries in parallel, then links each library."""

    def finalize_options(self):
        wish = os.environ.get("CASCADEOPS_CUDA", "auto")
        if wish not in ("auto", "0", "1"):
            fail(f"CASCADEOPS_CUDA must be auto, 0 or 1, got {wish!r}.")
        self.nvcc = None if wish == "0" else find_nvcc()
        if wish == "1" and self.nvcc is None:
            fail("CASCADEOPS_CUDA=1, but there is no nvcc in $CUDA_HOME/bin, PATH or /usr/local/cuda/bin.", CPU_ONLY)
        self.distribution.ext_modules = [CPU] if self.nvcc is None else [CPU, CUDA]
        super().finalize_options()

    def build_extensions(self):
        self.torch, torch_version = find_torch()
        self.cxx, compiler = find_compiler()
        includes = ["-Icsrc", "-isystem", str(self.torch / "include")]
        commands = {".cpp": [self.cxx, *CXX_FLAGS, *DEFINES, *includes]}
        info = {"version": self.distribution.get_version(), "torch": torch_version}
        info |= {"compiler": compiler, "flags": CXX_FLAGS}
        if self.nvcc is None:
            print("cascadeops: no CUDA kernels in this build (nvcc not found, or CASCADEOPS_CUDA=0)", flush=True)
        else:
            self.nvcc, self.cudart, cuda = find_toolkit(self.nvcc)
            names = architectures()
            info |= {"cuda": cuda, "cuda_flags": NVCC_FLAGS, "architectures": names}
            nvcc = [self.nvcc, "-ccbin", self.cxx, *NVCC_FLAGS, *gencode(names), "-DUSE_CUDA"]
            commands[".cu"] = [*nvcc, *DEFINES, *includes]
        described = [*commands[".cpp"], f"-DCASCADEOPS_BUILD_INFO={json.dumps(json.dumps(info))}"]

        def compiled(source):
            command = described if source == BUILD_INFO else commands[Path(source).suffix]
            return compile_object(command, source)

        sources = {source for extension in self.extensions for source in extension.sources}
        sources = sorted(sources, key=lambda source: (not source.endswith(".cu"), source))  # the slow ones first
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            objects = dict(zip(sources, pool.map(compiled, sources), strict=True))
        for extension in self.extensions:
            self.link(extension, [objects[source] for source in extension.sources])

    def link(self, extension, objects):
        """Links one library. It names libtorch_*.so without their folder: once torch is imported, they are found."""
        libraries = ["-Wl,--no-as-needed", f"-L{self.torch / 'lib'}", "-ltorch_cpu", "-Wl,--strip-all"]
        if extension is CPU:
            libraries += ["-Wl,--no-undefined"]
        else:
            # A CPU-only torch has no libtorch_cuda.so to link with: an empty library of that name stands in for it.
            stub = OBJECTS / "libtorch_cuda.so"
            self.run_linker(["-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull, "-o", str(stub)])
            libraries += [f"-L{stub.parent}", "-ltorch_cuda"]
            # The CUDA runtime is inside and hidden, so that torch may bring another major version of it.
            libraries += [f"-L{self.cudart}", "-lcudart_static", "-Wl,--exclude-libs,ALL", "-lrt", "-lpthread", "-ldl"]
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.run_linker([*objects, *libraries, "-o", str(target)])

    def run_linker(self, arguments):
        if not run([self.cxx, "-shared", *arguments]):
            fail("the libraries were not linked, see above.", OTHER_COMPILER)


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["cascadeops", "cascadeops.*"]),
            "cascadeops.models",
            *(f"cascadeops.models.{name}" for name in find_packages("models")),
        ],
        package_dir={"cascadeops.models": "models"},
        package_data={"cascadeops.models": ["assets/*"]},  # the tiny detector and its picture
        ext_modules=[CPU, CUDA],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
