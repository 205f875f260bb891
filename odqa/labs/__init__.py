"""Labs: what a paper claims, made small enough to be proven in minutes, on worlds whose truth is known.

A lab is a module of this package with a function `run(settings, seed, desk) -> Outcome`; its recipe (`eval/lab-*.yaml`)
has the kind `lab-NAME`, with the module's underscores as dashes. `odqa.labs.runner` runs the seeds, keeps each one, and
makes the table, the claims and the figures of all labs.
"""

from odqa.labs.outcome import Outcome

__all__ = ["Outcome"]
