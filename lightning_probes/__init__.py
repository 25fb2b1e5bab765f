"""Linear probes on every layer of a network: while it trains, and afterwards."""

from lightning_probes.callback import LinearProbeCallback
from lightning_probes.posthoc import probe
from lightning_probes.report import ProbeReport

__all__ = ["LinearProbeCallback", "ProbeReport", "probe"]
__version__ = "0.1.0"
