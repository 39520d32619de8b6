"""The benchmark; started by `scripts/bench`, which prepares the machine and cleans up."""

import argparse
import json
import os
import pathlib
import platform
import random
import signal
import statistics
import subprocess
import sys
import time

import chart
import report
from contenders import ALL, Convert, Failed, Qcow2fs
from growth import COUNTS, Growth, tables
from images import MIB, Images
from jobs import CHECKS, JOBS
from runs import Runs

# Of the goal against the floor; the machines that check this are busy with other things.
GUARD_PART = 0.5
# Not those of depth 1: they time how fast the host wakes processors, which varies threefold.
GUARD_JOBS = ("randread-32", "randwrite-32")


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--programs", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", help="only these, with commas between them (see --list)")
    parser.add_argument("--contenders", help="only these, with commas between them")
    parser.add_argument("--rounds", type=int, help="how often each is measured [default: 5]")
    parser.add_argument("--seconds", type=float, help="how long a run takes [default: 2]")
    parser.add_argument("--mib", type=int, help="size of an image in MiB [default: 1024]")
    parser.add_argument("--disk", metavar="DIR", help="on this disk, not in memory")
    parser.add_argument("--quick", action="store_true", help="one short round, a small image")
    parser.add_argument("--out", type=pathlib.Path, metavar="PREFIX",
                        help="write PREFIX.json, PREFIX.md and PREFIX.svg")
    parser.add_argument("--list", action="store_true", help="name the jobs")
    parser.add_argument("--guard", action="store_true",
                        help="fail when random 4 KiB reads or writes fall below half of the goal")
    parser.add_argument("--growth", action="store_true",
                        help="what more images and larger ones cost, instead of the jobs")
    parsed = parser.parse_args()
    short = parsed.quick or parsed.guard
    parsed.rounds = parsed.rounds or (3 if parsed.guard else 1 if parsed.quick else 5)
    parsed.seconds = parsed.seconds or (0.7 if parsed.guard else 1 if parsed.quick else 2)
    parsed.size = (parsed.mib or (256 if short else 1024)) * MIB
    return parsed


def chosen(names):
    """The jobs and checks that were asked for."""
    if names is None:
        return JOBS, list(CHECKS)
    wanted = names.split(",")
    known = {job.name for job in JOBS} | set(CHECKS)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        sys.exit(f"bench: there is no job {unknown[0]}; --list names them")
    return ([job for job in JOBS if job.name in wanted],
            [name for name in CHECKS if name in wanted])


def machine(disk):
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        models = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    tool = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=False)
    return {
        "processors": f"{len(models)} x {models[0] if models else platform.machine()}",
        "kernel": platform.release().split("-")[0],
        "qemu": tool.stdout.split("version ")[-1].split()[0],
        "images": f"on the disk of {disk}" if disk else "in memory (tmpfs)",
        "load_before": os.getloadavg()[0],
    }


class Bench:
    """All measurements, in turn."""

    def __init__(self, options):
        self.options = options
        work = options.work
        for name in ("images", "disk"):
            (work / name).mkdir()
        self.images = Images(work / "images", options.size)
        self.runs = Runs(work, self.images, options.seconds)
        self.contenders = [kind(work, options.programs) for kind in ALL]
        self.extra = [Convert(work, options.programs, to_file) for to_file in (False, True)]
        if options.contenders:
            wanted = options.contenders.split(",")
            self.contenders = [one for one in self.contenders if one.name in wanted]
        for one in list(self.contenders):
            why = one.missing()
            if why:
                say(f"without {one.name}: {why}")
                self.contenders.remove(one)

    def job(self, job):
        """All rounds of a job: for each, what every contender reached."""
        taking_part = [one for one in self.contenders if one.name not in job.without]
        taking_part += [one for one in self.extra if one.name in job.also]
        rounds = []
        for number in range(self.options.rounds):
            # Nobody always comes first, or after the same one: memory that somebody has just given
            # back is had sooner than other memory.
            order = random.Random(f"{job.name} {number}").sample(taking_part, len(taking_part))
            one_round = {}
            for contender in order:
                one_round[contender.name] = self.sample(contender, job)
            rounds.append(one_round)
        return rounds

    def sample(self, contender, job):
        try:
            sample = self.runs.take(contender, job)
        except Failed as failed:
            return {"failed": str(failed)}
        finally:
            self.images.drop()
        return {"rate": sample.rate, "cpu": sample.cpu}

    def check(self, name):
        contender = Qcow2fs(self.options.work, self.options.programs)
        take = getattr(self.runs, name.replace("-", "_"))
        return [take(contender, number % 2 == 1) for number in range(self.options.rounds)]


