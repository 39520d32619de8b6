"""How the cost of a mount grows: with the number of images, and with the size of one.

Nothing is compared with others here; the figures have limits of their own. Images are sparse: their
metadata is whole, their data takes no room."""

import os
import random
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass

from contenders import Qcow2fs, run

GIB = 1 << 30
TIB = 1 << 40
BLOCK = 4096

COUNTS = (10, 100, 1000, 10000)
# Virtual size, and whether all of it is allocated.
SIZES = ((GIB, True), (16 * GIB, True), (256 * GIB, True), (TIB, True), (16 * TIB, False))
# Of 1,000 images nobody uses: memory in bytes.
IDLE_LIMIT = 30 << 20
# What random reads over 1 TiB are to keep of the rate over 1 GiB.
READS_LIMIT = 0.8


@dataclass
class Count:
    """A mount of many images. Seconds; bytes of resident memory."""

    images: int
    mount: float
    listing: float
    idle: int
    used: int


@dataclass
class Size:
    """A mount of one image. Seconds; bytes of resident memory; bytes a second of each round."""

    virtual: int
    allocated: bool
    file: int
    mount: float
    opening: float
    opened: int
    read: int
    rates: list


def resident(server):
    """Bytes of memory that the server's processes hold."""
    total = 0
    for process in server.processes:
        with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
            total += next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS:"))
    return total


def first_read(path):
    """Seconds until an image that nobody had open has given its first block."""
    start = time.monotonic()
    file = os.open(path, os.O_RDONLY)
    try:
        os.pread(file, BLOCK, 0)
    finally:
        os.close(file)
    return time.monotonic() - start


class Growth:
    """Takes the measurements beneath `work`, images in `images`."""

    def __init__(self, work, programs, runs):
        self.contender = Qcow2fs(work, programs)
        self.images = work / "growing"
        self.runs = runs

    def count(self, number):
        """A mount of `number` images, empty ones of 10 GiB."""
        self.images.mkdir()
        first = self.images / "0.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", first, "10G")
        content = first.read_bytes()
        blocks = [at for at in range(0, len(content), BLOCK) if any(content[at:at + BLOCK])]
        for copy in range(1, number):
            with open(self.images / f"{copy}.qcow2", "wb") as file:
                for at in blocks:
                    file.seek(at)
                    file.write(content[at:at + BLOCK])
                file.truncate(len(content))
        start = time.monotonic()
        with self.contender.serve(first) as server:
            mounted = time.monotonic() - start
            idle = resident(server)
            start = time.monotonic()
            subprocess.run(["ls", "-l", server.path.parent], stdout=subprocess.DEVNULL, check=True,
                           timeout=300)
            listing = time.monotonic() - start
            for path in server.path.parent.glob("*.raw"):
                first_read(path)
            used = resident(server)
        shutil.rmtree(self.images)
        return Count(number, mounted, listing, idle, used)

    def sizes(self, rounds):
        """One image of each size; the rates are taken in turn."""
        self.images.mkdir()
        found = []
        for virtual, allocated in SIZES:
            image = self.images / f"{virtual}" / "disk.qcow2"
            image.parent.mkdir()
            options = ("-o", "preallocation=metadata") if allocated else ()
            run("qemu-img", "create", "-q", "-f", "qcow2", *options, image, virtual)
            found.append(self.size(image, virtual, allocated))
        for number in range(rounds):
            for size in random.Random(number).sample(found, len(found)):
                image = self.images / f"{size.virtual}" / "disk.qcow2"
                with self.contender.serve(image) as server:
                    size.rates.append(self.rate(server, size.virtual))
                    size.read = max(size.read, resident(server))
        shutil.rmtree(self.images)
        return found

    def size(self, image, virtual, allocated):
        start = time.monotonic()
        with self.contender.serve(image) as server:
            mounted = time.monotonic() - start
            opening = first_read(server.path)
            return Size(virtual, allocated, image.stat().st_size, mounted, opening,
                        resident(server), 0, [])

    def rate(self, server, virtual):
        """Random reads of 4 KiB over all of it, 32 at once."""
        options = ("--rw=randread", "--bs=4k", "--iodepth=32", "--ioengine=libaio", "--direct=1")
        return self.runs.rate_of(self.runs.fio_command(server.path, options, virtual)).rate


def unit(size):
    for name, bytes_of_it in (("TiB", TIB), ("GiB", GIB), ("MiB", 1 << 20)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.0f} {name}"
    return f"{size >> 10} KiB"


def verdict(found, limit, good):
    return f"{found}, limit {limit}: {'met' if good else '**missed**'}"


def tables(counts, sizes):
    """Both tables and what became of the limits, in Markdown."""
    lines = ["| images | mounted after | `ls -l` | memory, nobody uses them | memory, each was read |",
             "|--:|--:|--:|--:|--:|"]
    lines += [f"| {one.images} | {one.mount * 1e3:.0f} ms | {one.listing * 1e3:.0f} ms | "
              f"{one.idle / 2**20:.1f} MiB | {one.used / 2**20:.1f} MiB |" for one in counts]
    lines += ["", "| disk | allocated | image file | mounted after | open and first block | "
              "memory, open | memory, after random reads | 4 KiB random reads, 32 at once |",
              "|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for one in sizes:
        lines.append(
            f"| {unit(one.virtual)} | {'all' if one.allocated else 'nothing'} | {unit(one.file)} | "
            f"{one.mount * 1e3:.0f} ms | {one.opening * 1e3:.1f} ms | {one.opened / 2**20:.1f} MiB | "
            f"{one.read / 2**20:.1f} MiB | {statistics.median(one.rates) / 1e6:.0f} MB/s |")
    idle = next(one.idle for one in counts if one.images == 1000) / 2**20
    rates = {one.virtual: one.rates for one in sizes if one.allocated}
    kept = statistics.median(large / small for large, small in zip(rates[TIB], rates[GIB]))
    lines += [
        "", "- Memory of 1,000 images that nobody uses: "
        + verdict(f"{idle:.1f} MiB", f"{IDLE_LIMIT >> 20} MiB", idle * 2**20 <= IDLE_LIMIT),
        "- Random reads over 1 TiB against those over 1 GiB: "
        + verdict(f"{kept:.2f}", READS_LIMIT, kept >= READS_LIMIT),
    ]
    return "\n".join(lines)
