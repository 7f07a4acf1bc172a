"""A wheel without the machine code of other GPUs than one: what has to travel to a machine without a network.

    python benchmarks/slim_wheel.py WHEEL DIR [--arch 90]

writes the wheel of the same name into DIR. Transformer Engine's core holds its kernels for eight architectures; of
one alone, 277 MB become 32. Kernels of other architectures are filled with zeros where they lie, so that every offset
stays and a wheel, which is a zip file, stores them in next to nothing; CUDA chooses by the headers, which stay too.
Where code holds none for the architecture asked for, nothing is written: exit code 2.

The layout is that of CUDA's fat binaries, as `cuobjdump --list-elf` shows them: in the section .nv_fatbin, groups that
begin with a magic number, and in each of them entries, each a header and its code.
"""

import argparse
import base64
import csv
import hashlib
import io
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

MAGIC = 0xBA55ED50


def section(code: bytes, wanted: bytes) -> tuple[int, int]:
    """(begin, end) of the section `wanted` of a 64-bit ELF file; (0, 0): it has none."""
    table, = struct.unpack_from("<Q", code, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", code, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", code, table + number * size) for number in range(count)]
    names = rows[of_names][4]
    for name, _, _, _, begin, length in rows:
        if code[names + name:code.index(b"\0", names + name)] == wanted:
            return begin, begin + length
    return 0, 0


def entries(code: bytes) -> Iterator[tuple[int, int, int]]:
    """(architecture, begin, end) of each piece of machine code; 90 for sm_90."""
    at, end = section(code, b".nv_fatbin")
    while at < end:
        magic, _, header, length = struct.unpack_from("<IHHQ", code, at)
        if magic != MAGIC:  # padding between two groups
            at += 8
            continue
        entry, at = at + header, at + header + length
        while entry < at:
            header, length = struct.unpack_from("<IQ", code, entry + 4)
            yield struct.unpack_from("<I", code, entry + 28)[0], entry + header, entry + header + length
            entry += header + length


def slim(code: bytes, arch: int) -> bytes:
    """`code` with zeros in place of what is for other architectures. ValueError: it has nothing for this one."""
    kept, found = bytearray(code), list(entries(code))
    if found and arch not in {one for one, _, _ in found}:
        raise ValueError(f"no machine code for sm_{arch}, only for {sorted({one for one, _, _ in found})}")
    for one, begin, end in found:
        if one != arch:
            kept[begin:end] = bytes(end - begin)
    return bytes(kept)


def rewrite(wheel: Path, folder: Path, arch: int) -> Path:
    """The wheel in `folder`, with hashes of what is in it now."""
    folder.mkdir(parents=True, exist_ok=True)
    target, record = folder / wheel.name, []
    partial = io.BytesIO()
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(partial, "w", compresslevel=9) as slimmed:
        for entry in source.infolist():
            if entry.filename.endswith(".dist-info/RECORD"):
                record_name = entry.filename
                continue
            data = source.read(entry)
            if data[:4] == b"\x7fELF":
                try:
                    data = slim(data, arch)
                except ValueError as error:
                    raise ValueError(f"{wheel.name}: {entry.filename}: {error}") from None
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append((entry.filename, f"sha256={digest}", len(data)))
            slimmed.writestr(entry, data, zipfile.ZIP_DEFLATED)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*record, (record_name, "", "")])
        slimmed.writestr(record_name, text.getvalue())
    target.write_bytes(partial.getvalue())
    return target


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="90: H100, H200 (default); 80: A100; 89: L4, L40")
    arguments = parser.parse_args()
    try:
        target = rewrite(arguments.wheel, arguments.folder, arguments.arch)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {arguments.wheel.stat().st_size / 1e6:.1f} MB -> {target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
