"""Linear probes on every layer of a network: while it trains, and afterwards.

Public are the three names in ``__all__`` and, for the command line, :mod:`lightning_probes.cli`. All else is internal
and may change with any version.
"""

from lightning_probes.callback import LinearProbeCallback
from lightning_probes.posthoc.probe import probe
from lightning_probes.report.report import ProbeReport

__all__ = ["LinearProbeCallback", "ProbeReport", "probe"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """List what is public, so that completion offers no room of the house."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
