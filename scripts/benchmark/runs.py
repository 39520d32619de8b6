"""Taking one measurement: a contender serves an image, something is done with it, and the rate in
bytes a second comes back, with the processor time that the contender took for a GiB."""

import contextlib
import ctypes
import io
import json
import os
import random
import tarfile
import threading
import time
from dataclasses import dataclass

from contenders import Convert, Failed, run

GIB = 1 << 30
MIB = 1 << 20
# The mode of fallocate(2).
PUNCH_HOLE_KEEP_SIZE = 2 | 1


@dataclass
class Sample:
    """One run: bytes a second; seconds of processor time for a GiB, where that was to be had."""

    rate: float
    cpu: float | None = None


@contextlib.contextmanager
def loop_device(server):
    direct = f"--direct-io={'on' if server.takes_direct_loops else 'off'}"
    device = run("losetup", "-f", "--show", direct, server.path).strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextlib.contextmanager
def mounted(device, point):
    run("mount", device, point)
    try:
        yield
    finally:
        run("umount", point)


def allocated(path):
    return os.stat(path).st_blocks * 512


class Runs:
    """Takes measurements beneath `work`, each as long as `seconds` where it has no end by itself."""

    def __init__(self, work, images, seconds):
        self.work = work
        self.images = images
        self.seconds = seconds
        self.disk = work / "disk"
        self.copy_path = work / "copy"
        self.tree = None

    def take(self, contender, job):
        """One measurement of `job`.

        Raises `Failed`, which says why there is none."""
        image = self.images.get(job.image, contender.reads)
        return getattr(self, job.how)(contender, image, job)

    def fio_command(self, path, options, limit=8 * GIB):
        """What fio printed of a run over the first `limit` bytes of a file."""
        size = min(os.stat(path).st_size, limit)
        return run(
            "fio", "--name=job", f"--filename={path}", f"--size={size}", "--norandommap=1",
            "--time_based=1", f"--runtime={self.seconds}", "--randrepeat=0",
            "--allow_file_create=0", "--thread", "--output-format=json", *options,
            limit=120 + 10 * self.seconds)

    def fio(self, contender, image, job):
        if isinstance(contender, Convert):
            return self.convert(contender, image)
        with contender.serve(image) as server:
            sample = self.fio_sample(server, server.path, job.options)
        if "--pre_read=1" in job.options:
            sample.cpu = None
        return sample

    def fio_sample(self, server, path, options):
        """One run of fio on a file, for which `server` works."""
        before = server.cpu_seconds()
        printed = self.fio_command(path, options)
        took = server.cpu_seconds() - before
        sample = self.rate_of(printed)
        if server.processes:
            sample.cpu = took * GIB / self.bytes_of(printed)
        return sample

    @staticmethod
    def results(printed):
        # What fio warns of comes before the JSON.
        return json.loads(printed[printed.index("{"):])["jobs"]

    def bytes_of(self, printed):
        return sum(job[way]["io_bytes"] for job in self.results(printed)
                   for way in ("read", "write"))

    def rate_of(self, printed):
        jobs = self.results(printed)
        if any(job["error"] for job in jobs):
            raise Failed("fio met an error")
        return Sample(sum(job[way]["bw_bytes"] for job in jobs for way in ("read", "write")))

    def convert(self, contender, image):
        size = json.loads(run("qemu-img", "info", "--output=json", image))["virtual-size"]
        self.copy_path.unlink(missing_ok=True)
        start = time.monotonic()
        contender.convert(image, size, self.copy_path)
        rate = size / (time.monotonic() - start)
        self.copy_path.unlink(missing_ok=True)
        return Sample(rate)

    def copy(self, contender, image, _job):
        if isinstance(contender, Convert):
            return self.convert(contender, image)
        with contender.serve(image) as server:
            size = os.stat(server.path).st_size
            self.copy_path.unlink(missing_ok=True)
            sample = self.timed(server, size, "dd", f"if={server.path}", f"of={self.copy_path}",
                                "bs=1M", "status=none")
        self.copy_path.unlink(missing_ok=True)
        return sample

    def dd(self, contender, image, _job):
        """All of a disk is written, by a program that opens it for writing only."""
        with contender.serve(image) as server:
            size = os.stat(server.path).st_size
            return self.timed(server, size, "dd", "if=/dev/zero", f"of={server.path}", "bs=1M",
                              f"count={size // MIB}", "conv=notrunc", "status=none")

    @staticmethod
    def timed(server, size, *command):
        """Runs a command that moves `size` bytes."""
        before, start = server.cpu_seconds(), time.monotonic()
        run(*command)
        took = time.monotonic() - start
        cpu = (server.cpu_seconds() - before) * GIB / size if server.processes else None
        return Sample(size / took, cpu)

    @contextlib.contextmanager
    def new_ext4(self, server):
        with loop_device(server) as device:
            run("mkfs.ext4", "-q", "-E", "nodiscard", device)
            with mounted(device, self.disk):
                yield

    def untar(self, contender, image, _job):
        if self.tree is None:
            self.tree = self.make_tree()
        archive, size = self.tree
        with contender.serve(image) as server, self.new_ext4(server):
            return self.timed(server, size, "sh", "-c",
                              f"tar -xf {archive} -C {self.disk} && sync -f {self.disk}")

    def make_tree(self):
        """5000 files of 1 to 16 KiB in 200 directories."""
        path, size, source = self.work / "tree.tar", 0, random.Random(4)
        with tarfile.open(path, "w") as tar:
            for number in range(5000):
                content = source.randbytes(source.randint(1 << 10, 16 << 10))
                entry = tarfile.TarInfo(f"tree/{number % 200}/{number}")
                entry.size = len(content)
                size += entry.size
                tar.addfile(entry, io.BytesIO(content))
        return path, size

    def fio_on_ext4(self, contender, image, job):
        with contender.serve(image) as server, self.new_ext4(server):
            file = self.disk / "file"
            file.write_bytes(random.Random(5).randbytes(64 * MIB))
            run("sync", "-f", self.disk)
            return self.fio_sample(server, file, job.options)

    def fstrim(self, contender, image, _job):
        before, deleted = allocated(image), self.images.size
        with contender.serve(image) as server, loop_device(server) as device:
            with mounted(device, self.disk):
                sample = self.timed(server, deleted, "fstrim", self.disk)
        came_back = before - allocated(image)
        if came_back < 0.9 * deleted:
            raise Failed(f"fstrim ended, {came_back // MIB} of {deleted // MIB} MiB came back")
        return sample

    # The checks.

    def syncs(self, contender, _baseline):
        """Host syncs for each of 200 allocating writes and their fdatasync."""
        count = 200
        image = self.images.empty("qcow2")
        with contender.serve(image) as server:
            file = os.open(server.path, os.O_RDWR)
            try:
                # The first makes the L2 table that all others find.
                os.pwrite(file, b"x" * 4096, count << 20)
                os.fdatasync(file)
                before = self.host_syncs(server, image)
                for number in range(count):
                    os.pwrite(file, b"x" * 4096, number << 20)
                    os.fdatasync(file)
                return (self.host_syncs(server, image) - before) / count
            finally:
                os.close(file)

    @staticmethod
    def host_syncs(server, image):
        status = json.loads((server.path.parent / ".qcow2fs" / "status").read_text())
        found = [one["syncs"] for one in status["images"] if image.stem in one["name"]]
        if not found:
            raise Failed("the status does not show the image")
        return found[0]

    def beside_fsync(self, contender, swapped):
        return self.beside(contender, swapped, self.write_and_sync)

    def beside_discard(self, contender, swapped):
        return self.beside(contender, swapped, self.discard)

    def beside(self, contender, swapped, disturb):
        """Reads of seven images beside work on an eighth, as a part of the same without it."""
        first = self.images.get("many", "qcow2")
        names = [first.with_name(f"many-{number}") for number in range(8)]
        with contender.serve(first) as server:
            paths = [server.path.with_name(name.name + ".raw") for name in names]
            measured = {}
            for disturbed in (swapped, not swapped):
                done = threading.Event()
                arguments = (paths[0], done)
                worker = threading.Thread(target=disturb, args=arguments) if disturbed else None
                if worker:
                    worker.start()
                try:
                    measured[disturbed] = self.read_all(paths[1:])
                finally:
                    done.set()
                    if worker:
                        worker.join()
        return measured[True] / measured[False]

    def read_all(self, paths):
        options = [f"--filename={':'.join(map(str, paths))}", "--rw=randread", "--bs=4k",
                   "--ioengine=libaio", "--iodepth=16", "--direct=1", "--file_service_type=random"]
        printed = run("fio", "--name=job", *options, f"--size={len(paths) * self.images.size // 8}",
                      "--norandommap=1", "--time_based=1", f"--runtime={2 * self.seconds}",
                      "--thread", "--output-format=json", limit=120 + 10 * self.seconds)
        return self.rate_of(printed).rate

    @staticmethod
    def every_10_ms(path, done, what):
        file = os.open(path, os.O_RDWR)
        try:
            size = os.fstat(file).st_size
            number = 0
            while not done.wait(0.01):
                what(file, (number * 37 * MIB) % (size - MIB))
                number += 1
        finally:
            os.close(file)

    def write_and_sync(self, path, done):
        def what(file, at):
            os.pwrite(file, b"y" * 65536, at)
            os.fsync(file)
        self.every_10_ms(path, done, what)

    def discard(self, path, done):
        libc = ctypes.CDLL(None, use_errno=True)

        def what(file, at):
            at, length = ctypes.c_int64(at), ctypes.c_int64(MIB)
            libc.fallocate(file, PUNCH_HOLE_KEEP_SIZE, at, length)
        self.every_10_ms(path, done, what)
