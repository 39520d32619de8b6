"""Who is measured: each serves one image as one raw file, and is stopped again.

A contender is started anew for every run, so no cache of a server lives from one run to the next.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time

TICKS = os.sysconf("SC_CLK_TCK")
LIMIT = 20


class Failed(Exception):
    """A run that gave no figure, and why."""


def run(*command, limit=300, **more):
    """Runs a command that must succeed; returns what it printed."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            timeout=limit, text=True, check=False, **more)
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} took longer than {limit} s") from None
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise Failed(f"{command[0]}: {last[0]}")
    return done.stdout


def wait_until(true, what, limit=20):
    end = time.monotonic() + limit
    while not true():
        if time.monotonic() > end:
            raise Failed(f"waited {limit} s for {what}")
        time.sleep(0.005)


def key_of(image):
    """The file with the key of an image, if that is encrypted."""
    key = image.with_suffix(".key")
    return key if key.exists() else None


def secret(image):
    """What tells QEMU's programs the key of an encrypted image, which they then call `key`."""
    return "--object", f"secret,id=key,file={image.with_suffix('.key')}"


class Server:
    """A file to read and write, and the processes behind it."""

    def __init__(self, path, processes, takes_direct_loops):
        self.path = path
        self.processes = processes
        self.takes_direct_loops = takes_direct_loops

    def cpu_seconds(self):
        """Processor time of all processes so far: user and system, all threads."""
        total = 0
        for process in self.processes:
            with open(f"/proc/{process.pid}/stat", encoding="ascii") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS


def end(process):
    """Waits for a process that was told to end, or ends it."""
    for stop in (None, signal.SIGTERM, signal.SIGKILL):
        if stop:
            process.send_signal(stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=LIMIT if stop is None else 10)
            return


def unmount(point):
    for _ in range(100):
        if subprocess.run(["umount", point], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return
        if not is_mounted(point):
            return
        time.sleep(0.05)
    subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL, check=False)


def is_mounted(point):
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return any(line.split()[1] == str(point) for line in mounts)


class Contender:
    """One way to get at an image. `reads` says which form of the image: qcow2 or raw."""

    reads = "qcow2"
    # Whether a loop device on it may use direct I/O, which is faster.
    takes_direct_loops = True

    def __init__(self, work, programs):
        self.work = work
        self.programs = programs
        self.log = work / "log"

    def missing(self):
        """Why it cannot take part here; None when it can."""
        return None

    @contextlib.contextmanager
    def serve(self, image):
        """Serves `image`; all is taken down at the end."""
        processes = []
        point = self.work / "mnt" / self.name
        point.mkdir(parents=True, exist_ok=True)
        try:
            yield Server(self.start(image, point, processes), processes, self.takes_direct_loops)
        finally:
            self.stop(point, processes)

    def stop(self, point, processes):
        """Unmounts; the server writes what it has to write, and ends by itself."""
        if is_mounted(point):
            unmount(point)
        for process in processes:
            end(process)

    def spawn(self, processes, *command):
        # The servers' own messages go to a file, not into the results.
        with open(self.log, "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        processes.append(process)
        return process

    def await_mount(self, process, point):
        def there():
            if process.poll() is not None:
                raise Failed(f"{self.name} ended at once; see its log")
            return is_mounted(point)
        wait_until(there, f"{self.name} to mount")


class Qcow2fs(Contender):
    name = "qcow2fs"

    def start(self, image, point, processes):
        more = ("--keys", image.parent) if key_of(image) else ()
        if image.with_suffix(".data").exists():
            more += ("--passthrough",)
        server = self.spawn(processes, self.programs / "qcow2fs", "mount", "--foreground", "-q",
                            *more, image.parent, point)
        self.await_mount(server, point)
        return point / (image.stem + ".raw")


class StorageDaemon(Contender):
    name = "qemu-storage-daemon"
    # With direct I/O, ext4 does not read back what mkfs.ext4 has written (QEMU 10.0.2).
    takes_direct_loops = False

    def missing(self):
        if not shutil.which(self.name):
            return "it is not installed"
        if "type=]fuse" not in run(self.name, "--help"):
            return "it is built without FUSE"
        return None

    def start(self, image, point, processes):
        path = point / "disk.raw"
        path.touch()
        is_encrypted = key_of(image) is not None
        encryption = ",encrypt.format=luks,encrypt.key-secret=key" if is_encrypted else ""
        server = self.spawn(
            processes, "qemu-storage-daemon",
            "--object", "iothread,id=thread",
            *(secret(image) if is_encrypted else ()),
            "--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap",
            "--blockdev", f"driver=qcow2,node-name=disk,file=file,discard=unmap{encryption}",
            "--export", f"fuse,id=export,node-name=disk,mountpoint={path},writable=on,"
                        "iothread=thread")
        self.await_mount(server, path)
        return path

    def stop(self, point, processes):
        for process in processes:
            process.terminate()
        super().stop(point / "disk.raw", processes)


class NbdFuse(Contender):
    name = "nbdfuse"

    def missing(self):
        absent = [tool for tool in ("nbdfuse", "qemu-nbd") if not shutil.which(tool)]
        return f"{absent[0]} is not installed" if absent else None

    def start(self, image, point, processes):
        socket = self.work / "socket"
        socket.unlink(missing_ok=True)
        if key_of(image):
            what = (*secret(image), "--image-opts",
                    f"driver=qcow2,encrypt.key-secret=key,file.filename={image}")
        else:
            what = ("--format=qcow2", image)
        self.spawn(processes, "qemu-nbd", f"--socket={socket}", "--shared=8", "--persistent",
                   "--discard=unmap", *what)
        wait_until(socket.exists, "qemu-nbd's socket")
        server = self.spawn(processes, "nbdfuse", point / "disk.raw", "--unix", socket)
        self.await_mount(server, point)
        return point / "disk.raw"

    def stop(self, point, processes):
        super().stop(point, processes[1:])
        # It serves on until it is told not to.
        for process in processes[:1]:
            process.terminate()
            end(process)


class Floor(Contender):
    name = "floor"
    reads = "raw"

    def start(self, image, point, processes):
        server = self.spawn(processes, self.programs / "examples" / "floor", image, point)
        self.await_mount(server, point)
        return point / "disk.raw"


class Raw(Contender):
    name = "raw"
    reads = "raw"

    def start(self, image, point, processes):
        return image


class Convert(Contender):
    """`qemu-img convert -O raw`, where the disk is only to be read once. To nothing (QEMU's null
    driver) is fair beside reading a mounted file to nothing, to a file beside copying it."""

    def __init__(self, work, programs, to_file):
        super().__init__(work, programs)
        self.to_file = to_file
        self.name = "convert to a file" if to_file else "convert to nothing"

    def convert(self, image, size, copy):
        """Takes as long as the conversion does."""
        if self.to_file:
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, copy)
        else:
            run("qemu-img", "convert", "-n", "-f", "qcow2", "--target-image-opts", image,
                f"driver=null-co,size={size}")


PEERS = ("qemu-storage-daemon", "nbdfuse")
ALL = (Qcow2fs, StorageDaemon, NbdFuse, Floor, Raw)
