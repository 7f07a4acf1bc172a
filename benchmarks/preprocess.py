"""Wall time and peak memory of `preprocess` and of other ways to tokenize the same text: whole processes, one run.

    python benchmarks/preprocess.py --text docs.jsonl prose.jsonl [--gigabytes 1] [--rounds 2] [--megatron-lm DIR]

The JSON lines of `--text` are repeated and shuffled until there are that many gigabytes (made once, in --work), and a
byte-level BPE of 16 384 entries is trained on them. Then, in turns, on the same number of cores:

    ours                  megatron-encdec preprocess: accounting, checks, hashes and resumability included
    ours, tokenizers      the same with --encoder tokenizers (with --all)
    encode_batch          a bare loop over tokenizers' encode_batch; ids are thrown away
    megatron fast         Megatron-LM's tools/preprocess_data_fast.py --use-gigatoken
    megatron classic      Megatron-LM's tools/preprocess_data.py --workers CORES

The last two need `--megatron-lm`, a checkout of it (`--peer-path` puts more on their PYTHONPATH); their ids have to be
equal to ours. Peak memory is the sum over a command's processes, sampled 5 times a second. At the end our own time is
taken apart, in one process: reading and parsing, encoding, writing. `--json PATH` keeps the figures.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

ENCODE_BATCH = """
import json, sys
from tokenizers import Tokenizer
tokenizer, tokens, batch = Tokenizer.from_file(sys.argv[1]), 0, []
def flush():
    global tokens
    tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch(batch, add_special_tokens=False))
    batch.clear()
for line in open(sys.argv[2], encoding="utf-8"):
    batch.append(json.loads(line)["text"])
    if len(batch) == 1000:
        flush()
flush()
print(tokens)
"""


def make_text(sources: list[str], gigabytes: float, path: Path) -> None:
    """Write `path`: the lines of `sources`, shuffled, again and again until it has `gigabytes` x 10^9 bytes."""
    if path.exists() and path.stat().st_size >= gigabytes * 1e9:
        return
    lines = [line + b"\n" for source in sources for line in Path(source).read_bytes().rstrip(b"\n").split(b"\n")]
    shuffle, size = random.Random(0), 0
    with open(path, "wb") as file:
        while size < gigabytes * 1e9:
            shuffle.shuffle(lines)
            file.writelines(lines)
            size += sum(map(len, lines))


def measure(command: list[str], environment: dict) -> tuple[float, float]:
    """(seconds, peak bytes of all its processes) of a command; its output is shown only where it fails."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        peak, over = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, over))
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - start
        over.set()
        watcher.join()
        if code:
            output.seek(0)
            sys.exit(f"{' '.join(command)}: exit code {code}\n{output.read().decode(errors='replace')[-3000:]}")
        return seconds, peak[0]