def say(line):
    print(line, file=sys.stderr, flush=True)


def main():
    options = arguments()
    if options.list:
        for job in JOBS:
            print(f"{job.name:22} {job.title}")
        for name, title in CHECKS.items():
            print(f"{name:22} {title}")
        return 0
    # A signal ends the servers on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.guard:
        options.contenders = "qcow2fs,floor"
        return guard(Bench(options))
    where = machine(options.disk)
    if options.growth:
        return growth(options, where)
    bench = Bench(options)
    jobs, checks = chosen(options.jobs)
    results, checked = [], {}
    try:
        measure(bench, jobs, checks, results, checked)
    finally:
        # An hour's work is not lost to what comes after it.
        publish(options, where, results, checked)
    return 0


def measure(bench, jobs, checks, results, checked):
    """Takes all measurements and says how it goes."""
    last_use = {job.image: job.name for job in jobs}
    for job in jobs:
        start = time.monotonic()
        rounds = bench.job(job)
        results.append((job, rounds))
        found = report.ratios(job, rounds)
        shown = ", ".join(f"{name} {pair[0]:.2f}" for name, pair in found.items())
        say(f"{job.name:22} {time.monotonic() - start:4.0f} s  {shown}")
        if last_use[job.image] == job.name and job.image in ("compressed", "trim"):
            bench.images.drop(job.image)
    for name in checks:
        checked[name] = bench.check(name)
        say(f"{name:22} {statistics.median(checked[name]):.2f}")


def described_machine(options, where):
    return (f"{where['processors']}, Linux {where['kernel']}, QEMU {where['qemu']}, images "
            f"{where['images']}; {options.rounds} rounds of {options.seconds:g} s")


def growth(options, where):
    """Prints what more images and larger ones cost, and writes it where that was asked for."""
    for name in ("images", "disk"):
        (options.work / name).mkdir()
    runs = Runs(options.work, Images(options.work / "images", options.size), options.seconds)
    growing = Growth(options.work, options.programs, runs)
    counts = []
    for number in COUNTS:
        counts.append(growing.count(number))
        say(f"{number} images: {counts[-1].mount:.2f} s")
    text = f"{described_machine(options, where)}.\n\n{tables(counts, growing.sizes(options.rounds))}"
    print(text)
    if options.out:
        pathlib.Path(f"{options.out}.md").write_text(text + "\n", encoding="utf-8")
    return 0


def publish(options, where, results, checked):
    """Prints the table; writes it, the figures and the chart where that was asked for."""
    where["load_after"] = os.getloadavg()[0]
    where["when"] = time.strftime("%Y-%m-%d", time.gmtime())
    described = f"{described_machine(options, where)}, images of {options.size // MIB} MiB"
    text = [f"MB/s, medians: {described}. Ratios are medians of those within one round, the goal "
            f"in brackets; a goal that was missed is bold. The load of the machine was "
            f"{where['load_before']:.1f} before and {where['load_after']:.1f} after."]
    if results:
        text.append(report.table(results))
    if checked:
        text.append(report.checks_table(checked))
    text = "\n\n".join(text)
    print(text)
    if options.out:
        figures = {
            "machine": where, "rounds": options.rounds, "seconds": options.seconds,
            "jobs": {job.name: {**report.summary(job, rounds), "rounds": rounds}
                     for job, rounds in results},
            "checks": checked,
        }
        write = {".json": json.dumps(figures, indent=1) + "\n", ".md": text + "\n",
                 ".svg": chart.draw(results, [
                     "speed, as a multiple of the better of the other two", described])}
        for suffix, content in write.items():
            pathlib.Path(f"{options.out}{suffix}").write_text(content, encoding="utf-8")


def guard(bench):
    """Far below the floor is a defect, on the busiest machine."""
    failed = 0
    for job in JOBS:
        if job.name in GUARD_JOBS:
            found = report.ratio(bench.job(job), report.rate_of("floor"))
            wanted = GUARD_PART * job.goals["floor"]
            good = found is not None and found >= wanted
            failed += not good
            print(f"{job.title}: {found or 0:.2f} of the least that a FUSE server can do, "
                  f"at least {wanted:.2f} is wanted: {'good' if good else 'TOO SLOW'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
