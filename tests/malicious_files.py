"""A zoo of files and folders of strangers that want to run code, leave their folder, or exhaust memory or time.

Data sets and images; malicious_weights.py has weights, malicious_runs.py what a run writes. Each function writes its
part of the zoo into a folder and gives back the cases; malicious_runner.py reads them.
"""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

ESC = "\x1b]0;owned\x07"
"""What sets a terminal's title, and in some terminals does more."""


class Case(NamedTuple):
    name: str
    reader: str  # of malicious_runner.READERS
    path: str
    outcome: str = "refused"
    """Or "left alone": what is wrong is not used, and the rest is read. Or one of the two."""


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def nested(depth: int, value: str = "") -> str:
    return "[" * depth + value + "]" * depth


# ---- annotations

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def members(*texts: str) -> str:
    """A JSON object of members that are JSON already; empty ones are left out."""
    return "{" + ", ".join(filter(None, texts)) + "}"


def coco_text(image: str = "", annotation: str = "", top: str = "") -> str:
    """A COCO file with members added to an entry, later ones replacing those before them."""
    image = members('"id": 1, "file_name": "1.png", "height": 40, "width": 60', image)
    base = '"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0'
    annotation = members(base, f'"segmentation": [{SQUARE}]', annotation)
    categories = '"categories": [{"id": 1, "name": "a"}]'
    return members(f'"images": [{image}]', f'"annotations": [{annotation}]', categories, top)


def zigzag(points: int, far: float) -> list[float]:
    return [far * (i % 4 in (1, 2)) for i in range(2 * points)]


def runs(*counts: int, size: str = "[40, 60]") -> str:
    return '"segmentation": ' + members(f'"size": {size}', f'"counts": {list(counts)}')


def run_text(counts: str, size: str = "[40, 60]") -> str:
    return '"segmentation": ' + members(f'"size": {size}', f'"counts": {json.dumps(counts)}')


HUGE = '"height": 7094, "width": 7095'
"""Beyond 3 * 2^24 pixels, where pycocotools' own run-length writer leaves its memory."""


