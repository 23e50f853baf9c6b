"""postroad: the contract between the services, and the only code that they have in common."""

__version__ = "0.1.0"
