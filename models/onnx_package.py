"""A detector as an ONNX file, and such a file in onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .errors import DataError, MachineError, UsageError

INSTALL = 'pip install "cascadeops[export]"'


def write_onnx(path: Path, program: torch.export.ExportedProgram, facts: dict[str, str]) -> None:
    """Writes an exported `models.package.DetectorTuple`, with `facts` as metadata; weights and all in one file.

    Raises:
        MachineError: onnxscript is not installed. UsageError: the detector has an operator without a form in ONNX.
    """
    try:
        from .onnx_operators import translations
    except ModuleNotFoundError as error:
        raise MachineError("writing ONNX needs another package", where=error.name, fix=INSTALL) from error
    table = translations()
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("cascadeops.") and node.target not in table:
            name = str(node.target).split(".")[1]
            raise UsageError("this detector has an operator without a form in ONNX", why=name, fix="write a .pt2 file")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, of which nothing is needed
    names = ["boxes", "scores", "labels", "mask_probs", "count"]
    if len(program.graph_signature.user_outputs) < len(names):
        names.remove("mask_probs")
    made = torch.onnx.export(
        program,
        input_names=["images", "image_sizes"],
        output_names=names,
        dynamo=True,
        opset_version=18,
        custom_translation_table=table,
        verbose=False,
    )
    made.model.metadata_props.update(facts)
    made.save(path, external_data=False)


def open_onnx(path: Path) -> tuple[Callable[[Tensor, Tensor], list[Tensor]], dict[str, str]]:
    """What runs such a file on the CPU, and its metadata.

    Raises:
        MachineError: onnxruntime is not installed. DataError: not an ONNX file that it loads.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MachineError("running ONNX needs another package", where=error.name, fix=INSTALL) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes have no common base
        raise DataError("not an ONNX file that can be loaded", where=path, why=str(error).splitlines()[0]) from error

    def run(images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        inputs = {"images": images.contiguous().numpy(), "image_sizes": image_sizes.numpy()}
        return [torch.from_numpy(result) for result in session.run(None, inputs)]

    return run, session.get_modelmeta().custom_metadata_map
