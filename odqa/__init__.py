"""odqa: open-domain question answering on frozen language models.

Importing this package loads no model library; the public names below import what they need when they are used.
"""

__version__ = "0.1.0"
