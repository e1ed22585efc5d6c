"""Make language models fit the hardware people have, and prove what it cost."""

__version__ = "0.1.0"
