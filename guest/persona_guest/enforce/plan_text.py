"""Plans in plain words, for the journal: one short line on what was changed, whatever the plan's length."""

from collections.abc import Mapping

from persona_guest.enforce.plan import Plan

NAMED_MAX = 3  # operations in a line; the others are counted

# By the 'op' of an operation's description, whose other fields stand in braces.
WORDS = {
    "cgroup.make": "{cgroup} was made",
    "cgroup.hand_on": "{cgroup} hands its controllers on",
    "cgroup.take_back": "{cgroup} hands no controllers on any more",
    "cgroup.note": "{cgroup} was marked with where its processes come from",
    "cgroup.note_memory": "{cgroup} was marked with its memory limit",
    "cgroup.set": "{file} of {cgroup} was {before} and is {value}",
    "cgroup.empty": "what lived in {cgroup} moved to {into}",
    "cgroup.remove": "{cgroup} was removed",
    "network.bind": "the network of {where} is under {under}",
    "network.unbind": "the network of {where} is under nobody",
    "network.rebuild": "the table inet persona was made anew",
    "network.remove": "the table inet persona was removed",
    "network.exempt": "the network of {where} stays free",
    "routes.open": "the route via {via} was made",
    "routes.repair": "the route via {via} was made anew",
    "routes.close": "the route via {via} was removed",
}


def in_words(plan: Plan) -> str:
    """The first few operations of a plan as one line, and how many more there were."""
    said = [WORDS.get(str(it["op"]), "{op}").format_map(it) for it in (step.describe() for step in plan[:NAMED_MAX])]
    if len(plan) > NAMED_MAX:
        said.append(f"and {len(plan) - NAMED_MAX} more")
    return "; ".join(said)


def telling(plan: Plan) -> Plan:
    """The operations of a reconciliation that say that something was not as it should be.

    What bounds a user's memory follows what they left in memory, all the time: upwards in a place, both ways in
    a cgroup above, whose mark goes with it.
    """
    described = [(step, step.describe()) for step in plan]
    marked = {it["cgroup"] for _, it in described if it["op"] == "cgroup.note_memory"}

    def tells(it: Mapping[str, object]) -> bool:
        if it["op"] == "cgroup.set" and str(it["file"]).startswith("memory."):
            return it["cgroup"] not in marked and _bytes(it["value"]) < _bytes(it["before"])
        return it["op"] != "cgroup.note_memory"

    return tuple(step for step, it in described if tells(it))


def _bytes(value: object) -> float:
    return int(str(value)) if str(value).isdecimal() else float("inf")
