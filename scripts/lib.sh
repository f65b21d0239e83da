# shellcheck shell=sh disable=SC2034 # the lists of packages are for those who source this
# Shared by the scripts: what they need from apt and pip, installed only where it is missing.

# What the demo needs: builds the packages, makes and boots the guest, runs the broker.
DEMO_PACKAGES="python3 python3-cryptography python3-flask gunicorn python3-yaml python3-psutil openssl openssh-client \
mmdebstrap e2fsprogs qemu-utils qemu-system-x86 build-essential dpkg-dev debhelper dh-python \
libpam0g-dev clang libbpf-dev fakeroot git ca-certificates tzdata"

# What the tests need besides.
TEST_PACKAGES="python3-venv python3-systemd python3-apt python3-jeepney python3-pyroute2 iproute2 nftables shellcheck pamtester lintian rsync openssh-server make gcc-multilib procps \
busybox-static strace sudo nmap libvirt-daemon libvirt-daemon-driver-qemu python3-libvirt"

export PERSONA_STARTED="${PERSONA_STARTED:-$(date +%s)}"

say() {
    printf '[%4d s] %s\n' "$(($(date +%s) - PERSONA_STARTED))" "$*"
}

# Runs a command whose output matters only if it fails; says every 20 s where it is.
quietly() {
    (
        log=$(mktemp)
        trap 'rm -f "$log"' EXIT
        "$@" >"$log" 2>&1 </dev/null &
        job=$!
        ticks=0
        while kill -0 "$job" 2>/dev/null; do
            sleep 1
            ticks=$((ticks + 1))
            [ $((ticks % 20)) -ne 0 ] || say "  $(tail -n 1 "$log" | tr -cd '[:print:]' | cut -c 1-90)"
        done
        code=0
        wait "$job" || code=$?
        [ "$code" -eq 0 ] || tail -n 40 "$log" >&2
        exit "$code"
    )
}

need_root() {
    if [ "$(id -u)" -ne 0 ]; then
        echo "$0: needs root, for apt, the guest image and the lab's files. Run: sudo $0" >&2
        exit 2
    fi
}

# Installs with apt those of the packages named that are not there.
need_packages() {
    missing=""
    for package in "$@"; do
        if ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
            missing="$missing $package"
        fi
    done
    [ -n "$missing" ] || return 0
    say "installing with apt:$missing"
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-get update -q
    # shellcheck disable=SC2086 # a list of words
    quietly apt-get install -y -q --no-install-recommends $missing
}

# The tests' virtual environment, on Debian's own Python: its python3-systemd exists for no other.
need_venv() {
    venv=build/venv
    stamp="$venv/.$(cksum <tests/requirements.txt | cut -d ' ' -f 1)"
    if [ ! -e "$stamp" ]; then
        say "making the tests' virtual environment"
        rm -rf "$venv"
        /usr/bin/python3 -m venv --system-site-packages "$venv"
        quietly "$venv/bin/pip" install --disable-pip-version-check -r tests/requirements.txt
        touch "$stamp"
    fi
}

# The broker's libraries in their newest releases, against which its tests run a second time.
need_newest_venv() {
    newest=build/venv-newest
    with="pytest pytest-timeout pytest-xdist hypothesis jsonschema"
    stamp="$newest/.$(echo "$with" | cksum | cut -d ' ' -f 1)"
    if [ ! -e "$stamp" ]; then
        say "making a virtual environment of the newest cryptography, Flask, gunicorn, PyYAML and psutil"
        rm -rf "$newest"
        /usr/bin/python3 -m venv "$newest"
        # shellcheck disable=SC2086 # a list of words
        quietly "$newest/bin/pip" install --disable-pip-version-check cryptography flask gunicorn pyyaml psutil $with
        touch "$stamp"
    fi
}
