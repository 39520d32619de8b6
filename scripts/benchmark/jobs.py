"""What is measured, and the goals: how many times as fast as others qcow2fs is to be.

`peer` is the better of the other servers of qcow2, `floor` the least that a FUSE server can do,
`raw` the raw file itself without any server.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """One measurement. `how` names the method of `runs.Runs` that takes it."""

    name: str
    title: str
    image: str
    how: str = "fio"
    options: tuple = ()
    goals: dict = field(default_factory=dict)
    # Contenders beside the usual ones, and usual ones that cannot take part.
    also: tuple = ()
    without: tuple = ()
    chart: bool = False


def fio(name, title, image, pattern, block, depth=1, direct=True, goals=None, more=(), **rest):
    engine = "libaio" if depth > 1 else "psync"
    options = (f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}", f"--ioengine={engine}",
               f"--direct={int(direct)}", *more)
    return Job(name, title, image, "fio", options, goals or {}, **rest)


def luks(*what, **rest):
    """Who has nothing to decrypt is no measure."""
    return fio(*what, without=("floor", "raw"), **rest)


def on_ext4(name, title, *options, **rest):
    """On a file of 64 MiB in a new file system."""
    return Job(name, title, "empty", "fio_on_ext4", ("--bs=4k", *options), NEVER_BEHIND, **rest)


def passed(*what, **rest):
    """On an image whose data file the kernel reads and writes itself."""
    return fio(*what, without=("nbdfuse", "floor"), **rest)


RANDOM = {"peer": 2.2, "floor": 0.9}
ALLOCATING = {"peer": 2.0, "floor": 0.75}
READS = {"peer": 2.0, "floor": 0.9}
WRITES = {"peer": 1.2, "floor": 0.9}
ENCRYPTED = {"peer": 1.5}
PASSED = {"raw": 0.9}
NEVER_BEHIND = {"peer": 1.0}
# Buffered I/O through a new mount starts with nothing in the page cache.
WARM = ("--pre_read=1",)
# Each place once: what is written is new every time.
ONCE = ("--time_based=0", "--norandommap=0", "--io_size=1g")

JOBS = (
    fio("randread-1", "4 KiB random reads, one at a time", "full", "randread", "4k", goals=RANDOM,
        chart=True),
    fio("randread-32", "4 KiB random reads, 32 at once", "full", "randread", "4k", 32,
        goals=RANDOM, chart=True),
    fio("randwrite-1", "4 KiB random writes, one at a time", "full", "randwrite", "4k",
        goals=RANDOM, chart=True),
    fio("randwrite-32", "4 KiB random writes, 32 at once", "full", "randwrite", "4k", 32,
        goals=RANDOM, chart=True),
    fio("mixed", "4 KiB mixed, 4 jobs of 8 at once", "full", "randrw", "4k", 8,
        goals=NEVER_BEHIND, more=("--numjobs=4", "--group_reporting")),
    fio("new-randwrite-1", "4 KiB random writes into an empty image, one at a time", "empty",
        "randwrite", "4k", goals=ALLOCATING, more=ONCE),
    fio("new-randwrite-32", "4 KiB random writes into an empty image, 32 at once", "empty",
        "randwrite", "4k", 32, goals=ALLOCATING, more=ONCE, chart=True),
    fio("read-64k", "64 KiB sequential reads, O_DIRECT", "full", "read", "64k", 4, goals=READS),
    fio("read-1m", "1 MiB sequential reads, O_DIRECT", "full", "read", "1m", 4, goals=READS,
        chart=True),
    fio("write-64k", "64 KiB sequential writes, O_DIRECT", "full", "write", "64k", 4, goals=WRITES),
    fio("write-1m", "1 MiB sequential writes, O_DIRECT", "full", "write", "1m", 4, goals=WRITES,
        chart=True),
    fio("new-write-1m", "1 MiB sequential writes into an empty image, O_DIRECT", "empty", "write",
        "1m", 4, goals=ALLOCATING, more=ONCE),
    fio("new-write-64k", "64 KiB sequential writes into an empty image, O_DIRECT", "empty", "write",
        "64k", 4, goals=ALLOCATING, more=ONCE),
    fio("hole-read-64k", "64 KiB sequential reads where nothing is yet, O_DIRECT", "empty", "read",
        "64k", 4, goals=READS),
    fio("hole-read-1m", "1 MiB sequential reads where nothing is yet, O_DIRECT", "empty", "read",
        "1m", 4, goals=READS),
    fio("cold-read-64k", "64 KiB buffered sequential reads, cold", "full", "read", "64k",
        direct=False, goals={"peer": 1.3, "floor": 0.9}, more=("--time_based=0",)),
    fio("cold-read-1m", "1 MiB buffered sequential reads, cold", "full", "read", "1m",
        direct=False, goals={"peer": 1.3, "floor": 0.9}, more=("--time_based=0",), chart=True),
    fio("warm-read-1m", "1 MiB buffered sequential reads, warm", "full", "read", "1m",
        direct=False, goals={"peer": 5.0, "floor": 0.9, "raw": 0.8}, more=WARM, chart=True),
    fio("warm-randread", "4 KiB buffered random reads, warm", "full", "randread", "4k",
        direct=False, goals={"peer": 5.0, "floor": 0.9, "raw": 0.8}, more=WARM),
    fio("buffered-write-64k", "64 KiB buffered sequential writes", "full", "write", "64k",
        direct=False, goals=WRITES),
    fio("buffered-write-1m", "1 MiB buffered sequential writes", "full", "write", "1m",
        direct=False, goals=WRITES, chart=True),
    fio("new-buffered-write-1m", "1 MiB buffered sequential writes into an empty image", "empty",
        "write", "1m", direct=False, goals={"peer": 1.2, "floor": 0.75}, more=ONCE),
    Job("dd", "1 MiB buffered sequential writes by dd, which only writes", "full", "dd", goals=WRITES),
    fio("fdatasync", "4 KiB random writes, each with fdatasync", "full", "randwrite", "4k",
        goals={"peer": 2.0}, more=("--fdatasync=1",), chart=True),
    fio("new-fdatasync", "4 KiB random writes into an empty image, each with fdatasync", "empty",
        "randwrite", "4k", goals={"peer": 2.0}, more=(*ONCE, "--fdatasync=1")),
    fio("chain-randread", "4 KiB random reads through 4 layers, 32 at once", "chain", "randread",
        "4k", 32, goals={"peer": 1.0}),
    fio("chain-read", "1 MiB buffered sequential reads through 4 layers, cold", "chain", "read",
        "1m", direct=False, goals={"peer": 1.0}, more=("--time_based=0",)),
    fio("compressed-read", "compressed: 1 MiB buffered sequential reads, cold", "compressed",
        "read", "1m", direct=False, goals={"nbdfuse": 1.5, "convert to nothing": 1.5},
        more=("--time_based=0",), also=("convert to nothing",), without=("floor", "raw"),
        chart=True),
    Job("compressed-copy", "compressed: copied to a raw file", "compressed", "copy",
        goals={"nbdfuse": 1.0, "convert to a file": 1.0}, also=("convert to a file",),
        without=("floor", "raw")),
    luks("luks-read-1m", "LUKS: 1 MiB sequential reads, O_DIRECT", "encrypted", "read", "1m", 4,
         goals=ENCRYPTED, chart=True),
    luks("luks-write-1m", "LUKS: 1 MiB sequential writes, O_DIRECT", "encrypted", "write", "1m", 4,
         goals=ENCRYPTED, chart=True),
    luks("luks-new-write-1m", "LUKS: 1 MiB sequential writes into an empty image, O_DIRECT",
         "encrypted_empty", "write", "1m", 4, goals=ENCRYPTED, more=ONCE),
    luks("luks-cold-read-1m", "LUKS: 1 MiB buffered sequential reads, cold", "encrypted", "read",
         "1m", direct=False, goals=ENCRYPTED, more=("--time_based=0",)),
    luks("luks-randread-1", "LUKS: 4 KiB random reads, one at a time", "encrypted", "randread", "4k",
         goals=NEVER_BEHIND),
    luks("luks-randread-32", "LUKS: 4 KiB random reads, 32 at once", "encrypted", "randread", "4k",
         32, goals=NEVER_BEHIND),
    luks("luks-randwrite-1", "LUKS: 4 KiB random writes, one at a time", "encrypted", "randwrite",
         "4k", goals=NEVER_BEHIND),
    luks("luks-randwrite-32", "LUKS: 4 KiB random writes, 32 at once", "encrypted", "randwrite",
         "4k", 32, goals=NEVER_BEHIND),
    passed("passed-randread-1", "passthrough: 4 KiB random reads, one at a time", "mapped",
           "randread", "4k", goals=PASSED),
    passed("passed-randwrite-32", "passthrough: 4 KiB random writes, 32 at once", "mapped",
           "randwrite", "4k", 32, goals=PASSED),
    passed("passed-read-1m", "passthrough: 1 MiB sequential reads, O_DIRECT", "mapped", "read",
           "1m", 4, goals=PASSED),
    passed("passed-buffered-write-1m", "passthrough: 1 MiB buffered sequential writes", "mapped",
           "write", "1m", direct=False, goals=PASSED),
    Job("untar", "ext4 on a loop device: small files unpacked", "empty", "untar",
        goals=NEVER_BEHIND),
    on_ext4("ext4-fsync", "ext4 on a loop device: 4 KiB random writes, each with fsync",
            "--rw=randwrite", "--fsync=1", chart=True),
    on_ext4("ext4-mixed", "ext4 on a loop device: 4 KiB mixed, 32 at once, O_DIRECT", "--rw=randrw",
            "--direct=1", "--ioengine=libaio", "--iodepth=32"),
    Job("fstrim", "fstrim of scattered space", "trim", "fstrim", goals=NEVER_BEHIND,
        without=("floor",)),
)

# Not a rate against others: qcow2fs alone, figures with a limit of their own.
CHECKS = {
    "syncs": "host syncs for an allocating 4 KiB write and its fdatasync",
    "beside-fsync": "reads of 7 images while the eighth is written and synced 100 times a second",
    "beside-discard": "reads of 7 images while 1 MiB of the eighth is discarded 100 times a second",
}
LIMITS = {"syncs": ("at most", 1.0), "beside-fsync": ("at least", 0.9),
          "beside-discard": ("at least", 0.9)}
# Processor time for a GiB, as a part of what qemu-storage-daemon takes.
CPU_GOAL = 0.7