def annotation_files(folder: Path) -> list[Case]:
    sizes = '"height": 1, "width": 1'
    many = ", ".join(members(f'"id": {i}, "file_name": "{i}.png"', sizes) for i in range(3, 5_000))
    long = members(f'"id": 2, "file_name": "{"y" * 4_000}.png"', sizes)
    classes = ", ".join(members(f'"id": {i}, "name": "a"') for i in range(2, 40_000))
    first = '"images": ['
    texts = {
        "deep list": nested(2_000_000),
        "deep object": '{"a":' * 500_000 + "1" + "}" * 500_000,
        "deep image": coco_text(image='"license": ' + nested(200_000)),
        "deep annotation": coco_text(annotation='"attributes": ' + nested(200_000)),
        "deep segmentation": coco_text(annotation='"segmentation": ' + nested(100_000)),
        "number of 100,000 digits": coco_text(annotation='"area": ' + "9" * 100_000),
        "id of 5,000 digits": coco_text(annotation='"id": ' + "9" * 5_000),
        "id beyond 64 bits": coco_text(annotation=f'"id": {2**64}'),
        "category beyond 64 bits": coco_text(annotation=f'"category_id": {2**70}'),
        "NaN": coco_text(annotation='"area": NaN'),
        "Infinity": coco_text(annotation='"bbox": [Infinity, 0, 1, 1]'),
        "infinite exponent": coco_text(annotation='"bbox": [1e999, 0, 1, 1]'),
        "box that overflows": coco_text(annotation='"bbox": [1e308, 1e308, 1e308, 1e308]'),
        "box of texts": coco_text(annotation='"bbox": ["1", "2", "3", "4"]'),
        "box of a million numbers": coco_text(annotation=f'"bbox": {[0] * 1_000_000}'),
        "name that goes up": coco_text(image='"file_name": "../../../etc/passwd"'),
        "name that goes up in the middle": coco_text(image='"file_name": "a/../../secret.png"'),
        "absolute name": coco_text(image='"file_name": "/etc/passwd"'),
        "name with a zero byte": coco_text(image='"file_name": "1.png\\u0000.jpg"'),
        "name of half a surrogate pair": coco_text(image='"file_name": "\\ud800.png"'),
        "name of a megabyte": coco_text(image=f'"file_name": "{"x" * 2**20}"'),
        "long name among many": coco_text().replace(first, f"{first}{long}, {many}, "),
        "name that is a list": coco_text(image='"file_name": ["1.png"]'),
        "coco_url that goes up": coco_text(image='"file_name": null, "coco_url": "http://x/../.."'),
        "image of a terapixel": coco_text(image='"height": 1000000, "width": 1000000'),
        "image of 10 gigapixels": coco_text(image='"height": 100000, "width": 100000'),
        "image of negative size": coco_text(image='"height": -40, "width": -60'),
        "image of size true": coco_text(image='"height": true, "width": true'),
        "40,000 classes": coco_text().replace('"categories": [', f'"categories": [{classes}, '),
        "polygon that never ends": coco_text(annotation=f'"segmentation": [{zigzag(20_000, 99_999.0)}]'),
        "polygons that never end": coco_text(annotation=f'"segmentation": {[zigzag(400, 9_000.0)] * 20}'),
        "polygon far away": coco_text(annotation='"segmentation": [[1e8, 0, 1e8, 1e8, 0, 1e8]]'),
        "polygon of NaN": coco_text(annotation='"segmentation": [[NaN, 0, 1, 1, 0, 1]]'),
        "polygon of texts": coco_text(annotation='"segmentation": [["a", 0, 1, 1, 0, 1]]'),
        "polygon beyond pycocotools' memory": coco_text(
            image=HUGE, annotation=f'"segmentation": [{SQUARE}, [2368, 0, 4730, 0, 4730, 7094, 2368, 7094]]'
        ),
        "run lengths beyond pycocotools' memory": coco_text(
            image=HUGE, annotation=runs(2**24, 2**24 + 1, 7094 * 7095 - 2**25 - 1, 0, size="[7094, 7095]")
        ),
        "run lengths that wrap around": coco_text(annotation=runs(2**62, 2**62, 2**62, 2**62, 2400)),
        "run length beyond 64 bits": coco_text(annotation=runs(2**70)),
        "negative run length": coco_text(annotation=runs(-1, 2401)),
        "run lengths of another size": coco_text(annotation=run_text("0", "[1048576, 1048576]")),
        "run lengths of size text": coco_text(annotation=run_text("0", '"40"')),
        "run lengths of no height": coco_text(annotation=run_text("0", "[0, 60]")),
        "run lengths too short": coco_text(annotation=run_text("0")),
        "run lengths too long": coco_text(annotation=runs(2400, 1)),
        "run lengths empty": coco_text(annotation=run_text("")),
        "run lengths that end in a continuation": coco_text(annotation=run_text("P")),
        "run lengths of a hundred groups": coco_text(annotation=run_text("P" * 100 + "0")),
        "run lengths with a zero byte": coco_text(annotation=run_text("0\0P1")),
        "run lengths beyond ASCII": coco_text(annotation=run_text("é0")),
        "a million runs without a pixel": coco_text(annotation=run_text("0" * 10**6)),
        "text instead of JSON": "<html>404</html>",
        "empty file": "",
        "zero bytes": "\0" * 1000,
        "half a UTF-8 character": b'{"images": "\xc3'.decode("latin-1"),
        "a list": "[1, 2, 3]",
        "no lists": '{"images": 1, "annotations": {}, "categories": "a"}',
        "keys that steer a terminal": json.dumps({ESC: 1, "annotations": []}),
        "image without an id": coco_text().replace('"id": 1, "file_name"', '"file_name"'),
        "same id twice": coco_text().replace(first, first + members('"id": 1, "file_name": "2.png"', sizes) + ", "),
    }
    left_alone = {
        "same key twice": coco_text(top='"info": 1, "info": {"a": 2}'),
        "class name that steers a terminal": coco_text().replace('"name": "a"', f'"name": {json.dumps(ESC)}'),
        "class name that is HTML": coco_text().replace('"name": "a"', '"name": "<script>alert(1)</script>"'),
    }
    cases = []
    for name, text in (texts | left_alone).items():
        path = put(folder / name / "annotations/instances_val.json", text)
        cases.append(Case(name, "annotations", str(path), "left alone" if name in left_alone else "refused"))
        put(folder / name / "val/1.png", png(40, 60))
        cases.append(Case(name, "check", str(folder / name), "refused or left alone"))
    os.mkfifo(folder / "pipe.json")
    cases.append(Case("pipe in the place of annotations", "annotations", str(folder / "pipe.json")))
    return cases


def data_folders(folder: Path) -> list[Case]:
    """Data sets whose annotations are right, and whose files lead elsewhere."""
    secret = put(folder / "secret" / "secret.png", png(40, 60))
    cases = []

    def data(name: str, image: str = "1.png") -> Path:
        root = folder / name
        text = json.loads(coco_text())
        text["images"][0]["file_name"] = image
        put(root / "annotations/instances_val.json", json.dumps(text))
        (root / "val").mkdir()
        cases.append(Case(name, "data", str(root)))
        return root / "val" / image

    data("link out of the folder").symlink_to(secret)
    data("relative link out of the folder").symlink_to("../../secret/secret.png")
    data("link to a device").symlink_to("/dev/zero")
    data("link to itself").symlink_to("1.png")
    path = data("folder that is a link", "sub/1.png")
    path.parent.symlink_to(secret.parent)
    put(secret.parent / "1.png", png(40, 60))
    os.mkfifo(data("pipe in the place of an image"))
    data("folder in the place of an image").mkdir()
    put(data("image of another size"), png(400, 600))
    put(data("image that is a script"), "#!/bin/sh\ntouch owned\n")
    return cases


