# shellcheck shell=sh disable=SC2034 # the lists of packages are for those who source this
# Shared by the scripts: what they need from apt and pip, installed only where it is missing.

# What the demo needs: builds the packages, makes and boots the guest, runs the broker.
DEMO_PACKAGES="python3 python3-flask gunicorn python3-yaml python3-psutil openssl openssh-client \
mmdebstrap e2fsprogs qemu-utils qemu-system-x86 build-essential dpkg-dev debhelper dh-python \
libpam0g-dev fakeroot git ca-certificates tzdata"

# What the tests need besides.
TEST_PACKAGES="python3-venv python3-systemd shellcheck pamtester lintian rsync openssh-server make gcc-multilib procps \
busybox-static strace sudo nmap"

say() {
    printf '[%s] %s\n' "$(date +%T)" "$*"
}

need_root() {
    if [ "$(id -u)" -ne 0 ]; then
        echo "$0: needs root: it installs packages and makes a guest image. Run: sudo $0" >&2
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
    apt-get update -q >/dev/null
    # shellcheck disable=SC2086 # a list of words
    apt-get install -y -q --no-install-recommends $missing >/dev/null
}

# The tests' virtual environment, on Debian's own Python: its python3-systemd exists for no other.
need_venv() {
    venv=build/venv
    stamp="$venv/.$(cksum <tests/requirements.txt | cut -d ' ' -f 1)"
    if [ ! -e "$stamp" ]; then
        say "making the tests' virtual environment"
        rm -rf "$venv"
        /usr/bin/python3 -m venv --system-site-packages "$venv"
        "$venv/bin/pip" install -q --disable-pip-version-check -r tests/requirements.txt
        touch "$stamp"
    fi
}

# The broker's libraries in their newest releases, against which its tests run a second time.
need_newest_venv() {
    newest=build/venv-newest
    if [ ! -e "$newest/.complete" ]; then
        say "making a virtual environment of the newest Flask, gunicorn, PyYAML and psutil"
        rm -rf "$newest"
        /usr/bin/python3 -m venv "$newest"
        "$newest/bin/pip" install -q --disable-pip-version-check flask gunicorn pyyaml psutil \
            pytest pytest-timeout hypothesis jsonschema
        touch "$newest/.complete"
    fi
}
