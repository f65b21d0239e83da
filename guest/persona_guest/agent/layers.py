"""Which layers of the gate are active, as ``persona status`` and the health report show them."""

from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.lsm.layer import KernelLayer


class Layers:
    """``binds``: whether personas bind anything on this machine, their limits and their network both."""

    def __init__(self, kernel_layer: KernelLayer, fallback: Fallback, *, binds: bool) -> None:
        self._kernel_layer = kernel_layer
        self._fallback = fallback
        self._binds = binds

    def active(self) -> dict[str, bool]:
        """Each layer by name, and whether it is active.  Safe to call from any thread."""
        bpf = self._kernel_layer.layer.active
        found = {"seccomp": True, "bpf": bpf, "verify": not bpf, "limits": self._binds, "network": self._binds}
        return found | self._fallback.layers()
