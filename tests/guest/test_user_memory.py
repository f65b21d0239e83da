"""What a user leaves in memory counts against what they may use afterwards, as plans over a fake hierarchy."""

import shutil
from pathlib import Path

import pytest
from persona_guest.core.persona_cgroups import FALLBACK_ROOT, PersonaCgroup, fallback_slice_of, place_of, slice_of
from persona_guest.enforce.cgroups.facility import Cgroups
from persona_guest.enforce.cgroups.limits import LEAST, bound_of, room
from persona_guest.enforce.plan import apply, describe, undo

from persona.decisions import PersonaRef
from persona.documents import Persona, ResourceLimits
from persona.patterns import Whitelist
from tests.guest.fake_cgroups import FakeHierarchy

SLICE = slice_of(1000)
MANAGER = f"{SLICE}/user@1000.service"
CRON = "system.slice/cron.service"
FALLBACK_1000 = fallback_slice_of(1000)
MIB = 1 << 20


def persona(mib: int | None = 128, per: str = "session") -> Persona:
    limits = ResourceLimits(
        memory_bytes=None if mib is None else mib * MIB, per="persona" if per == "persona" else "session"
    )
    return Persona("P", Whitelist(()), limits, priority=50)


def login(number: int, name: str = "P") -> PersonaCgroup:
    return place_of(f"s-{number}", 1000, PersonaRef(name, 1), f"{SLICE}/session-{number}.scope")


def job(number: int, *, shared: bool = False) -> PersonaCgroup:
    return place_of(f"s-{number}", 1000, PersonaRef("P", 1), CRON, shared=shared)


@pytest.fixture
def tree(tmp_path: Path) -> FakeHierarchy:
    tree = FakeHierarchy(tmp_path / "cgroup")
    for number in range(6):
        tree.grow(f"{SLICE}/session-{number}.scope", 10 + number)
    tree.grow(CRON, 20)
    return tree


@pytest.fixture
def cgroups(tree: FakeHierarchy) -> Cgroups:
    return Cgroups(tree, "/dev/null")


def limit(tree: FakeHierarchy, cgroup: str) -> int | str:
    """In MiB."""
    text = tree.read(cgroup, "memory.max").strip()
    return int(text) // MIB if text.isdigit() else text


def ended(tree: FakeHierarchy, cgroups: Cgroups, place: PersonaCgroup) -> None:
    """As systemd and the agent take a login away."""
    shutil.rmtree(tree.path(place.parent if place.parent.endswith(".scope") else place.cgroup), ignore_errors=True)
    apply(cgroups.leave(place))


# --- one place --------------------------------------------------------------------------------------


