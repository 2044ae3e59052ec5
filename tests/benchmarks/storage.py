"""Storage: CPU time to write, scan and read at random 2,000 images with their captions, ours against what others keep data in.

    python -m tests.benchmarks.storage [--other-python /work/venv-bench/bin/python] [--rounds 5] [--folder /tmp]

A sample is one encoded image (not decoded; random bytes, 36 to 108 KB, mean 72) and the token ids of its caption (20 to 120, int32).
Reading means that both come back as bytes or arrays of the caller's own, from a warm page cache; "opened anew" is the first pass after
opening (a memory map then faults every page in, as in an epoch), "again" a later one. Writing includes opening and closing. Every round
runs every store, one after the other; a cell is the median of the rounds, a ratio is taken within each round first.
IndexedDataset is given the same two pairs of files as we write, and what Megatron-LM's tools/preprocess_mmdata.py makes of an image (int32,
padded). Nobody but us finds twins by SHA-256, checksums documents and fsyncs; "digest known" is ours where the caller has hashed already.
MosaicML streaming wants an older NumPy than ours, so it, webdataset, LMDB and HF datasets run in another interpreter on the same data:

    python3.11 -m venv /work/venv-bench
    /work/venv-bench/bin/pip install torch==2.13.0 mosaicml-streaming webdataset lmdb datasets "huggingface-hub<1" typer
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import mmap
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

Sample = tuple[Any, Any]
"""(encoded image, token ids as int32), each bytes-like."""
Get = Callable[[int], Sample]
CONTEXT_TOKENS = 12


@dataclass(frozen=True)
class Data:
    images: list[bytes]
    ids: list[bytes]

    @cached_property
    def digests(self) -> list[bytes]:
        return [hashlib.sha256(image).digest() for image in self.images]

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return zip(self.images, self.ids, strict=True)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Store:
    write: Callable[[Path, Data], object]
    get: Callable[[Path], Get] | None = None
    """Opens it for random access; None where there is none."""
    scan: Callable[[Path], Iterator[Sample]] | None = None
    """In order; None: `get` one after the other."""
    packages: tuple[str, ...] = ()


def make_data(samples: int) -> Data:
    rng = np.random.default_rng(0)
    images = [b"\xff\xd8" + rng.bytes(int(size)) for size in rng.integers(36_000, 108_000, samples)]
    return Data(images, [rng.integers(0, 30_000, int(n), np.int32).tobytes() for n in rng.integers(20, 120, samples)])


def load_data(folder: Path) -> Data:
    get, count = get_flat(folder), len(np.load(folder / "ids.npy")) - 1
    images, ids = zip(*map(get, range(count)), strict=True)
    return Data(list(images), list(ids))


def write_flat(folder: Path, data: Data) -> None:
    for name, items in (("images", data.images), ("ids", data.ids)):
        with open(folder / name, "wb") as out:
            for item in items:
                out.write(item)
        np.save(folder / f"{name}.npy", np.cumsum([0, *map(len, items)]))


def get_flat(folder: Path) -> Get:
    def part(name: str) -> Callable[[int], bytes]:
        with open(folder / name, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offsets = np.load(folder / f"{name}.npy")
        return lambda i: data[offsets[i] : offsets[i + 1]]

    image, ids = part("images"), part("ids")
    return lambda i: (image(i), ids(i))


def segments(ids: bytes) -> list[tuple[Any, Any]]:
    values = np.frombuffer(ids, np.int32).tolist()
    return [("image", 0), ("context", values[:CONTEXT_TOKENS]), ("target", values[CONTEXT_TOKENS:])]


@cache
def tokenizer() -> Any:
    from megatron_infimed.data.chat import load_tokenizer
    from tests.tiny import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(tiny_tokenizer(folder))


def write_ours(folder: Path, data: Data, digests: list[bytes] | None = None) -> None:
    from megatron_infimed.data.shard_writer import ShardWriter

    with ShardWriter(folder / "set", tokenizer()) as writer:
        for i, (image, ids) in enumerate(data):
            number = writer.add_image(image, digests[i] if digests else None)
            writer.add_document(f"sample {i}", "benchmark", segments(ids), [number])
        writer.finish()


def get_ours(folder: Path) -> Get:
    from megatron_infimed.data.shards import Shard

    shard = Shard(folder / "set")

    def get(i: int) -> Sample:
        document = shard.document(i)
        return shard.image(document.images[0]), document.values[1:]  # the image is the first segment

    return get


def write_megatron(folder: Path, data: Data) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    text = IndexedDatasetBuilder(str(folder / "text.bin"), np.int32, multimodal=True)
    image = IndexedDatasetBuilder(str(folder / "image.bin"), np.uint8)
    for i, (picture, ids) in enumerate(data):
        image.add_item(torch.frombuffer(bytearray(picture), dtype=torch.uint8))
        image.end_document()
        for mode, (_, values) in zip((2, 0, 1), segments(ids), strict=True):
            text.add_item(torch.tensor([i] if mode == 2 else values, dtype=torch.int32), mode)
        text.end_document()
    text.finalize(str(folder / "text.idx"))
    image.finalize(str(folder / "image.idx"))


def get_megatron(folder: Path) -> Get:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    text: Any = IndexedDataset(str(folder / "text"), multimodal=True)
    image: Any = IndexedDataset(str(folder / "image"))
    ends = text.document_indices

    def get(i: int) -> Sample:
        (number, *parts), _ = text[int(ends[i]) : int(ends[i + 1])]
        return image[int(number[0])].tobytes(), np.concatenate(parts)

    return get


def write_mmdata(folder: Path, data: Data) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    out = IndexedDatasetBuilder(str(folder / "set.bin"), np.int32, multimodal=True)
    for picture, ids in data:
        padded = bytearray(picture)
        padded.extend([0] * (-len(picture) % 4))
        out.add_item(torch.IntTensor(np.frombuffer(ids, np.int32).tolist()))
        out.add_item(torch.from_numpy(np.insert(np.frombuffer(padded, np.int32), 0, -len(picture) % 4)), 1)
        out.end_document()
    out.finalize(str(folder / "set.idx"))


def get_mmdata(folder: Path) -> Get:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    samples: Any = IndexedDataset(str(folder / "set"), multimodal=True)

    def get(i: int) -> Sample:
        image = samples[2 * i + 1][0]
        return image[1:].tobytes()[: 4 * (len(image) - 1) - int(image[0])], samples[2 * i][0].copy()

    return get


def write_webdataset(folder: Path, data: Data) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%04d.tar"), encoder=False, verbose=0) as out:  # type: ignore[attr-defined]
        for i, (image, ids) in enumerate(data):
            out.write({"__key__": f"{i:06d}", "jpg": image, "ids": ids})


def scan_webdataset(folder: Path) -> Iterator[Sample]:
    import webdataset

    samples = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)  # type: ignore[attr-defined]
    return ((sample["jpg"], sample["ids"]) for sample in samples)


def streaming() -> Any:
    """MosaicML's streaming.base without the package around it, which imports torchvision and so wants a torch of the same build."""
    if "streaming" not in sys.modules and (spec := importlib.util.find_spec("streaming")):
        sys.modules["streaming"] = types.ModuleType("streaming")
        sys.modules["streaming"].__path__ = list(spec.submodule_search_locations or ())
    return importlib.import_module("streaming.base")