# ---- PASCAL VOC


def voc_text(inside: str = "", before: str = "", size: str = "40", name: str = "dog") -> str:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    size = f"<size><width>60</width><height>{size}</height></size>"
    return f"{before}<annotation>{size}{inside}<object><name>{name}</name>{box}</object></annotation>"


def voc_files(folder: Path) -> list[Case]:
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    texts = {
        "document type": voc_text(before='<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd">'),
        "billion laughs": voc_text("&l9;", f'<!DOCTYPE annotation [<!ENTITY l0 "ha">{laughs}]>'),
        "quadratic entity": voc_text("&a;" * 50_000, f'<!DOCTYPE x [<!ENTITY a "{"a" * 50_000}">]>'),
        "entity of a file": voc_text("&x;", '<!DOCTYPE x [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
        "parameter entity": voc_text(before='<!DOCTYPE x [<!ENTITY % p SYSTEM "http://127.0.0.1:9/p"> %p;]>'),
        "notation": voc_text(before='<!DOCTYPE x [<!NOTATION n SYSTEM "/bin/sh">]>'),
        "unknown entity": voc_text("&unknown;"),
        "deep": "<annotation>" + "<a>" * 300_000,
        "a little too deep": "<annotation>" + "<a>" * 20 + "</a>" * 20 + "</annotation>",
        "too large": voc_text("<!--" + "x" * 2**21 + "-->"),
        "attribute of a megabyte": voc_text(f'<a b="{"x" * (2**20 + 1)}"/>'),
        "unknown encoding": voc_text(before='<?xml version="1.0" encoding="rot13"?>'),
        "encoding that is a module": voc_text(before='<?xml version="1.0" encoding="os"?>'),
        "another root": "<html></html>",
        "size of NaN": voc_text(size="NaN"),
        "infinite size": voc_text(size="1e999"),
        "size of 5,000 digits": voc_text(size="9" * 5_000),
        "no size": "<annotation><object><name>a</name></object></annotation>",
        "not closed": "<annotation><size>",
        "zero bytes": "\0" * 100,
        "control characters": voc_text(name=ESC),
        "nothing": "",
        "two roots": voc_text() + voc_text(),
    }
    cases = [Case(name, "voc xml", str(put(folder / f"{name}.xml", text))) for name, text in texts.items()]
    os.mkfifo(folder / "pipe.xml")
    cases.append(Case("pipe in the place of XML", "voc xml", str(folder / "pipe.xml")))
    lists = {
        "list with names that go up": "../../secret",
        "list with absolute names": "/etc/passwd",
        "list of another encoding": b"\xff\xfe\x00",
        "list of underscores": "___",
        "list with a zero byte": "a\0b",
    }
    for name, text in lists.items():
        root = folder / name / "VOC2012"
        (root / "JPEGImages").mkdir(parents=True)
        (root / "Annotations").mkdir()
        put(root / "ImageSets/Main/val.txt", text)
        cases.append(Case(name, "voc", str(root)))
    return cases


# ---- images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    height: int, width: int, colour: int = 2, depth: int = 8, data: bytes | None = None, extra: bytes = b""
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    if data is None:
        data = zlib.compress(bytes(height * (1 + 3 * width)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(height: int, width: int) -> bytes:
    """The header of a JPEG, with nothing behind it."""
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    return (
        b"\xff\xd8" + frame + b"\xff\xda" + struct.pack(">HB", 12, 3) + bytes([1, 0, 2, 0, 3, 0, 0, 63, 0]) + b"\0" * 50
    )


def bmp(height: int, width: int, bits: int = 24) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 154, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, *[0] * 6)
        + bytes(100)
    )


def webp(height: int, width: int) -> bytes:
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + b"\0" * 4
        + struct.pack("<I", width - 1)[:3]
        + struct.pack("<I", height - 1)[:3]
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


def image_files(folder: Path) -> list[Case]:
    looping_tags = (256, 4, 1, 9), (257, 4, 1, 9), (330, 4, 1, 8), (273, 4, 1, 8)
    files = {
        "PNG of 4 gigapixels": png(65_535, 65_535, data=b""),
        "PNG of 2^62 pixels": png(2**31 - 1, 2**31 - 1, data=b""),
        "PNG without height": png(0, 60, data=b""),
        "PNG just above the limit": png(9_460, 9_460, data=b""),
        "PNG cut off": png(40, 60)[:60],
        "PNG of a wrong checksum": png(40, 60).replace(b"IDAT", b"IDAX"),
        "PNG with a text of 128 megabytes": png(
            40, 60, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 9))
        ),
        "PNG with many texts": png(40, 60, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1), 9)) * 200),
        "PNG with a chunk of 4 gigabytes": b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIHDR",
        "PNG of colour type 9": png(40, 60, colour=9),
        "JPEG of 4 gigapixels": jpeg(65_535, 65_535),
        "JPEG without height": jpeg(0, 60),
        "JPEG of 2 frames": jpeg(40, 60)[:-64] + jpeg(65_535, 65_535)[2:],
        "JPEG cut off": jpeg(40, 60)[:15],
        "JPEG that is only its first bytes": b"\xff\xd8\xff",
        "BMP of 4 gigapixels": bmp(65_535, 65_535),
        "BMP of negative width": bmp(40, -60),
        "BMP of a wrong depth": bmp(40, 60, 77),
        "BMP cut off": bmp(400, 600),
        "WebP of 268 megapixels": webp(16_384, 16_384),
        "WebP cut off": webp(40, 60),
        "GIF of 4 gigapixels": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";",
        "GIF": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
        "TIFF whose directory is itself": tiff(*looping_tags),
        "TIFF of 2^32 strips": tiff((256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 2**32 - 1, 8)),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(%pipe%touch owned) (w) file\n",
        "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 40, 60, 8, 3) + bytes(20),
        "FITS": b"SIMPLE  =                    T" + b" " * 50 + b"XTENSION= 'BINTABLE'".ljust(80) + b"END".ljust(2800),
        "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(app.launchURL('http://x'))>>>>\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script>x()</script></svg>',
        "ICO": b"\0\0\1\0\1\0" + bytes([0, 0, 0, 0, 1, 0, 32, 0]) + struct.pack("<II", 40, 22) + bytes(40),
        "ICNS": b"icns" + struct.pack(">I", 2**31) + b"ic10" + struct.pack(">I", 2**31 - 8),
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
        "PCX": bytes([10, 5, 1, 8]) + bytes(200),
        "TGA": bytes([0, 0, 2]) + bytes(9) + struct.pack("<HH", 60, 40) + bytes([24, 0]) + bytes(7200),
        "DDS": b"DDS " + struct.pack("<I", 124) + bytes(120),
        "FLI": bytes(4) + b"\x11\xaf" + bytes(200),
        "SGI": struct.pack(">HBBHHHH", 474, 0, 1, 3, 60, 40, 3) + bytes(500),
        "XBM": b"#define x_width 40\n#define x_height 60\nstatic char x_bits[] = {\n0x00 };",
        "XPM": b'/* XPM */\nstatic char *x[] = {"1 1 1 1", "a c #ff0000", "a"};',
        "PPM of 4 gigapixels": b"P6 65535 65535 255\n",
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(50),
        "MPO": jpeg(40, 60)[:2] + b"\xff\xe2" + struct.pack(">H", 60) + b"MPF\0II*\0" + b"\xff" * 50,
        "pickle": b"\x80\x04cos\nsystem\n(X\x0c\x00\x00\x00touch ownedtR.",
        "zip": b"PK\x03\x04" + bytes(100),
        "PNG behind a script": b"#!/bin/sh\ntouch owned\n" + png(40, 60),
        "nothing": b"",
        "one byte": b"\x89",
    }
    left_alone = {
        "PNG whose data explodes": png(40, 60, data=zlib.compress(bytes(50_000_000), 9)),
        "EXIF that is its own directory": png(40, 60, extra=chunk(b"eXIf", tiff(*looping_tags))),
        "EXIF of 2^32 entries": png(40, 60, extra=chunk(b"eXIf", tiff((274, 3, 2**32 - 1, 8)))),
        "PNG with a script behind it": png(40, 60) + b"\n#!/bin/sh\ntouch owned\n",
        "PNG with a text that steers a terminal": png(40, 60, extra=chunk(b"tEXt", b"a\0" + ESC.encode())),
    }
    cases = [Case(name, "image", str(put(folder / f"{name}.png", data))) for name, data in files.items()]
    for name, data in left_alone.items():
        cases.append(Case(name, "image", str(put(folder / f"{name}.png", data)), "left alone"))
    for name in ("PNG of 4 gigapixels", "GIF", "TIFF whose directory is itself", "PNG cut off", "BMP of 4 gigapixels"):
        cases.append(Case(f"label map: {name}", "label map", str(folder / f"{name}.png")))
    os.mkfifo(folder / "pipe.png")
    cases.append(Case("pipe in the place of a picture", "image", str(folder / "pipe.png")))
    return cases


PARTS = (annotation_files, data_folders, voc_files, image_files)
