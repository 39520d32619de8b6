# What the scripts share: installing what is missing, and taking down mounts and loop devices.
# Sourced, not run. A machine with nothing but a Debian base system and Rust is enough.

export PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"
# Under sudo, Rust is often the calling user's.
if [ -n "${SUDO_USER:-}" ]; then
    caller_home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    if ! command -v cargo >/dev/null && [ -x "$caller_home/.cargo/bin/cargo" ]; then
        export PATH="$PATH:$caller_home/.cargo/bin"
        export CARGO_HOME="${CARGO_HOME:-$caller_home/.cargo}"
        export RUSTUP_HOME="${RUSTUP_HOME:-$caller_home/.rustup}"
    fi
fi

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# require_machine: says plainly what this machine lacks for mounting.
require_machine() {
    [ "$(id -u)" = 0 ] || die "needs root, to mount and to set up loop devices: sudo scripts/${0##*/}"
    [ -c /dev/fuse ] || modprobe fuse 2>/dev/null || true
    [ -c /dev/fuse ] || die "needs /dev/fuse: load the kernel module 'fuse', or give the container --device /dev/fuse"
    [ -c /dev/loop-control ] || modprobe loop 2>/dev/null || true
    [ -c /dev/loop-control ] || die "needs loop devices (/dev/loop-control): load the kernel module 'loop'"
    losetup -f >/dev/null 2>&1 || die "needs a free loop device, and 'losetup -f' finds none"
}

# need "COMMAND=PACKAGE [PACKAGE...]"...: installs the packages of the commands that are missing.
need() {
    local pair packages log missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null && continue
        read -ra packages <<<"${pair#*=}"
        missing+=("${packages[@]}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "please install: ${missing[*]}"
    [ "$(id -u)" = 0 ] || die "please install (or run as root): ${missing[*]}"
    echo "installing ${missing[*]}"
    log=$(mktemp)
    {
        timeout 300 apt-get -q update &&
            DEBIAN_FRONTEND=noninteractive timeout 600 apt-get -q -y --no-install-recommends \
                install "${missing[@]}"
    } </dev/null >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        rm -f "$log"
        die "cannot install ${missing[*]}"
    }
    rm -f "$log"
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || die "${pair#*=} is installed, ${pair%%=*} is still missing"
    done
}

need_rust() {
    command -v cargo >/dev/null || die "needs Rust 1.88 or later: https://rustup.rs"
    need "cc=gcc libc6-dev"
}

# take_down DIRECTORY: undoes every mount and loop device beneath it, whatever went wrong: what lies
# on loop devices first, then those, then the mounts that hold their files.
take_down() {
    local directory=$1 devices device point pass
    devices=$(loops_beneath "$directory")
    for pass in other fuse; do
        mounts_beneath "$directory" "$pass" | while read -r point; do
            timeout 20 umount "$point" 2>/dev/null || umount -l "$point" 2>/dev/null || true
        done
        for device in $devices; do
            losetup -d "$device" 2>/dev/null || true
        done
        devices=
    done
}

# loops_beneath DIRECTORY: the loop devices on files there.
loops_beneath() {
    local file device
    for file in /sys/block/loop*/loop/backing_file; do
        [ -e "$file" ] || continue
        case $(cat "$file" 2>/dev/null) in
            "$1"/*)
                device=${file#/sys/block/}
                echo "/dev/${device%%/*}"
                ;;
        esac
    done
}

# mounts_beneath DIRECTORY fuse|other: mount points of one kind, the newest first.
mounts_beneath() {
    awk -v directory="$1/" -v wanted="$2" '
        { kind = $3 ~ /^fuse/ ? "fuse" : "other" }
        index($2, directory) == 1 && kind == wanted { print $2 }
    ' /proc/self/mounts | tac
}