def write_mds(folder: Path, data: Data) -> None:
    with streaming().MDSWriter(out=str(folder / "set"), columns={"image": "bytes", "ids": "bytes"}) as out:
        for image, ids in data:
            out.write({"image": image, "ids": ids})


def get_mds(folder: Path) -> Get:
    samples = streaming().LocalDataset(str(folder / "set"))

    def get(i: int) -> Sample:
        sample = samples[i]
        return sample["image"], sample["ids"]

    return get


def write_lmdb(folder: Path, data: Data) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 40) as db, db.begin(write=True) as out:
        for i, (image, ids) in enumerate(data):
            out.put(b"i%08d" % i, image)
            out.put(b"t%08d" % i, ids)


def get_lmdb(folder: Path) -> Get:
    import lmdb

    read = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, map_size=1 << 40).begin()
    return lambda i: (read.get(b"i%08d" % i), read.get(b"t%08d" % i))


def write_arrow(folder: Path, data: Data) -> None:
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(folder / "set.arrow"), features=Features(image=Value("binary"), ids=Value("binary"))) as out:
        for image, ids in data:
            out.write({"image": image, "ids": ids})
        out.finalize()


def get_arrow(folder: Path) -> Get:
    from datasets import Dataset

    samples = Dataset.from_file(str(folder / "set.arrow"))

    def get(i: int) -> Sample:
        sample = samples[i]
        return sample["image"], sample["ids"]

    return get


FLAT, OURS, MEGATRON = "flat file, mmap and offsets: the floor", "ours", "Megatron-Core IndexedDataset, the same files"
HERE = {
    FLAT: Store(write_flat, get_flat, packages=("numpy",)),
    OURS: Store(write_ours, get_ours, packages=("megatron-infimed",)),
    "ours, digest known": Store(lambda folder, data: write_ours(folder, data, data.digests)),
    MEGATRON: Store(write_megatron, get_megatron, packages=("megatron-core",)),
    "Megatron-Core IndexedDataset, as preprocess_mmdata.py": Store(write_mmdata, get_mmdata),
}
THERE = {
    "LMDB": Store(write_lmdb, get_lmdb, packages=("lmdb",)),
    "HF datasets, arrow": Store(write_arrow, get_arrow, packages=("datasets", "pyarrow", "numpy")),
    "MosaicML MDS": Store(write_mds, get_mds, packages=("mosaicml-streaming",)),
    "webdataset, tar": Store(write_webdataset, scan=scan_webdataset, packages=("webdataset",)),
}
ACTIONS = {"write": "write", "scan": "sequential", "anew": "random, opened anew", "random": "random, again"}