def _watch(pid: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(0.2):
        try:
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
            peak[0] = max(peak[0], sum(one.memory_info().rss for one in family))
        except psutil.Error:
            pass  # one of them has just ended


def commands(arguments, text: Path, tokenizer: Path) -> dict[str, tuple[list[str], dict, Path | None]]:
    """name -> (command, environment, the .bin it writes)."""
    work, python, cores = Path(arguments.work), sys.executable, str(arguments.cores)
    ours = [python, "-m", "megatron_encdec", "preprocess", "--input", str(text), "--tokenizer", str(tokenizer),
            "--workers", cores, "--output"]
    found = {"ours": ([*ours, str(work / "ours")], {}, work / "ours.bin")}
    if arguments.all:
        found["ours, tokenizers"] = ([*ours, str(work / "slow"), "--encoder", "tokenizers"], {}, work / "slow.bin")
    found["encode_batch"] = ([python, "-c", ENCODE_BATCH, str(tokenizer / "tokenizer.json"), str(text)],
                             {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": cores}, None)
    if arguments.megatron_lm:
        root = Path(arguments.megatron_lm)
        path = {"PYTHONPATH": os.pathsep.join([str(root), *arguments.peer_path]), "RAYON_NUM_THREADS": cores}
        common = ["--input", str(text), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
                  str(tokenizer), "--append-eod", "--output-prefix"]
        for name, tool, options in (("megatron fast", "preprocess_data_fast.py", ["--use-gigatoken"]),
                                    ("megatron classic", "preprocess_data.py", ["--workers", cores])):
            prefix = work / name.replace(" ", "_")
            found[name] = ([python, "-W", "ignore", str(root / "tools" / tool), *common, str(prefix), *options], path,
                           Path(f"{prefix}_text_document.bin"))
    return found


def stages(text: Path, tokenizer_path: Path, megabytes: int) -> dict[str, float]:
    """Seconds a megabyte of input spends in one worker, by what it is spent on."""
    from megatron_encdec.text.chunks import slots
    from megatron_encdec.text.documents import read_chunk
    from megatron_encdec.text.encode import Worker
    from megatron_encdec.text.encoder import GIGATOKEN, Encoder
    from megatron_encdec.text.inputs import list_files
    from megatron_encdec.text.tokenizer import load_tokenizer

    chunks = [chunk for chunk, _ in zip(slots(list_files([text]), "text"), range(megabytes // 16), strict=False)]
    size = sum(chunk.consumed for chunk in chunks) / 1e6
    encoder = Encoder(load_tokenizer(tokenizer_path), GIGATOKEN)
    reading = encoding = 0.0
    for chunk in chunks:
        start = time.perf_counter()
        batches = list(read_chunk(chunk, "text"))
        middle = time.perf_counter()
        for batch in batches:
            encoder.encode(batch.texts_D)
        encoding += time.perf_counter() - middle
        reading += middle - start
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(str(tokenizer_path), None, None, GIGATOKEN, "text", 0.0, folder)
        start = time.perf_counter()
        for number, chunk in enumerate(chunks):
            worker((number, chunk))
        whole = time.perf_counter() - start
    return {"reading and parsing": reading / size, "encoding": encoding / size,
            "joining, hashing, writing": max(whole - reading - encoding, 0.0) / size}


def differences(ours: Path, theirs: Path, arguments) -> tuple[int, int]:
    """(documents whose ids differ, those of them whose text spells out one of the tokenizer's special tokens)."""
    from megatron_encdec.data.store import TokenStore
    from megatron_encdec.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(arguments.work) / "tokenizer")
    names = [tokenizer.token(id_) for id_ in tokenizer.special_ids]
    pairs = [TokenStore(str(path).removesuffix(".bin")) for path in (ours, theirs)]
    ends = [np.concatenate([[0], store.document_ends(0, store.tokens)]) for store in pairs]
    if len(ends[0]) != len(ends[1]):
        sys.exit(f"{theirs}: {len(ends[1]) - 1} documents, ours are {len(ends[0]) - 1}")
    tokens = [np.fromfile(path, store.dtype) for path, store in zip((ours, theirs), pairs, strict=True)]
    different = spelt = 0
    for document in range(len(ends[0]) - 1):
        mine, other = (tokens_T[end[document] : end[document + 1]] for tokens_T, end in zip(tokens, ends, strict=True))
        if not np.array_equal(mine, other):
            different += 1
            text = tokenizer.decode(mine[:-1])
            spelt += any(name in text for name in names)
    return different, spelt


def main() -> None:
    """Measure in turns, compare the ids, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, metavar="JSONL")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2, help="of our command and the fastest peer; others once")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", default="work_dirs/benchmark_preprocess")
    parser.add_argument("--megatron-lm", metavar="DIR")
    parser.add_argument("--peer-path", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--all", action="store_true", help="ours with --encoder tokenizers, too")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="leave out the others")
    parser.add_argument("--json", metavar="PATH")
    arguments = parser.parse_args()
    from megatron_encdec.text.inputs import list_files
    from megatron_encdec.text.preprocess import ensure_tokenizer

    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    text, tokenizer = work / "text.jsonl", work / "tokenizer"
    make_text(arguments.text, arguments.gigabytes, text)
    ensure_tokenizer(list_files(arguments.text), tokenizer, "text", 16384, False)
    found, results = commands(arguments, text, tokenizer), {}
    if arguments.only:
        found = {name: command for name, command in found.items() if name in ("ours", *arguments.only)}
    for turn in range(arguments.rounds):
        for name, (command, environment, output) in found.items():
            if turn and name not in ("ours", "megatron fast"):
                continue
            if name.startswith("ours"):
                for old in work.glob(f"{output.stem}.*"):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            results.setdefault(name, []).append(measure(command, environment))
            print(f"{name}: {results[name][-1][0]:.1f} s, {results[name][-1][1] / 1e9:.2f} GB", flush=True)
    report(arguments, text, found, results, stages(text, tokenizer, 256))


def report(arguments, text: Path, found: dict, results: dict, parts: dict) -> None:
    """Print times as ratios to ours, whether the ids agree, and where our time goes."""
    size = text.stat().st_size / 1e6
    ours = statistics.median(seconds for seconds, _ in results["ours"])
    rows = {}
    print(f"\n{size:,.0f} MB of text, {arguments.cores} cores\n\n| | seconds | MB/s | times ours | peak memory |\n"
          "|---|---|---|---|---|")
    for name, runs in results.items():
        seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
        rows[name] = {"seconds": [run[0] for run in runs], "ratio": seconds / ours, "peak_bytes": peak}
        print(f"| {name} | {seconds:.1f} | {size / seconds:.1f} | {seconds / ours:.2f} | {peak / 1e9:.2f} GB |")
    for name, (_, _, output) in found.items():
        if output and name != "ours":
            rows[name]["different_documents"], spelt = differences(found["ours"][2], output, arguments)
            print(f"{name}: {rows[name]['different_documents']} documents have other ids than ours; {spelt} of them "
                  "spell out a special token, which is text to us and a special token there")
    print("one worker, ms a MB of input: " + ", ".join(f"{name} {1e3 * value:.2f}" for name, value in parts.items()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"bytes": text.stat().st_size, "rows": rows, "stages": parts}))


if __name__ == "__main__":
    main()
