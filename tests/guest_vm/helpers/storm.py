"""In the guest, as root: storm.py ROUNDS SESSIONS PORT USER...

Rounds of sessions that open and end at random, in each of which the agent is killed now and then.  Every
session tries again and again what nobody allows it: a program, and a connection to the host's PORT.  One line
of JSON tells how many opened, how many were refused, what hung, and what was let through.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

FOUND = "/tmp/storm"
dice = random.Random()  # noqa: S311 - nothing secret
TOGETHER = 16
HANGS_S = 120  # for a session of some seconds, on a machine with hundreds of them

TRIES = """
exec 9<> <(:)
: > {found}/opened-$$
end=$((SECONDS + {seconds}))
while :; do
    /usr/local/bin/forbidden {found}/ran-$$
    (exec 3<>/dev/tcp/10.0.2.2/{port}) && : > {found}/reached-$$
    [ $SECONDS -ge $end ] && break
    read -rt 0.3 -u 9  # a builtin: nothing is started, and the others have the machine
done 2>/dev/null
: > {found}/ended-$$
"""


def session(user: str, port: int) -> "subprocess.Popen[bytes]":
    script = TRIES.format(found=FOUND, seconds=dice.randrange(4), port=port)
    null = subprocess.DEVNULL
    # not a login shell: whose start-up files would take most of the machine
    return subprocess.Popen(["su", "-s", "/bin/bash", user, "-c", script], stdin=null, stdout=null, stderr=null)


def kill_now_and_then(sessions: int, enough: threading.Event) -> None:
    while not enough.wait(dice.uniform(1, max(8, sessions / 5))):  # the next one takes seconds to start here
        subprocess.run(["systemctl", "kill", "-s", "KILL", "persona-agent"], check=False)


def storm(sessions: int, port: int, users: list[str]) -> int:
    """One round; how many sessions hung."""
    enough = threading.Event()
    killer = threading.Thread(target=kill_now_and_then, args=(sessions, enough))
    killer.start()
    running = []
    for _ in range(sessions):
        running.append(session(dice.choice(users), port))
        while sum(one.poll() is None for one in running) >= TOGETHER:
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 0.2))
    hung = 0
    for one in running:
        try:
            one.wait(HANGS_S)
        except subprocess.TimeoutExpired:
            hung += 1
            one.kill()
    enough.set()
    killer.join()
    return hung


rounds, sessions, port = map(int, sys.argv[1:4])
shutil.rmtree(FOUND, ignore_errors=True)
os.mkdir(FOUND)
os.chmod(FOUND, 0o777)  # noqa: S103 - every session leaves its marks there
hung = 0
for number in range(rounds):
    hung += storm(sessions, port, sys.argv[4:])
    print(f"round {number + 1} of {rounds}: {len(os.listdir(FOUND))} marks", file=sys.stderr, flush=True)
marks = [name.split("-")[0] for name in os.listdir(FOUND)]
counts = {mark: marks.count(mark) for mark in ("opened", "ended", "ran", "reached")}
print(json.dumps({**counts, "hung": hung, "refused": rounds * sessions - counts["opened"]}))
