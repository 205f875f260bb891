"""odqa: open-domain question answering on frozen language models.

Importing this package loads no model library; the public names below import what they need when they are used.
`transformers`' Auto classes know odqa-mini from now on, whenever they are loaded.
"""

from odqa.lm import auto as _auto

__version__ = "0.1.0"

_auto.install()
