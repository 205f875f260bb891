"""One benchmark a module: `scripts/bench.py` makes a subcommand of each."""
