"""Imported last by the server that forks processes of tests: what each of them would do again at its start.

On import it builds the parser of configurations, lets DeepSpeed find out what it could compile here, and hides all that
is there by then from the garbage collector, which every engine runs: a third of a second among a million objects.
"""

import atexit
import gc

import deepspeed

from megatron_ponder.config import read_config

read_config([])
_ = deepspeed.ops.__compatible_ops__
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # lest libraries report leaks when the server ends
