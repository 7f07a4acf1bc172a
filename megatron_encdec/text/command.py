"""The verb `preprocess`: text files to `.bin/.idx` and a manifest. Its options and help, and what it prints."""

import argparse
from dataclasses import fields

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.signals import interrupts_end_the_process

DESCRIPTION = """\
Turn text into token ids on disk, once, for every run that will train on it.

Reads .txt and .md (one document a file), .jsonl, .json and .ndjson (one a line; also as .jsonl.gz, .jsonl.zst, ...),
.parquet (one a row) and hf:NAME[:CONFIG[:SPLIT]] (a dataset streamed from the hub), from this machine or by URL
(s3://, gs://, hf://, https://, ... whatever fsspec knows here), encodes them in parallel, ends each document with
the tokenizer's end-of-document token, and writes

  PREFIX.bin, PREFIX.idx     the ids, in the format that Megatron's IndexedDataset reads
  PREFIX.manifest.json       documents, tokens, bytes, what was skipped and why, fingerprints

A .json file has to hold JSON lines, as C4's and Dolma's do. Directories are searched to any depth, through links too;
what is there and not read is said in one line. Every document is in the output or counted with a reason. Memory stays
flat whatever the size of the input or of a document. The same command again continues a run that was killed, from
PREFIX.partial/, and does nothing if nothing changed.
"""
USAGE = "see megatron-encdec preprocess --help"
EPILOG = """\
examples:
  # with an existing tokenizer
  megatron-encdec preprocess --input data/ --tokenizer llama3/tokenizer.json --output corpora/web

  # train a byte-level BPE of 8192 entries first; keep 1 % of the documents for validation
  megatron-encdec preprocess --input 'data/*.jsonl.gz' --train-tokenizer 8192 --tokenizer corpora/tokenizer \\
      --output corpora/docs --validation-percent 1

  # FineWeb-Edu, streamed: nothing but the ids is stored
  megatron-encdec preprocess --input hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer llama3/ --output corpora/fw

  # from a store, with title and body, English and of some quality
  megatron-encdec preprocess --input 's3://bucket/crawl/*.jsonl.zst' --text-key title body.text \\
      --where language=en 'score>=3' --tokenizer llama3/ --output corpora/crawl

  # on four machines, then put together: the bytes are those of one machine
  megatron-encdec preprocess --input data/ --tokenizer llama3/ --output corpora/web-1 --shard 1/4    # ... 4/4
  megatron-encdec preprocess --merge corpora/web-1 corpora/web-2 corpora/web-3 corpora/web-4 --output corpora/web

then name corpora/docs under data.train (and corpora/docs.validation under data.validation) in a config.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Put the verb's options and help on `parser`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--input", nargs="+", metavar="PATH", help="files, directories, quoted globs, URLs of stores, hf: "
        "datasets (required)")
    add("--tokenizer", metavar="PATH", help="tokenizer.json, a directory that holds one, or a SentencePiece "
        ".model; with --train-tokenizer the directory to make (required)")
    add("--output", metavar="PREFIX", help="where the files go: PREFIX.bin, ... (required)")
    add("--text-key", nargs="+", default=["text"], metavar="KEY", help="key of the text in JSON lines, column of "
        "Parquet files (default: text); a.b: the key b inside a; several keys are joined")
    add("--join", default="\n\n", metavar="TEXT", type=_text, help="what stands between the texts of several keys; "
        "'\\n' is a new line, '\\t' a tab (default: a blank line)")
    add("--where", nargs="+", action="extend", default=[], metavar="CONDITION", help="take only documents in which all "
        "of these hold: FIELD=VALUE (FIELD=A|B), FIELD!=VALUE, FIELD>=NUMBER (>, <, <=); others are counted")
    add("--workers", type=int, metavar="N", help="encoding processes (default: one a core); the output is the same "
        "for any number")
    add("--mask-token", metavar="TOKEN", help="the mask, where the tokenizer names none: a reserved token")
    add("--eod-token", metavar="TOKEN", help="end of document (default: the tokenizer's own)")
    add("--train-tokenizer", type=int, metavar="N", help="first train a byte-level BPE of N entries on the "
        "input, unless --tokenizer is there already")
    add("--validation-percent", type=float, default=0.0, metavar="P", help="write P %% of the documents to "
        "PREFIX.validation instead, chosen by a hash of the text, so that new data moves none (default: 0)")
    add("--on-error", choices=("count", "stop"), default="count", help="documents that cannot be used: count them "
        "with their reason, or stop at the first (default: count)")
    add("--encoder", choices=("gigatoken", "tokenizers"), help="library that encodes (default: gigatoken where a "
        "sample of the input proves that it gives the tokenizer's ids, else tokenizers)")
    add("--shard", dest="share", type=_share, default=(1, 1), metavar="I/N", help="do the I-th of N parts of the input")
    add("--merge", nargs="+", metavar="PREFIX", help="put finished outputs together, in this order; no --input")


def _text(value: str) -> str:
    """What a shell's quotes cannot easily hold, spelt out."""
    return value.replace("\\n", "\n").replace("\\t", "\t")


def _share(value: str) -> tuple[int, int]:
    index, _, count = value.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise argparse.ArgumentTypeError(f"{value!r} is not of the form I/N, such as 1/4")
    return int(index), int(count)


def require(input: object, tokenizer: object, output: object) -> None:
    """Raises `UserError` for one of these that is not given."""
    for option, value in {"input": input, "tokenizer": tokenizer, "output": output}.items():
        if value in (None, ""):
            raise UserError(f"preprocess: --{option} is missing; {USAGE}")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code 0, raises `UserError` for a mistake."""
    if arguments.merge and (arguments.input or not arguments.output):
        raise UserError(f"preprocess: --merge takes finished outputs and --output, no --input; {USAGE}")
    if not arguments.merge:
        require(arguments.input, arguments.tokenizer, arguments.output)
    with interrupts_end_the_process():
        from megatron_encdec.text.merge import merge
        from megatron_encdec.text.preprocess import PreprocessSettings
        from megatron_encdec.text.summary import preprocessed, summary

    if arguments.merge:
        print(summary(arguments.output, merge(arguments.merge, arguments.output)))
    else:
        settings = {field.name: getattr(arguments, field.name) for field in fields(PreprocessSettings)}
        print(preprocessed(arguments.input, arguments.tokenizer, arguments.output,
                           train_tokenizer=arguments.train_tokenizer, **settings))
    return 0
