"""Exports a function that uses CascadeOps' operators to `.pt2` files, and loads them again.

    python examples/export_pt2.py          writes build/pooled.pt2 (torch.export), build/pooled_aoti.pt2 (AOTInductor)
    python examples/export_pt2.py --load   a new process loads them: same results, bit for bit

A process that loads such a file needs `import cascadeops`, and nothing of the code that was exported. AOTInductor
compiles the function ahead of time, which takes a C++ compiler and half a minute; --without-aoti leaves it out.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import cascadeops

FOLDER = Path("build")


class PooledProposals(nn.Module):
    """The best proposals of each image, and their features: the part between an RPN and a box head."""

    def forward(self, features: list[Tensor], boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index, count = cascadeops.padded_nms(boxes, scores, None, iou_threshold=0.7, max_output=50)
        kept = boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))
        image = torch.arange(len(boxes), dtype=boxes.dtype)[:, None].expand(index.shape)
        image = torch.where(index >= 0, image, -1.0)  # a padding row of padded_nms is one of multiscale_roi_align
        rois = torch.cat([image[..., None], kept], dim=-1).flatten(0, 1)
        return cascadeops.multiscale_roi_align(features, rois, 7, strides=[4, 8, 16, 32]), rois, count


def inputs(proposals: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Two images of 128 x 192 pixels: features, boxes [2, proposals, 4], scores [2, proposals]."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.rand(2, 16, 128 // s, 192 // s, generator=generator) for s in (4, 8, 16, 32)]
    corners = torch.rand(2, proposals, 2, 2, generator=generator) * torch.tensor([192.0, 128.0])
    boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    return features, boxes, torch.rand(2, proposals, generator=generator)


def save(aoti: bool) -> None:
    proposals = torch.export.Dim("proposals", min=2, max=100_000)  # any number of them may come
    dynamic = {"features": [None] * 4, "boxes": {1: proposals}, "scores": {1: proposals}}
    program = torch.export.export(PooledProposals(), inputs(200), dynamic_shapes=dynamic)
    FOLDER.mkdir(exist_ok=True)
    torch.export.save(program, FOLDER / "pooled.pt2")
    (FOLDER / "pooled_aoti.pt2").unlink(missing_ok=True)
    if aoti:
        torch._inductor.aoti_compile_and_package(program, package_path=str(FOLDER / "pooled_aoti.pt2"))


def load() -> None:
    functions = {"torch.export": torch.export.load(FOLDER / "pooled.pt2").module()}
    if (FOLDER / "pooled_aoti.pt2").exists():
        functions["AOTInductor"] = torch._inductor.aoti_load_package(str(FOLDER / "pooled_aoti.pt2"))
    for proposals in (200, 1000):  # the number that was exported with, and another
        arguments = inputs(proposals)
        expected = PooledProposals()(*arguments)
        for name, function in functions.items():
            results = function(*arguments)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(expected, results, strict=True)), name
            print(f"{name}, {proposals} proposals: equal; {expected[2].tolist()} kept")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", action="store_true", help="load what a run without this option has written")
    parser.add_argument("--without-aoti", action="store_true", help="torch.export alone")
    options = parser.parse_args()
    load() if options.load else save(aoti=not options.without_aoti)
