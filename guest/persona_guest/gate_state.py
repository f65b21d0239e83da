"""What the PAM module and the standby go by while there is no agent: mode and exemptions, in a file.

A missing file is a fresh installation, or a gate that was released: complain.  docs/protocol.md has its form.
"""

from pathlib import Path

from persona_guest.settings import Settings


def path_of(settings: Settings) -> Path:
    """Where it is."""
    return Path(settings.paths.state_dir) / "gate.state"


def write(settings: Settings) -> None:
    """Written whole, then renamed: nobody reads half of it."""
    path = path_of(settings)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    gate = settings.gate
    new.write_text(f"mode={settings.mode}\nuid_min={gate.uid_min}\nbreak_glass={gate.break_glass_group}\n")
    new.chmod(0o644)
    new.replace(path)


def remove(settings: Settings) -> None:
    """The gate was released."""
    path_of(settings).unlink(missing_ok=True)