def test_what_earlier_logins_left_is_taken_off_the_limit(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    apply(cgroups.enter(login(0), persona()))
    assert limit(tree, login(0).cgroup) == 128
    tree.use(login(0).cgroup, 90 * MIB)
    tree.use(f"{SLICE}/session-0.scope", 90 * MIB)
    tree.use(SLICE, 90 * MIB)
    apply(cgroups.enter(login(1), persona()))
    assert limit(tree, login(1).cgroup) == 128, "what a session that lives has is not left"
    ended(tree, cgroups, login(0))
    apply(cgroups.enter(login(2), persona()))
    assert limit(tree, login(2).cgroup) == 128 - 88
    tree.use(SLICE, 300 * MIB)
    apply(cgroups.enter(login(3), persona()))
    assert limit(tree, login(3).cgroup) == LEAST // MIB, "or they could not delete it"
    apply(cgroups.enter(login(4, "Free"), persona(None)))
    assert limit(tree, login(4, "Free").cgroup) == "max"


def test_what_is_deleted_is_given_back_and_nothing_is_taken_from_who_has_it(
    tree: FakeHierarchy, cgroups: Cgroups
) -> None:
    wanted = {login(1): persona(), login(2): persona()}
    apply(cgroups.enter(login(1), persona()))
    tree.use(SLICE, 90 * MIB)
    apply(cgroups.enter(login(2), persona()))
    apply(cgroups.reconcile(wanted))
    assert (limit(tree, login(1).cgroup), limit(tree, login(2).cgroup)) == (128, 40)
    assert cgroups.reconcile(wanted) == ()
    tree.use(SLICE, 120 * MIB)
    assert cgroups.reconcile(wanted) == ()
    tree.use(SLICE, 21 * MIB)
    apply(cgroups.reconcile(wanted))
    assert limit(tree, login(2).cgroup) == 108
    tree.write(login(2).cgroup, "memory.max", str(500 * MIB))
    tree.use(SLICE, 0)
    apply(cgroups.reconcile(wanted))
    assert limit(tree, login(2).cgroup) == 128
    assert cgroups.reconcile(wanted) == ()
    assert cgroups.enter(login(2), persona()) == ()


def test_the_page_cache_is_not_what_a_user_left(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    tree.use(SLICE, 0, cache=900 * MIB)
    apply(cgroups.enter(login(1), persona()))
    assert limit(tree, login(1).cgroup) == 128


def test_what_a_job_left_counts_for_a_login_and_the_other_way_round(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    apply(cgroups.enter(job(1), persona()))
    tree.use(FALLBACK_1000, 60 * MIB)
    ended(tree, cgroups, job(1))
    assert tree.exists(FALLBACK_1000), "what it left would count nowhere"
    tree.use(SLICE, 20 * MIB)
    for place in (login(2), job(3)):
        apply(cgroups.enter(place, persona()))
        assert limit(tree, place.cgroup) == 128 - 80


def test_what_sessions_left_that_share_a_limit_stays_in_it(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    shared = persona(per="persona")
    apply(cgroups.enter(job(1, shared=True), shared))
    tree.use(f"{FALLBACK_ROOT}/shared-P", 90 * MIB)
    ended(tree, cgroups, job(1, shared=True))
    apply(cgroups.reconcile({}))
    assert limit(tree, f"{FALLBACK_ROOT}/shared-P") == 128
    apply(cgroups.enter(job(2, shared=True), shared))
    assert limit(tree, f"{FALLBACK_ROOT}/shared-P") == 128


# --- what is above the places ---------------------------------------------------------------------------


def test_numbers_of_a_bound() -> None:
    assert bound_of([], 0, None, lambda: 0) == 64 * MIB
    assert bound_of([128 * MIB, 5 * MIB], 2, 0, lambda: 0) == (64 + 32 + 133) * MIB
    assert bound_of([128 * MIB, None], 2, 0, lambda: 0) is None
    assert bound_of([], 0, 500 * MIB, lambda: 200 * MIB) == 272 * MIB, "not below what is there"
    assert bound_of([], 0, 230 * MIB, lambda: 200 * MIB) == 230 * MIB, "and not higher because of it"
    assert bound_of([], 0, None, lambda: 200 * MIB) == 272 * MIB
    assert [room(128 * MIB, left * MIB) // MIB for left in (0, 3, 4, 100, 1000)] == [128, 128, 124, 32, 32]
    assert room(8 * MIB, 100 * MIB) == 8 * MIB


def test_a_users_bound_follows_their_sessions_and_never_rises_with_what_is_left(
    tree: FakeHierarchy, cgroups: Cgroups
) -> None:
    own = 64 + 6 * 16
    apply(cgroups.enter(login(0), persona()))
    assert limit(tree, SLICE) == own + 128
    assert tree.read(SLICE, "memory.swap.max") == "0\n"
    apply(cgroups.enter(login(1), persona()))
    assert limit(tree, SLICE) == own + 256
    tree.use(SLICE, 250 * MIB)
    ended(tree, cgroups, login(0))
    assert limit(tree, SLICE) == 320, "250 and room for a login, in steps of 16"
    for number in range(2, 5):
        apply(cgroups.enter(login(number), persona()))
        bound = limit(tree, SLICE)
        assert isinstance(bound, int)
        assert bound <= own + 256, "as much as two sessions at once may have"
        tree.use(SLICE, bound * MIB)
        ended(tree, cgroups, login(number))
    tree.use(SLICE, 10 * MIB)
    ended(tree, cgroups, login(1))
    assert limit(tree, SLICE) == 64 + 16


def test_what_is_left_bounds_while_nobody_is_logged_in_and_goes_with_it(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    apply(cgroups.enter(login(0), persona()))
    tree.use(SLICE, 100 * MIB)
    shutil.rmtree(tree.path(SLICE))
    tree.grow(SLICE)
    tree.use(SLICE, 100 * MIB)
    before = cgroups.reconcile({})
    apply(before)
    bound = limit(tree, SLICE)
    assert isinstance(bound, int)
    assert bound < 200
    assert cgroups.reconcile({}) == ()
    tree.use(SLICE, MIB)
    apply(cgroups.reconcile({}))
    assert limit(tree, SLICE) == "max"
    assert cgroups.reconcile({}) == ()


def test_no_limit_in_one_place_is_no_bound(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    apply(cgroups.enter(login(0), persona()))
    plan = cgroups.enter(login(1, "Free"), persona(None))
    apply(plan)
    assert (limit(tree, SLICE), tree.read(SLICE, "memory.swap.max")) == ("max", "max\n")
    undo(plan)
    assert limit(tree, SLICE) == 64 + 6 * 16 + 128
    apply(cgroups.enter(login(1, "Free"), persona(None)))
    ended(tree, cgroups, login(1, "Free"))
    assert limit(tree, SLICE) == 64 + 5 * 16 + 128


def test_an_operators_value_is_never_raised_and_comes_back(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    tree.write(SLICE, "memory.max", str(1000 * MIB))
    apply(cgroups.enter(login(0), persona(800)))
    assert limit(tree, SLICE) == 960
    apply(cgroups.enter(login(1), persona(800)))
    assert limit(tree, SLICE) == 1000
    tree.write(SLICE, "memory.max", str(500 * MIB))  # systemctl set-property
    wanted = {login(0): persona(800), login(1): persona(800)}
    assert [step for step in describe(cgroups.reconcile(wanted)) if step.get("file") == "memory.max"] == []
    apply(cgroups.reconcile(wanted))
    assert limit(tree, SLICE) == 500
    tree.write(SLICE, "memory.max", "max")  # systemd writes its own again
    apply(cgroups.reconcile(wanted))
    assert limit(tree, SLICE) == 1760
    tree.write(SLICE, "memory.max", str(1500 * MIB))
    apply(cgroups.reconcile(wanted))
    apply(cgroups.release())
    assert (limit(tree, SLICE), tree.read(SLICE, "memory.swap.max")) == (1500, "max\n")
    assert cgroups.release() == ()


def test_who_is_not_looked_at_is_not_bound_by_what_they_left(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    apply(cgroups.enter(login(0), persona()))
    apply(cgroups.enter(job(1), persona()))
    apply(cgroups.lift(1000))
    assert (limit(tree, SLICE), limit(tree, FALLBACK_1000)) == ("max", "max")
    assert cgroups.lift(1001) == ()


def test_a_service_manager_counts_with_its_limit_or_with_what_it_has(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    tree.grow(MANAGER, 30)
    tree.use(MANAGER, 200 * MIB)
    apply(cgroups.enter(login(0), persona()))
    assert limit(tree, SLICE) == 64 + 6 * 16 + 128 + 200
    manager = place_of("s-9", 1000, PersonaRef("P", 1), MANAGER)
    apply(cgroups.enter(manager, persona()))
    assert limit(tree, SLICE) == 64 + 6 * 16 + 128 + 128
    apply(cgroups.leave(manager))
    assert limit(tree, MANAGER) == "max"


@pytest.mark.parametrize("word", ["9" * 5000, "\u00b2", "999999999999"])
def test_a_users_own_word_on_their_service_manager_counts_nothing(
    tree: FakeHierarchy, cgroups: Cgroups, word: str
) -> None:
    tree.grow(MANAGER, 30)
    manager = place_of("s-9", 1000, PersonaRef("P", 1), MANAGER)
    apply(cgroups.enter(manager, persona()))
    tree.note(MANAGER, word, "user.persona.memory")
    tree.use(SLICE, 90 * MIB)
    apply(cgroups.enter(login(0), persona()))
    assert limit(tree, SLICE) == 64 + 6 * 16 + 128 + 128
    tree.write(MANAGER, "memory.max", "max")
    apply(cgroups.reconcile({manager: persona(), login(0): persona()}))
    assert limit(tree, MANAGER) == 40
    tree.use(SLICE, 70 * MIB)
    apply(cgroups.reconcile({manager: persona(), login(0): persona()}))
    assert limit(tree, MANAGER) == 60


def test_release_forgets_what_was_left(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    tree.use(SLICE, 100 * MIB)
    for place in (login(0), job(1), job(2, shared=True)):
        apply(cgroups.enter(place, persona()))
    apply(cgroups.release())
    assert not tree.exists(FALLBACK_ROOT)
    assert limit(tree, SLICE) == "max"
    assert cgroups.release() == ()
    assert not any(tree.notes.values())


@pytest.mark.parametrize("note", ["", "x", "1 2", "-1 max max", "1 max max max", "1 max 0x"])
def test_a_note_that_is_not_ours_says_nothing(tree: FakeHierarchy, cgroups: Cgroups, note: str) -> None:
    tree.note(SLICE, note, "user.persona.memory")
    apply(cgroups.enter(login(0), persona()))
    assert limit(tree, SLICE) == 64 + 6 * 16 + 128


def test_places_of_the_version_before_go_on_in_the_new_ones(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    tree.grow(f"{FALLBACK_ROOT}/s-1/P", 20)
    apply(cgroups.reconcile({job(1): persona()}))
    assert tree.processes(job(1).cgroup) == [20]
    assert tree.children(FALLBACK_ROOT) == ["user-1000"]
