"""The console command `cascadeops`: runs the programs that a checkout starts as `python -m models.train` and so on."""

import importlib.util
import sys
from collections.abc import Sequence

PROGRAMS = {
    "train": "train a detector and report its AP",
    "report": "write one HTML page about a training run, or two side by side",
    "replay": "compute a training step again whose loss was not finite",
    "evaluate": "box and mask AP of a weights file on a data set",
    "predict": "find objects in pictures: overlays and COCO results",
    "classify": "name what is in pictures, or measure an ImageNet classifier",
    "data": "write the generated data set as a COCO folder; `data check DIR` looks through any",
    "export": "compile a detector into a .pt2 package, for Python and C++",
    "convert": "weights of mmdetection, torchvision and others to ours",
    "weights": "list and fetch published weights",
    "doctor": "what is installed, which kernels run here, and whether they compute correctly",
}
HELP = """usage: cascadeops PROGRAM [OPTIONS]     (cascadeops PROGRAM --help lists the options)

  cascadeops train --arch scnet
  cascadeops evaluate --weights runs/scnet/weights.safetensors --data data/coco
  cascadeops predict street.jpg --weights runs/scnet/weights.safetensors --output found

programs:
{programs}

  --version   print the version
"""


def main(arguments: Sequence[str]) -> None:
    """Runs one program; ends the process with 2 for an unknown one, with 4 where a package that it needs is missing."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(HELP.format(programs="\n".join(f"  {name:<10}{text}" for name, text in PROGRAMS.items())), end="")
    elif name == "--version":
        import importlib.metadata

        print("cascadeops", importlib.metadata.version("cascadeops"))
    elif name in PROGRAMS:
        package = "cascadeops" if name == "doctor" else __package__
        _run_as_main(f"{package}.{name}", [f"cascadeops {name}", *arguments[1:]])
    else:
        import difflib

        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"did you mean `cascadeops {near[0]}`?" if near else f"there are: {', '.join(PROGRAMS)}."
        print(f"error: cascadeops has no program {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def _run_as_main(name: str, argv: list[str]) -> None:
    """What `python -m name` does, except that sys.argv[0] stays the command that a person typed."""
    spec = importlib.util.find_spec(name)
    if spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    module = importlib.util.module_from_spec(spec)
    module.__name__ = "__main__"
    sys.modules["__main__"] = module
    sys.argv = argv
    try:
        exec(spec.loader.get_code(spec.name), module.__dict__)
    except ModuleNotFoundError as error:
        fix = "pip install 'cascadeops[detect]'   (in a checkout: pip install '.[detect]')"
        print(f"error: {argv[0]} needs the package {error.name}; fix: {fix}", file=sys.stderr)
        sys.exit(4)