class Bench:
    """The stores of one interpreter, each with a folder of its own."""

    def __init__(self, folder: Path, stores: dict[str, Store]) -> None:
        self._folder, self._stores, self._data = folder, stores, load_data(folder / "data")
        self._order = random.Random(0).sample(range(len(self._data)), len(self._data))
        self._open: dict[str, Get] = {}

    def microseconds(self, name: str, action: str) -> float | None:
        """CPU time of all threads, a sample; None where the store cannot do it."""
        store, folder = self._stores[name], self._folder / hashlib.sha1(name.encode()).hexdigest()
        if action == "write":
            self._open.pop(name, None)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return self._cpu(lambda: store.write(folder, self._data))
        if store.scan and action == "scan":
            check(store.scan(folder), self._data)
            return self._cpu(lambda: exhaust(store.scan(folder)))  # type: ignore[misc]
        if not store.get:
            return None
        if name not in self._open:
            check(map(store.get(folder), range(len(self._data))), self._data)
        if action == "anew" or name not in self._open:
            self._open.pop(name, None)  # LMDB opens a folder once a process
            self._open[name] = store.get(folder)
        get, order = self._open[name], range(len(self._data)) if action == "scan" else self._order
        return self._cpu(lambda: exhaust(map(get, order)))

    def _cpu(self, work: Callable[[], object]) -> float:
        begin = time.process_time()
        work()
        return (time.process_time() - begin) / len(self._data) * 1e6

    def versions(self) -> list[str]:
        names = [package for store in self._stores.values() for package in store.packages]
        return [f"python {platform.python_version()}", *(f"{name} {importlib.metadata.version(name)}" for name in names)]


def exhaust(samples: Iterator[Sample]) -> None:
    for _ in samples:
        pass


def check(samples: Iterator[Sample], data: Data) -> None:
    """What was written comes back, each image with its caption."""
    for (image, ids), (wanted_image, wanted_ids) in zip(samples, data, strict=True):
        assert image == wanted_image and bytes(ids) == wanted_ids


def serve(folder: Path) -> None:
    """The other interpreter's side: a line [name, action] in, a line of microseconds out."""
    bench, answers = Bench(folder, THERE), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        print(json.dumps(bench.versions()), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(bench.microseconds(*json.loads(line))), file=answers, flush=True)


class Remote:
    """A Bench in another interpreter."""

    def __init__(self, python: Path, folder: Path) -> None:
        command = [str(python), "-W", "ignore", "-m", "tests.benchmarks.storage", "--folder", str(folder), "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        self._versions = self._answer()

    def microseconds(self, name: str, action: str) -> float | None:
        assert self._process.stdin
        print(json.dumps([name, action]), file=self._process.stdin, flush=True)
        return self._answer()

    def versions(self) -> list[str]:
        return self._versions

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other interpreter ended with code {self._process.wait()}; what it said is above")
        return json.loads(line)


def table(rounds: list[dict[tuple[str, str], float | None]], names: list[str]) -> Iterator[str]:
    """Rows of the table: microseconds a sample, and times the floor (reading) or times Megatron-Core (writing)."""
    heads = ["CPU µs a sample", *ACTIONS.values(), "write / IndexedDataset", "random / floor, opened anew", "again"]
    yield "| " + " | ".join(heads) + " |\n|" + "---|" * len(heads)
    for name in names:
        cells = [name]
        for action in ACTIONS:
            cells.append("" if rounds[0][name, action] is None else f"{statistics.median(r[name, action] or 0 for r in rounds):.1f}")
        for action, other in (("write", MEGATRON), ("anew", FLAT), ("random", FLAT)):
            ratios = [(r[name, action] or 0) / (r[other, action] or 1) for r in rounds]
            cells.append("" if rounds[0][name, action] is None else f"{statistics.median(ratios):.2f}")
        yield "| " + " | ".join(cells) + " |"


def main(
    samples: int = 2000,
    rounds: int = 5,
    folder: Path = Path(tempfile.gettempdir()),
    other_python: Path | None = None,
    serve_here: Annotated[bool, typer.Option("--serve", hidden=True)] = False,
) -> None:
    if serve_here:
        serve(folder)
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="storage-") as scratch, contextlib.ExitStack() as stack:
        data = Path(scratch, "data")
        data.mkdir()
        write_flat(data, make_data(samples))
        here: Bench | Remote = Bench(Path(scratch), HERE)
        where = dict.fromkeys(HERE, here)
        print("here:", ", ".join(here.versions()))
        if other_python:
            remote = Remote(other_python, Path(scratch))
            stack.callback(remote.close)
            where |= dict.fromkeys(THERE, remote)
            print("there:", ", ".join(remote.versions()))
        else:
            print(f"left out for want of --other-python: {', '.join(THERE)}")
        took: list[dict[tuple[str, str], float | None]] = []
        for _ in range(rounds + 1):
            took.append({(name, action): bench.microseconds(name, action) for name, bench in where.items() for action in ACTIONS})
        print(*table(took[1:], list(where)), sep="\n")  # the first one imports


if __name__ == "__main__":
    typer.run(main)
