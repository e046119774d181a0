"""Pasting followed by COCO's run-length encoding, each written out."""

from torch import Tensor

from cascadeops.reference.paste_masks import paste_masks


def run_lengths(pixels: list[int]) -> list[int]:
    """Lengths of the runs of equal values; the first run counts zeros (and may be 0)."""
    runs, value, length = [], 0, 0
    for pixel in pixels:
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    return [*runs, length]


def compress(runs: list[int]) -> bytes:
    """COCO's compressed counts.

    From the fourth on, a run is stored as its difference from the run two before (the last one of its colour). A
    number is cut into groups of five bits, lowest first; bit 5 says that more follow, the last group is sign-extended,
    and 48 is added to give a printable character.
    """
    text = bytearray()
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text.append(48 + group + 32 * more)
            if not more:
                break
    return bytes(text)


def paste_masks_rle(probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5) -> list[dict]:
    masks = paste_masks(probs, boxes, image_size, threshold)
    columns = masks.transpose(1, 2).flatten(1).int().tolist()  # COCO runs down the columns
    return [{"size": list(image_size), "counts": compress(run_lengths(pixels))} for pixels in columns]
