"""Import of checkpoints of published code. Nothing here runs code from a file."""

from dsnet.stored.compat.dsnet_release import load_dsnet_checkpoint, load_dsnet_gate

__all__ = ["load_dsnet_checkpoint", "load_dsnet_gate"]
