"""The images that are measured: made once, or anew for each run."""

import os
import random
import shutil

from contenders import run, secret

MIB = 1 << 20


def noise(path, length, seed=1):
    """A file of bytes that do not compress."""
    source = random.Random(seed)
    block = source.randbytes(16 * MIB)
    with open(path, "wb") as file:
        for at in range(0, length, len(block)):
            # No two blocks are the same.
            file.write(at.to_bytes(8, "little") + block[8:min(len(block), length - at)])


def text(path, length):
    """A file that compresses about as programs and documents do, to four tenths."""
    source = random.Random(2)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(6000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    blocks = []
    for _ in range(4):
        part = " ".join(source.choices(words, weights, k=8 * MIB // 6)).encode()
        blocks.append(part[:6 * MIB] + source.randbytes(MIB))
    with open(path, "wb") as file:
        at = 0
        while at < length:
            block = blocks[(at // len(blocks[0])) % len(blocks)][:length - at]
            file.write(block)
            at += len(block)


def create(path, size, *options):
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)


def encrypt(path, source=None, size=None):
    """An image encrypted as QEMU does it by default (LUKS with aes-256-xts), with the content of the
    raw file `source` or of `size` bytes without any. Its key is beside it."""
    path.with_suffix(".key").write_text("a passphrase", encoding="utf-8")
    path.with_suffix(".key").chmod(0o600)
    # Only opening it depends on how hard the passphrase is to try out.
    options = ("-O" if source else "-f", "qcow2", *secret(path), "-o",
               "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10")
    if source:
        run("qemu-img", "convert", "-f", "raw", *options, source, path)
    else:
        run("qemu-img", "create", "-q", *options, path, size)


class Images:
    """All images, in one directory. `raw` is the same disk as a raw file."""

    def __init__(self, directory, size):
        self.directory = directory
        self.size = size
        self.made = {}

    def get(self, kind, form):
        """The path of an image of that kind as qcow2 or raw."""
        if kind == "empty":
            return self.empty(form)
        if kind == "encrypted_empty":
            return self.encrypted_empty()
        if kind == "trim":
            return self.copy(self.once("trim", form), form)
        return self.once(kind, form)

    def once(self, kind, form):
        if kind not in self.made:
            self.made[kind] = getattr(self, "make_" + kind)()
        return self.made[kind][form]

    def path(self, name):
        return self.directory / name

    def empty(self, form, size=8 << 30):
        path = self.path("empty." + form)
        path.unlink(missing_ok=True)
        if form == "raw":
            path.touch()
            os.truncate(path, size)
        else:
            create(path, size)
        return path

    def encrypted_empty(self, size=8 << 30):
        path = self.path("empty.qcow2")
        path.unlink(missing_ok=True)
        encrypt(path, size=size)
        return path

    def copy(self, source, form):
        path = self.path("copy." + form)
        run("cp", "--sparse=always", source, path)
        return path

    def drop(self, *kinds):
        """Gives back what is no longer needed."""
        for name in ("empty.raw", "empty.qcow2", "empty.key", "copy.raw", "copy.qcow2"):
            self.path(name).unlink(missing_ok=True)
        for kind in kinds:
            for path in self.made.pop(kind, {}).values():
                path.unlink(missing_ok=True)

    def make_full(self):
        raw, image = self.path("full.raw"), self.path("full.qcow2")
        noise(raw, self.size)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
        return {"raw": raw, "qcow2": image}

    def make_mapped(self):
        """All of its data in a raw data file beside it."""
        raw, image = self.once("full", "raw"), self.path("mapped.qcow2")
        data = image.with_suffix(".data")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o",
            f"data_file={data},data_file_raw=on", raw, image)
        return {"qcow2": image, "data": data, "raw": raw}

    def make_encrypted(self):
        image = self.path("encrypted.qcow2")
        encrypt(image, self.once("full", "raw"))
        return {"qcow2": image}

    def make_compressed(self):
        """Twice the usual size."""
        raw, image = self.path("text.raw"), self.path("compressed.qcow2")
        text(raw, 2 * self.size)
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image, limit=900)
        raw.unlink()
        return {"qcow2": image}

    def make_chain(self):
        """A base and three overlays; each layer holds the newest version of some 64 KiB in turn."""
        layers = [self.path(f"chain-{i}.qcow2") for i in range(4)]
        run("qemu-img", "convert", "-O", "qcow2", self.once("full", "qcow2"), layers[0])
        for number, (below, above) in enumerate(zip(layers, layers[1:]), 1):
            create(above, self.size, "-F", "qcow2", "-b", below.name)
            commands = []
            for at in range(number * 65536, self.size, 4 * 65536):
                commands.append(f"write -q -P {number} {at} 65536")
            for some in range(0, len(commands), 1000):
                arguments = [part for line in commands[some:some + 1000] for part in ("-c", line)]
                run("qemu-io", "-f", "qcow2", *arguments, above)
        return {"qcow2": layers[-1], "raw": self.once("full", "raw"),
                **{f"layer {i}": path for i, path in enumerate(layers[:-1])}}

    def make_many(self):
        """Eight images of an eighth of the size."""
        first = self.path("many-0.qcow2")
        raw = self.path("many.raw")
        noise(raw, self.size // 8)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, first)
        raw.unlink()
        made = {"qcow2": first}
        for number in range(1, 8):
            made[str(number)] = shutil.copy(first, self.path(f"many-{number}.qcow2"))
        return {key: self.directory / os.path.basename(path) for key, path in made.items()}

    def make_trim(self):
        """An ext4 file system with as much deleted as the usual size, scattered between files that
        are still there."""
        raw, image = self.path("trim.raw"), self.path("trim.qcow2")
        raw.touch()
        os.truncate(raw, 3 * self.size)
        run("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=1", raw)
        point = self.directory.parent / "disk"
        run("mount", "-o", "loop", raw, point)
        try:
            large = random.Random(3).randbytes(128 << 10)
            for number in range(self.size // len(large)):
                (point / f"large-{number}").write_bytes(large)
                (point / f"small-{number}").write_bytes(large[:16 << 10])
            run("sync", "-f", point)
            for path in point.glob("large-*"):
                path.unlink()
        finally:
            run("umount", point)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
        return {"raw": raw, "qcow2": image}
