"""The version, in one place: packaging, ``vitrail._C`` and ``vitrail --version`` read it here."""

__version__ = "0.1.0.dev0"
