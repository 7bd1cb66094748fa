"""The readers under a coverage-guided fuzzer.

    pip install atheris
    python tests/fuzz/run.py [READER ...] [--seconds 5] [--corpus FOLDER]

Each reader runs for so many seconds in a process of its own, from real files and from what earlier runs
put into the corpus. What makes one raise anything but the package's own errors, hang for 20 seconds or
take 2 GiB ends it: exit code 1, and the file lies in the corpus, where `--seconds 0` runs it again.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HANG, MEMORY, LARGEST = 20, 2048, 8192  # seconds, MiB, bytes of a file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        return fuzz(given.readers[0], given.seconds, given.corpus)
    with tempfile.TemporaryDirectory() as folder:
        corpus = given.corpus or Path(folder)
        names = given.readers or names_of_readers()
        failed = [name for name in names if run(name, given.seconds, corpus / name)]
    if failed:
        print(f"faults found in: {', '.join(failed)}")
    return bool(failed)


def names_of_readers() -> list[str]:
    sys.path.insert(0, str(Path(__file__).parent))
    from readers import READERS

    return list(READERS)


def run(name: str, seconds: int, corpus: Path) -> int:
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", __file__, name, "--inside"]
    command += ["--seconds", str(seconds), "--corpus", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    told = [
        line
        for line in done.stderr.splitlines()
        if line.startswith(("stat::", "SUMMARY")) or re.search(r"\b(DONE|INITED)\b", line)
    ]
    print(
        f"{name}: {'fault' if done.returncode else 'nothing found'}", *told, sep="\n  ", flush=True
    )
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-6000:], sep="\n")
    return done.returncode


def fuzz(name: str, seconds: int, corpus: Path) -> int:
    """In a process of its own: libFuzzer ends it."""
    import atheris
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with atheris.instrument_imports(include=["esd_fast", "readers"]):
            from readers import READERS, read, seeds

            for number, content in enumerate(seeds(name, folder)):
                (corpus / f"seed-{number}").write_bytes(content)
                read(name, content, folder)  # imports what it imports late
        options = [f"-timeout={HANG}", f"-rss_limit_mb={MEMORY}", f"-max_len={LARGEST}"]
        options += [f"-artifact_prefix={corpus}/", "-print_final_stats=1"]
        options += [f"-max_total_time={seconds}"] if seconds else ["-runs=0"]
        atheris.Setup(
            [name, *options, str(corpus)],
            lambda content: read(name, content, folder),
            custom_mutator=in_header if READERS[name][0] == ".safetensors" else None,
        )
        atheris.Fuzz()
    return 0


def in_header(content: bytes, largest: int, seed: int) -> bytes:
    """safetensors: the header changes and its length stays right, or few mutants would be read at
    all; numbers in it become such as readers stumble over."""
    import atheris

    draw = random.Random(seed)
    length = int.from_bytes(content[:8], "little")
    if draw.random() < 0.2 or len(content) < 8 + length:
        return atheris.Mutate(content, largest)
    header, body = content[8 : 8 + length], content[8 + length :]
    numbers = list(re.finditer(rb"\d+", header))
    if numbers and draw.random() < 0.5:
        first, end = draw.choice(numbers).span()
        header = header[:first] + draw.choice(NUMBERS) + header[end:]
    else:
        header = atheris.Mutate(header, max(1, largest - 8 - len(body)))
    return len(header).to_bytes(8, "little") + header + body


NUMBERS = (
    *(b"0", b"1", b"-1", b"4294967296", b"9223372036854775807", b"9223372036854775808"),
    *(b"18446744073709551615", b"1e9", b"0.5", b"true", b"null", b'"x"', b"[]", b"{}"),
)


if __name__ == "__main__":
    sys.exit(main())
