"""Serve a trained model over HTTP, with OpenAI's completions endpoint.

ponder serve --checkpoint runs/quickstart
ponder serve --checkpoint runs/quickstart --port 8080 --threshold 0.3 --api-key-file key.txt
torchrun --nproc_per_node 4 -m megatron_ponder serve --checkpoint runs/quickstart --tensor 2 --pipeline 2

Also under srun and mpirun. The key may stand in the environment variable PONDER_API_KEY instead of a file.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.environment import without_local_rank
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.launch import discover
from megatron_ponder.base.texts import read_text
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.loading import PRECISIONS, CheckedSetup, Setup, check_setup, load_generator
from megatron_ponder.generation.ranks import joined
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.parallel.collectives import from_first, together

LONGEST = 10**7  # seconds, a third of a year


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line and serve until a signal."""
    try:
        from megatron_ponder.serving.application import Limits
        from megatron_ponder.serving.connections import ConnectionLimits
        from megatron_ponder.serving.protocol import ServedModel
        from megatron_ponder.serving.serving import Address, follow, listen, serve
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}: pip install 'megatron_ponder[serve]'") from None

    address, limits, connections, batching = Address(), Limits(), ConnectionLimits(), Batching()
    parser = Parser("serve", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or checkpoint folder")
    parser.add_argument("--model-name", help="under which clients know the model; the folder's unless given")
    parser.add_argument("--host", default=address.host, help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=address.port, help="0 for any that is free")
    parser.add_argument("--api-key-file", type=Path, help="a file with the key that clients must send")
    parser.add_argument("--threshold", type=float, help="τ; the trained model's unless given")
    parser.add_argument("--router-bias", type=float, help="α; positive buys more steps")
    parser.add_argument("--max-sequences", type=int, default=batching.max_sequences, help="that run at a time")
    parser.add_argument("--max-slots", type=int, default=batching.max_slots, help="in the cache at a time")
    parser.add_argument("--precision", choices=PRECISIONS, help="that of training on a GPU, fp32 on a CPU unless given")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--pipeline", type=int, default=1, help="ranks that share the stack of layers")
    parser.add_argument("--queue-limit", type=int, default=64, help="sequences that may wait; then clients get 429")
    parser.add_argument("--timeout", type=float, default=limits.seconds, help="seconds for a request")
    parser.add_argument("--max-body-bytes", type=int, default=limits.body_bytes, help="of a request")
    parser.add_argument("--max-connections", type=int, default=connections.connections, help="open at a time")
    parser.add_argument(
        "--idle-timeout", type=float, default=connections.seconds, help="seconds for the head of a request to arrive"
    )
    parser.add_argument(
        "--step-timeout", type=float, default=60.0, help="seconds after which a hanging rank is given up"
    )
    parser.add_argument("--grace", type=float, default=30.0, help="seconds for requests to finish after SIGTERM")
    arguments = parser.parse_args(without_local_rank(argv))

    def settle() -> tuple[Setup, Limits, ConnectionLimits]:
        if arguments.queue_limit < 0 or not 0 <= arguments.grace < LONGEST:
            raise UserError("--queue-limit and --grace must not be negative; use 0 for none")
        if not 1 <= arguments.step_timeout < LONGEST:
            raise UserError("--step-timeout must be at least one second; 60 if in doubt")
        setup = Setup(
            arguments.checkpoint,
            arguments.tensor,
            arguments.pipeline,
            arguments.threshold,
            arguments.router_bias,
            arguments.precision,
            Batching(arguments.max_sequences, arguments.max_slots),
        )
        limits = Limits(arguments.timeout, arguments.max_body_bytes, _api_key(arguments.api_key_file))
        return setup, limits, ConnectionLimits(arguments.max_connections, arguments.idle_timeout)

    launch = discover()
    with joined(launch) as device:
        setup, limits, connections = from_first(settle)

        def check() -> CheckedSetup:
            checked = check_setup(setup, launch, device, copies=False)
            if checked.tokenizer() is None:
                raise UserError(f"{checked.folder} has no tokenizer; train with tokenizer.path set to serve text")
            return checked

        def load() -> tuple[Generator, ServedModel]:
            generator, loaded, _ = load_generator(from_first(check), launch, device)
            name = arguments.model_name or arguments.checkpoint.resolve().name
            longest = loaded.config.model.max_position_embeddings
            return generator, ServedModel(name, loaded.tokenizer, longest, int(time.time()))

        first = launch.rank == 0
        listening = together(lambda: listen(Address(arguments.host, arguments.port)) if first else None)
        if first:
            most_sequences = setup.batching.max_sequences + arguments.queue_limit
            serve(load, listening, limits, connections, most_sequences, arguments.grace, arguments.step_timeout)
        else:
            follow(load)


def _api_key(file: Path | None) -> str | None:
    """From the file, or the environment; None if there is neither."""
    return os.environ.get("PONDER_API_KEY") if file is None else read_text(file).strip()
