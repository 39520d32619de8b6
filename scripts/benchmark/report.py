"""Medians, ratios, and the tables that show them."""

import statistics

from contenders import PEERS
from jobs import CHECKS, CPU_GOAL, LIMITS

MB = 1e6


def ratio(rounds, other):
    """The median of qcow2fs's rate as a multiple of another's, each within one round; `other` gives
    the other's rate from a round."""
    found = [one["qcow2fs"]["rate"] / other(one) for one in rounds
             if one.get("qcow2fs", {}).get("rate") and other(one)]
    return statistics.median(found) if found else None


def rate_of(name):
    return lambda one: one.get(name, {}).get("rate")


def best_peer(one):
    return max((one.get(name, {}).get("rate") or 0 for name in PEERS), default=0)


def ratios(job, rounds):
    """All ratios of a job, each with its goal or `None`."""
    others = {"peer": best_peer, "floor": rate_of("floor"), "raw": rate_of("raw")}
    others |= {name: rate_of(name) for name in job.goals if name not in others}
    found = {name: (ratio(rounds, other), job.goals.get(name)) for name, other in others.items()}
    return {name: pair for name, pair in found.items() if pair[0] is not None}


def median(rounds, name, what="rate"):
    values = [one[name][what] for one in rounds if one.get(name, {}).get(what) is not None]
    return statistics.median(values) if values else None


def cpu_ratio(rounds):
    """Processor time for a GiB as a part of qemu-storage-daemon's."""
    peer = PEERS[0]
    pairs = [(one.get("qcow2fs", {}).get("cpu"), one.get(peer, {}).get("cpu")) for one in rounds]
    found = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
    return statistics.median(found) if found else None


def spread(rounds, name="qcow2fs"):
    """How far the rounds lie apart: (largest - smallest) / median."""
    values = [one[name]["rate"] for one in rounds if one.get(name, {}).get("rate")]
    return (max(values) - min(values)) / statistics.median(values) if values else 0


def summary(job, rounds):
    """What the JSON says of a job beside the rounds."""
    names = sorted({name for one in rounds for name in one})
    return {
        "title": job.title,
        "bytes_per_second": {name: median(rounds, name) for name in names},
        "cpu_seconds_per_gib": {name: median(rounds, name, "cpu") for name in names},
        "ratios": {name: {"is": found, "goal": goal}
                   for name, (found, goal) in ratios(job, rounds).items()},
        "cpu_of_qemu_storage_daemon": {"is": cpu_ratio(rounds), "goal": CPU_GOAL},
        "spread": spread(rounds),
    }


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def against(pair, met):
    found, goal = pair
    if found is None:
        return "-"
    shown = f"{found:.2f}"
    if goal is None:
        return shown
    return f"{shown} ({goal:g})" if met(found, goal) else f"**{shown}** ({goal:g})"


def at_least(found, goal):
    return found >= goal


def at_most(found, goal):
    return found <= goal


def table(results):
    """`results`: jobs with their rounds. The whole in Markdown; a goal that is missed is bold."""
    columns = ("qcow2fs", *PEERS, "floor", "raw")
    head = ["job", *(f"{name}" for name in columns), "/ best peer", "/ floor", "/ raw",
            "CPU / qemu-s-d", "spread"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    notes = []
    for job, rounds in results:
        found = ratios(job, rounds)
        cells = [job.title]
        cells += [number(rate and rate / MB, 0) for rate in (median(rounds, n) for n in columns)]
        cells += [against(found.get(name, (None, None)), at_least)
                  for name in ("peer", "floor", "raw")]
        cells.append(against((cpu_ratio(rounds), CPU_GOAL), at_most))
        cells.append(f"{100 * spread(rounds):.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
        for name, pair in found.items():
            if name not in ("peer", "floor", "raw"):
                other = median(rounds, name)
                notes.append(f"- {job.title}: {against(pair, at_least)} times `{name}` "
                             f"({other / MB:.0f} MB/s)")
        failures = {(name, one[name]["failed"]) for one in rounds for name in one
                    if "failed" in one[name]}
        notes += [f"- {job.title}: no figure for {name}: {why}" for name, why in sorted(failures)]
    return "\n".join(lines + ([""] + notes if notes else []))


def checks_table(checks):
    """`checks`: name to the values of all rounds, of qcow2fs."""
    lines = ["| check | is | limit |", "|---|--:|--:|"]
    for name, values in checks.items():
        word, limit = LIMITS[name]
        found = statistics.median(values)
        good = found <= limit if word == "at most" else found >= limit
        shown = f"{found:.2f}" if good else f"**{found:.2f}**"
        lines.append(f"| {CHECKS[name]} | {shown} | {word} {limit:g} |")
    return "\n".join(lines)
