"""Finding random samples in a corpus of any size: seconds to open, memory added, microseconds a sample.

    python benchmarks/order.py [--documents 1e8] [--tokens 1e11] [--lengths lognormal|sorted] [--json PATH]

Writes a real .idx of that many documents (20 bytes each: 2 GB for 100 million, removed afterwards) beside a sparse
.bin, then looks for samples in it as training does: one source, windows of 2 048 tokens, documents isolated.

    open            `Samples(config)`: sizes, header and counts of the files checked, order set up
    memory          resident memory that opening and all the samples below add to the process
    locate          sample number -> source, epoch, window; also with five sources, whose share is counted too
    document ends   where the window's documents end, searched in the .idx
    sample          all of it, with the tokens read
    cold            the same, the .idx dropped from the page cache before: each look-up reads the disk
    refusal         seconds until a .bin or .idx that is a byte short is refused by name

`--lengths sorted` orders the documents by length, where a search that expects even lengths has to look longest. The
times of single calls are medians of warm calls, the clock's own 0.1 us included; everything but `cold` is found in
the page cache.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_encdec.data.config import DataConfig, SourceConfig
from megatron_encdec.data.fingerprint import describe_foreign, keep_record
from megatron_encdec.data.order import Order
from megatron_encdec.data.samples import Samples
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.text.indexed import HEADER, MAGIC, SHARD_SIZE, IndexedFiles, bin_path, idx_path

LENGTH = 2048
PIECE = 1 << 22  # documents written at once


def write_pair(prefix: Path, documents: int, tokens: int, lengths: str) -> None:
    """PREFIX.idx of `documents` documents whose lengths add up to `tokens`, PREFIX.bin of zeros that take no disk."""
    ends_D = np.random.default_rng(0).lognormal(0, 1, documents)
    if lengths == "sorted":
        ends_D.sort()
    np.cumsum(ends_D, out=ends_D)
    ends_D = np.floor(ends_D * (tokens / ends_D[-1])).astype("<i8")
    ends_D[-1] = tokens
    with open(idx_path(prefix), "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for start in range(0, documents, PIECE):
            before = ends_D[start - 1] if start else 0
            file.write(np.diff(ends_D[start : start + PIECE], prepend=before).astype("<i4").tobytes())
        file.write(bytes(8))
        for start in range(0, documents - 1, PIECE):
            file.write((2 * ends_D[start : min(start + PIECE, documents - 1)]).tobytes())
        for start in range(0, documents + 1, PIECE):
            file.write(np.arange(start, min(start + PIECE, documents + 1), dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    with open(bin_path(prefix), "wb") as file:
        file.truncate(2 * tokens)
    # The record of a corpus without a manifest, so that 200 GB of zeros need not be hashed: made-up hashes.
    shards = ("0" * 64,) * -(-2 * tokens // SHARD_SIZE)
    files = IndexedFiles(documents, tokens, "uint16", 2 * tokens, idx_path(prefix).stat().st_size, shards, "0" * 64)
    keep_record(prefix, describe_foreign(prefix, files))


def resident_mb() -> float:
    """Resident memory of this process (MB), mapped files included."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1e3


def microseconds(function, argument_lists) -> dict[str, float]:
    """Median and 90th percentile of single calls."""
    found = []
    for arguments in argument_lists:
        start = time.perf_counter()
        function(*arguments)
        found.append((time.perf_counter() - start) * 1e6)
    return {"median": statistics.median(found), "p90": statistics.quantiles(found, n=10)[-1]}


def drop_from_cache(path: Path) -> None:
    """Let the kernel forget the file's pages."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def refusals(prefix: Path, config: DataConfig) -> float:
    """Seconds until a pair that is a byte short is refused: the slower of .bin and .idx, each named."""
    seconds = []
    for path in (bin_path(prefix), idx_path(prefix)):
        size = path.stat().st_size
        os.truncate(path, size - 1)
        start = time.perf_counter()
        try:
            Samples(config)
            raise AssertionError(f"{path} is a byte short and was not refused")
        except IntegrityError as error:
            assert str(path) in str(error), error
        seconds.append(time.perf_counter() - start)
        os.truncate(path, size)
    return max(seconds)


def measure(prefix: Path, calls: int) -> dict:
    """All figures of the pair at `prefix`."""
    config = DataConfig([SourceConfig(str(prefix))], sequence_length=LENGTH)
    drop_from_cache(idx_path(prefix))
    before = resident_mb()
    start = time.perf_counter()
    samples = Samples(config)
    results = {"open_seconds": time.perf_counter() - start, "open_memory_mb": resident_mb() - before}
    draw = np.random.default_rng(1)
    windows = samples.windows[0]
    numbers = [(int(i),) for i in draw.integers(0, 3 * windows, calls)]
    results["cold_sample"] = microseconds(samples.sample, numbers[: calls // 10])
    for number in numbers:
        samples.sample(*number)  # warm: what follows touches no disk
    order = Order([windows], [1.0], 1)
    five = Order([windows // k for k in (1, 2, 3, 4, 5)], [3, 1, 1, 0.5, 0.2], 1)
    places = [(order.locate(i)[2] * LENGTH, LENGTH) for (i,) in numbers]
    for start, length in places:
        samples.stores[0].document_ends(start, length)
    results["locate"] = microseconds(order.locate, numbers)
    results["locate_five_sources"] = microseconds(five.locate, numbers)
    results["document_ends"] = microseconds(samples.stores[0].document_ends, places)
    results["sample"] = microseconds(samples.sample, numbers)
    results["memory_mb"] = resident_mb() - before
    results["refusal_seconds"] = refusals(prefix, config)
    return results


def main() -> None:
    """Write, measure, print, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, default=1e8)
    parser.add_argument("--tokens", type=float, default=1e11)
    parser.add_argument("--lengths", choices=("lognormal", "sorted"), default="lognormal")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--directory", help="where the files go (default: the place for temporary files)")
    parser.add_argument("--json", metavar="PATH")
    arguments = parser.parse_args()
    documents, tokens = int(arguments.documents), int(arguments.tokens)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        prefix = Path(directory) / "corpus"
        if pid := os.fork():  # a process of its own writes: its memory is not ours to count
            if os.waitpid(pid, 0)[1]:
                raise SystemExit("the index could not be written")
        else:
            try:
                write_pair(prefix, documents, tokens, arguments.lengths)
                os._exit(0)
            except BaseException as error:
                print(error, flush=True)
                os._exit(1)
        results = {"documents": documents, "tokens": tokens, "lengths": arguments.lengths,
                   **measure(prefix, arguments.calls)}
    print(f"{documents:,} documents of {arguments.lengths} lengths, {tokens:,} tokens")
    print(f"open                   {results['open_seconds'] * 1e3:8.1f} ms")
    print(f"memory after opening   {results['open_memory_mb']:8.1f} MB more")
    print(f"memory at the end      {results['memory_mb']:8.1f} MB more")
    for name in ("locate", "locate_five_sources", "document_ends", "sample", "cold_sample"):
        print(f"{name.replace('_', ' '):<22} {results[name]['median']:8.1f} us median, {results[name]['p90']:.1f} p90")
    print(f"refusal                {results['refusal_seconds'] * 1e3:8.1f} ms")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
